//! The OpenAPI document, made from the types and the routes.

use utoipa::{IntoParams, OpenApi};

use super::routes;
use super::types::{Event, Lost, Problem};

/// The id in a path.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct IdParam {
    /// The runtime's sandbox id.
    #[param(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    id: String,
}

/// Of requests that end a pod.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct ForceParam {
    /// Whether the pod is ended although cloud-api-adaptor owns it.
    #[param(default = false)]
    force: Option<bool>,
}

/// Of the request that prepares a pod.
#[derive(IntoParams)]
#[into_params(parameter_in = Query, rename_all = "camelCase")]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct PrepareParam {
    /// Time until the keys must be published, in seconds.
    #[param(minimum = 1, maximum = 86400, default = 60)]
    deadline_seconds: Option<u32>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secure-comms-adaptor",
        description = "The pods of a worker node, over HTTP on a unix socket. docs/operations/API.md has limits, errors and \
                       examples."
    ),
    servers((url = "http://localhost", description = "The unix socket; the host is not used")),
    paths(
        routes::list,
        routes::show,
        routes::prepare,
        routes::start,
        routes::stop,
        routes::forget,
        routes::orphans,
        routes::collect,
        routes::events,
        routes::status,
        routes::document,
    ),
    components(schemas(Event, Lost, Problem))
)]
struct Document;

/// The OpenAPI document of the API, as JSON.
pub fn document() -> String {
    // Made from texts only, it is always JSON.
    Document::openapi().to_pretty_json().unwrap_or_default()
}
