//! Requests that end pods.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use secure_comms_adaptor::with_causes;
use secure_comms_adaptor::{AdaptorError, Stopped};
use secure_comms_keys::text::one_line;
use secure_comms_protocol::PodId;

use super::super::described;
use super::super::input::{EndQuery, Fields, Id};
use super::super::problem::Kind;
use super::super::types::{Deletion, Forgotten, Orphan, OrphanList, Problem};
use super::Api;
use crate::pods::CollectError;

/// Longest reason of a deletion that is retried, in bytes.
const REASON_MAX: usize = 2000;
/// Why a request that ends a pod of cloud-api-adaptor's is refused.
const OWNED: &str = "it stops the pod itself; to end the pod all the same, add ?force=true";

/// Ends the pod, and deletes its keys here and at the KBS. A pod that is not known is not an error.
///
/// Dropping the request drops the wait only.
#[utoipa::path(delete, path = "/v1/pods/{id}", tag = "pods", params(described::IdParam, described::ForceParam), responses(
    (status = 202, description = "The pod is ended; its keys are not deleted yet, and that is retried", body = Deletion),
    (status = 204, description = "The pod and its keys are gone"),
    (status = 409, description = "Another adaptor drives the pod, or it is cloud-api-adaptor's", body = Problem,
        content_type = "application/problem+json"),
    (status = 502, description = "The KBS refused, and the pod has no record here to retry with", body = Problem,
        content_type = "application/problem+json"),
    described::WithInput,
    described::Always,
))]
pub(super) async fn stop(
    State(api): State<Api>,
    Id(id): Id,
    Fields(query): Fields<EndQuery>,
) -> Result<Response, Box<Problem>> {
    if query.force {
        api.0.pods.take_away(&id);
    } else {
        api.refuse_owned(&id, OWNED)?;
    }
    let stopped = api.unless_ending(api.0.pods.stop(&id)).await??;
    Ok(answer(&id, stopped))
}

/// Deletes the pod here without the KBS, and says which resources may stay there. For a KBS that is gone for good.
///
/// Dropping the request drops the wait only.
#[utoipa::path(post, path = "/v1/pods/{id}/forget", tag = "pods", params(described::IdParam, described::ForceParam), responses(
    (status = 200, description = "The pod is gone here", body = Forgotten),
    (status = 409, description = "Another adaptor drives the pod, or it is cloud-api-adaptor's", body = Problem,
        content_type = "application/problem+json"),
    described::WithInput,
    described::Always,
))]
pub(super) async fn forget(
    State(api): State<Api>,
    Id(id): Id,
    Fields(query): Fields<EndQuery>,
) -> Result<Json<Forgotten>, Box<Problem>> {
    if query.force {
        api.0.pods.take_away(&id);
    } else {
        api.refuse_owned(&id, OWNED)?;
    }
    let resources = api.unless_ending(api.0.pods.forget(&id)).await??;
    Ok(Json(Forgotten { id: id.to_string(), resources }))
}

/// The records of the store that no launcher will end.
#[utoipa::path(get, path = "/v1/orphans", tag = "orphans", responses(
    (status = 200, description = "The orphans, by their ids", body = OrphanList),
    described::Always,
))]
pub(super) async fn orphans(State(api): State<Api>) -> Result<Json<OrphanList>, Box<Problem>> {
    let orphans = api.unless_ending(api.0.pods.orphans()).await?.map_err(AdaptorError::from)?;
    Ok(Json(OrphanList { items: orphans.into_iter().map(Orphan::from).collect() }))
}

/// Ends an orphan, as `DELETE /v1/pods/{id}` ends a pod.
///
/// Dropping the request drops the wait only.
#[utoipa::path(delete, path = "/v1/orphans/{id}", tag = "orphans", params(described::IdParam), responses(
    (status = 202, description = "The orphan is ended; its keys are not deleted yet, and that is retried",
        body = Deletion),
    (status = 204, description = "The orphan and its keys are gone"),
    (status = 404, description = "The pod is no orphan", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "Another adaptor drives the pod", body = Problem, content_type = "application/problem+json"),
    (status = 502, description = "The KBS refused, and the pod has no record here to retry with", body = Problem,
        content_type = "application/problem+json"),
    described::WithInput,
    described::Always,
))]
pub(super) async fn collect(State(api): State<Api>, Id(id): Id) -> Result<Response, Box<Problem>> {
    let collected = api.unless_ending(api.0.pods.collect(&id)).await?;
    let stopped = collected.map_err(|error| match error {
        CollectError::NoOrphan(_) => Kind::NoOrphan.problem(error.to_string()),
        CollectError::Store(error) => AdaptorError::from(error).into(),
        CollectError::Adaptor(error) => error.into(),
    })?;
    Ok(answer(&id, stopped))
}

fn answer(id: &PodId, stopped: Stopped) -> Response {
    let (resource, reason) = match stopped {
        Stopped::Done => return StatusCode::NO_CONTENT.into_response(),
        Stopped::Retried(AdaptorError::NotDeleted { resource, cause, .. }) => {
            (Some(resource), with_causes(&*cause))
        }
        Stopped::Retried(error) => (None, with_causes(&error)),
    };
    let deletion = Deletion { id: id.to_string(), resource, reason: one_line(&reason, REASON_MAX) };
    (StatusCode::ACCEPTED, Json(deletion)).into_response()
}
