//! The OpenAPI document, made from the types and the routes.

use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use utoipa::OpenApi;

use super::types::{Event, Lost, Problem};
use super::{described, routes};

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
        serve,
    ),
    components(schemas(Event, Lost, Problem))
)]
struct Document;

/// The OpenAPI document of the API, as JSON.
pub fn document() -> String {
    // Made from texts only, it is always JSON.
    Document::openapi().to_pretty_json().unwrap_or_default()
}

/// The OpenAPI document of this API.
#[utoipa::path(get, path = "/openapi.json", tag = "service", responses(
    (status = 200, description = "The document", body = Object, content_type = "application/json"),
    described::Always,
))]
pub(super) async fn serve() -> Response {
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], document()).into_response()
}
