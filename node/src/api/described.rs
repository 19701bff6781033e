//! Parameters and answers that several requests have in common, for the OpenAPI document.

use utoipa::{IntoParams, IntoResponses};

use super::types::Problem;

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

/// Problems of every request.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum Always {
    /// The user may not use the API.
    #[response(status = 403, content_type = "application/problem+json")]
    Forbidden(Problem),
    /// A fault of the program or of the key store.
    #[response(status = 500, content_type = "application/problem+json")]
    Fault(Problem),
    /// The service ends, the KBS does not answer, or there are too many readers.
    #[response(status = 503, content_type = "application/problem+json")]
    Unavailable(Problem),
}

/// Problems of requests with an id or a query.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum WithInput {
    /// The path or the body cannot be read.
    #[response(status = 400, content_type = "application/problem+json")]
    Malformed(Problem),
    /// The request is invalid.
    #[response(status = 422, content_type = "application/problem+json")]
    Invalid(Problem),
}

/// Problems of requests with a body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum WithBody {
    /// The body did not arrive in time.
    #[response(status = 408, content_type = "application/problem+json")]
    Slow(Problem),
    /// The body is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(Problem),
    /// The body is not JSON.
    #[response(status = 415, content_type = "application/problem+json")]
    MediaType(Problem),
}
