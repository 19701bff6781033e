//! The routes: each is one call of the pods, and its answer.

mod ending;
mod events;
mod prepare;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use axum::{Json, Router};
use secure_comms_adaptor::Deadline;
use secure_comms_adaptor::pod::PodState;
use secure_comms_protocol::PodId;
use tokio::sync::{Semaphore, watch};

use self::prepare::Claims;
use super::events::History;
use super::input::{self, Id, Start};
use super::problem::Kind;
use super::types::{Part, Phase, Pod, PodList, Problem, StartOrder, Status, Time};
use super::user_data::VmTunnels;
use super::{described, stopped};
use crate::health::Health;
use crate::pods::{Launcher, Pods};

pub(super) use self::ending::{__path_collect, __path_forget, __path_orphans, __path_stop};
pub(super) use self::events::__path_events;
pub(super) use self::prepare::__path_prepare;

/// Readers of events at a time.
const READERS_MAX: usize = 32;
/// Time that a start has to begin, or to be refused, before the answer that it goes on.
const START_BEGINS: Duration = Duration::from_secs(2);

/// What the routes work with. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct Api(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pods: Pods,
    health: Health,
    history: History,
    since: Time,
    vm_tunnels: Option<VmTunnels>,
    claims: Claims,
    readers: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

impl Api {
    pub(super) fn new(
        pods: Pods,
        health: Health,
        history: History,
        vm_tunnels: Option<VmTunnels>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let (since, readers) = (SystemTime::now().into(), Arc::new(Semaphore::new(READERS_MAX)));
        Self(Arc::new(Inner {
            pods,
            health,
            history,
            since,
            vm_tunnels,
            claims: Claims::default(),
            readers,
            stop,
        }))
    }

    /// All routes; `document` is that of the OpenAPI document, which is made from the others.
    pub(super) fn router(self, document: MethodRouter<Self>) -> Router {
        Router::new()
            .route("/v1/pods", get(list))
            .route("/v1/pods/{id}", get(show).put(prepare::prepare).delete(ending::stop))
            .route("/v1/pods/{id}/start", post(start))
            .route("/v1/pods/{id}/forget", post(ending::forget))
            .route("/v1/orphans", get(ending::orphans))
            .route("/v1/orphans/{id}", delete(ending::collect))
            .route("/v1/events", get(events::events))
            .route("/v1/status", get(status))
            .route("/openapi.json", document)
            .fallback(no_route)
            .method_not_allowed_fallback(no_method)
            .with_state(self)
    }

    fn pod(&self, id: &PodId) -> Result<Pod, Box<Problem>> {
        let pod = self.0.pods.get(id).map(Pod::from);
        pod.ok_or_else(|| Kind::NotFound.problem(format!("pod {id} is not known here")))
    }

    /// Ends a wait when the service ends; the work goes on.
    async fn unless_ending<T>(&self, work: impl Future<Output = T>) -> Result<T, Box<Problem>> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = stopped(self.0.stop.clone()) => Err(Kind::ServiceEnding
                .problem("the service ends; what was begun goes on with the next process")),
        }
    }

    /// Refuses to interfere with a pod of cloud-api-adaptor's.
    fn refuse_owned(&self, id: &PodId, doing: &str) -> Result<(), Box<Problem>> {
        let launcher = self.0.pods.get(id).and_then(|pod| pod.launch.launcher);
        if launcher != Some(Launcher::Caa) {
            return Ok(());
        }
        Err(Kind::Owned.problem(format!("pod {id}: cloud-api-adaptor owns it: {doing}")))
    }
}

async fn no_route(method: Method, uri: Uri) -> Box<Problem> {
    Kind::NoRoute
        .problem(format!("{method} {}: there is nothing; GET /openapi.json lists what is", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> Box<Problem> {
    Kind::Method.problem(format!("{}: has no {method}; the header Allow lists its methods", uri.path()))
}

/// The service: its parts, its pods, and what a stop of it would cost.
#[utoipa::path(get, path = "/v1/status", tag = "service", responses(
    (status = 200, description = "The service", body = Status),
    described::Always,
))]
async fn status(State(api): State<Api>) -> Json<Status> {
    let parts: Vec<Part> = api
        .0
        .health
        .parts()
        .into_iter()
        .map(|(name, reason)| Part { name: name.to_owned(), works: reason.is_none(), reason })
        .collect();
    let mut status = Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        since: api.0.since,
        ready: parts.iter().all(|part| part.works),
        parts,
        pods: 0,
        pods_by_phase: [].into(),
        stop_cost: api.0.pods.stop_cost().into(),
    };
    for pod in api.0.pods.list() {
        status.pods += 1;
        *status.pods_by_phase.entry(Phase::from(&pod.snapshot.state)).or_default() += 1;
    }
    Json(status)
}

/// All pods of the node.
#[utoipa::path(get, path = "/v1/pods", tag = "pods", responses(
    (status = 200, description = "The pods, by their ids", body = PodList),
    described::Always,
))]
async fn list(State(api): State<Api>) -> Json<PodList> {
    Json(PodList { items: api.0.pods.list().into_iter().map(Pod::from).collect() })
}

/// One pod.
#[utoipa::path(get, path = "/v1/pods/{id}", tag = "pods", params(described::IdParam), responses(
    (status = 200, description = "The pod", body = Pod),
    (status = 404, description = "The pod is not known", body = Problem, content_type = "application/problem+json"),
    described::WithInput,
    described::Always,
))]
async fn show(State(api): State<Api>, Id(id): Id) -> Result<Json<Pod>, Box<Problem>> {
    api.pod(&id).map(Json)
}

/// Connects to the pod's VM. The connection is kept up until the pod is deleted.
///
/// Dropping the request drops the wait: the start goes on until the pod is up or the deadline passes.
#[utoipa::path(post, path = "/v1/pods/{id}/start", tag = "pods", params(described::IdParam),
    request_body = StartOrder, responses(
    (status = 200, description = "The pod is up (with `wait`)", body = Pod),
    (status = 202, description = "The start goes on (without `wait`)", body = Pod),
    (status = 404, description = "The pod is not prepared", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "The pod is started already, was stopped, or is cloud-api-adaptor's", body = Problem,
        content_type = "application/problem+json"),
    described::WithInput,
    described::WithBody,
    (status = 502, description = "The start failed", body = Problem, content_type = "application/problem+json"),
    (status = 504, description = "The deadline passed", body = Problem, content_type = "application/problem+json"),
    (status = 507, description = "The key store is full", body = Problem, content_type = "application/problem+json"),
    described::Always,
))]
async fn start(
    State(api): State<Api>,
    Id(id): Id,
    input::Json(order): input::Json<StartOrder>,
) -> Result<Response, Box<Problem>> {
    let start = Start::new(&order)?;
    api.refuse_owned(&id, "it starts the pod itself")?;
    let pods = &api.0.pods;
    let state = pods.subscribe(&id);
    let work = pods.start(&id, &start.addresses, Deadline::after(start.deadline));
    if start.wait {
        api.unless_ending(work).await??;
        return Ok(Json(api.pod(&id)?).into_response());
    }
    let begun = async {
        match state {
            Some(state) => begins(state).await,
            // The start itself says that the pod is not prepared.
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        result = api.unless_ending(work) => result??,
        () = begun => {}
        // It waits for an earlier command of the pod.
        () = tokio::time::sleep(START_BEGINS) => {}
    }
    Ok((StatusCode::ACCEPTED, Json(api.pod(&id)?)).into_response())
}

/// Returns when a start of a pod that was not started has begun.
async fn begins(mut state: watch::Receiver<secure_comms_adaptor::pod::PodSnapshot>) {
    let is_started = |state: &PodState| {
        matches!(
            state,
            PodState::Connecting { .. }
                | PodState::Attesting { .. }
                | PodState::Upgrading
                | PodState::Up { .. }
        )
    };
    // It is refused at once, then: the state says nothing of this start.
    if is_started(&state.borrow_and_update().state) {
        return std::future::pending().await;
    }
    if state.wait_for(|snapshot| is_started(&snapshot.state)).await.is_err() {
        // The pod has ended; so has the start.
        std::future::pending().await
    }
}
