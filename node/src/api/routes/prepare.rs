//! `PUT /v1/pods/{id}`.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::{AdaptorError, Deadline, Endpoint};
use secure_comms_protocol::PodId;
use serde::Serialize;
use zeroize::Zeroizing;

use super::super::input::{Fields, Id, PrepareQuery, Spec};
use super::super::problem::Kind;
use super::super::types::{Pod, PodSpec, Prepared, Problem};
use super::super::{described, input, user_data};
use super::Api;
use crate::pods::{Launch, Launcher};

/// The pods that requests prepare now: when the first of them came, and how many there are.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<HashMap<PodId, (Option<SystemTime>, usize)>>);

/// One request that prepares a pod.
struct Claim<'a> {
    claims: &'a Claims,
    id: PodId,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut claims = self.claims.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, count)) = claims.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                claims.remove(&self.id);
            }
        }
    }
}

type Work<'a> = Pin<Box<dyn Future<Output = Result<Vec<Endpoint>, AdaptorError>> + Send + 'a>>;

/// A request that was sent to the adaptor.
struct Begun<'a> {
    _claim: Claim<'a>,
    is_new: bool,
    /// The result, if it is there already.
    result: Poll<Result<Vec<Endpoint>, AdaptorError>>,
    /// What else is to be waited for.
    work: Work<'a>,
}

/// Finds or makes the pod's keys, publishes them, and listens for its local clients. The VM may then be started.
///
/// The same request again has the same result; one with another body changes what differs. Dropping the request drops the
/// wait only.
#[utoipa::path(put, path = "/v1/pods/{id}", tag = "pods", params(described::IdParam, described::PrepareParam),
    request_body = PodSpec, responses(
    (status = 200, description = "The pod was known, and is prepared", body = Prepared),
    (status = 201, description = "The pod is new, and is prepared", body = Prepared),
    (status = 409, description = "Another adaptor drives the pod, it was stopped, or it is cloud-api-adaptor's",
        body = Problem, content_type = "application/problem+json"),
    described::WithInput,
    described::WithBody,
    (status = 502, description = "The KBS refused", body = Problem, content_type = "application/problem+json"),
    (status = 504, description = "The deadline passed", body = Problem, content_type = "application/problem+json"),
    (status = 507, description = "The key store is full", body = Problem, content_type = "application/problem+json"),
    described::Always,
))]
pub(super) async fn prepare(
    State(api): State<Api>,
    Id(id): Id,
    Fields(query): Fields<PrepareQuery>,
    input::Json(spec): input::Json<PodSpec>,
) -> Result<Response, Box<Problem>> {
    let spec = Spec::new(&spec, &query)?;
    let user_data = match &api.0.vm_tunnels {
        Some(tunnels) => {
            api.refuse_owned(&id, OWNED)?;
            Some(api.unless_ending(user_data::fragment(tunnels, &id)).await??)
        }
        None => None,
    };
    let Begun { _claim, is_new, result, work } = begin(&api, &id, &spec)?;
    match result {
        Poll::Ready(result) => drop(result?),
        Poll::Pending => drop(api.unless_ending(work).await??),
    }
    let pod = api.0.pods.get(&id).map(Pod::from);
    let pod = pod.ok_or_else(|| Box::<Problem>::from(AdaptorError::Stopped(id.clone())))?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    match user_data {
        None => Ok((status, Json(Prepared { pod, user_data: None })).into_response()),
        Some(user_data) => secret(status, &pod, &user_data),
    }
}

const OWNED: &str = "it prepares the pod itself";

/// Sends the adaptor its command. Whether the pod is new is decided under a lock until then: of many requests at once one
/// is the first. And a request that deletes the pod and comes later ends this one.
fn begin<'a>(api: &'a Api, id: &'a PodId, spec: &Spec) -> Result<Begun<'a>, Box<Problem>> {
    let claims = &api.0.claims;
    let mut claimed = claims.0.lock().unwrap_or_else(PoisonError::into_inner);
    api.refuse_owned(id, OWNED)?;
    let known = api.0.pods.get(id);
    let is_gone = |state: &PodState| matches!(state, PodState::NotPrepared | PodState::Stopped);
    let is_new = !claimed.contains_key(id) && known.as_ref().is_none_or(|pod| is_gone(&pod.snapshot.state));
    let mut launch = Launch::now(Launcher::Api, spec.name.clone());
    let created = claimed.get(id).and_then(|(created, _)| *created);
    launch.created = created.or(known.and_then(|pod| pod.launch.created)).or(launch.created);
    claimed.entry(id.clone()).or_insert((launch.created, 0)).1 += 1;
    let claim = Claim { claims, id: id.clone() };
    let (init_data, deadline) = (spec.init_data.clone(), Deadline::after(spec.deadline));
    let mut work: Work<'a> =
        Box::pin(async move { api.0.pods.prepare(id, &launch, init_data, deadline).await });
    // It is polled again at once, with a waker.
    let result = work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    drop(claimed);
    Ok(Begun { _claim: claim, is_new, result, work })
}

/// The answer with the user data. What this process keeps of it is wiped; the kernel's buffers are not.
fn secret(status: StatusCode, pod: &Pod, user_data: &str) -> Result<Response, Box<Problem>> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        pod: &'a Pod,
        user_data: &'a str,
    }
    let failed = |error: serde_json::Error| Kind::Internal.problem(error.to_string());
    let public = serde_json::to_vec(pod).map_err(failed)?.len();
    // The whole capacity at once: a vector that grows leaves copies behind that are not wiped. JSON escapes at most sixfold.
    let mut body = Zeroizing::new(Vec::with_capacity(public + 6 * user_data.len() + 64));
    serde_json::to_writer(&mut *body, &Answer { pod, user_data }).map_err(failed)?;
    let mut response = (status, Body::from(Bytes::from_owner(body))).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
