//! A response of the KBS, and what it means.

use std::fmt;

use reqwest::{Method, Response, StatusCode};

use super::KbsError;
use super::error_body::ErrorBody;

/// The longest error body that is read, in bytes. Errors are short, and other bodies are not needed.
const BODY_MAX: usize = 8 * 1024;

/// Status and error of a response.
pub(super) struct KbsResponse {
    status: StatusCode,
    error: ErrorBody,
}

impl KbsResponse {
    pub(super) async fn read(mut response: Response) -> Self {
        let status = response.status();
        let mut body = Vec::new();
        if !status.is_success() {
            // A truncated response still has its status.
            while let Ok(Some(chunk)) = response.chunk().await {
                body.extend(chunk.iter().take(BODY_MAX - body.len()));
                if body.len() == BODY_MAX {
                    break;
                }
            }
        }
        Self { status, error: ErrorBody::read(&body) }
    }

    pub(super) fn is_success(&self) -> bool {
        self.status.is_success()
    }

    pub(super) fn is_transient(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::REQUEST_TIMEOUT
    }

    pub(super) fn is_method_not_allowed(&self) -> bool {
        self.status == StatusCode::METHOD_NOT_ALLOWED
    }

    pub(super) fn is_missing_resource(&self) -> bool {
        self.error.variant() == "PluginInternalError"
    }

    pub(super) fn refusal(&self, path: &str, method: Method) -> KbsError {
        KbsError::Refused { path: path.to_owned(), method, response: self.to_string(), advice: self.advice() }
    }

    fn advice(&self) -> &'static str {
        match (self.error.variant(), self.status) {
            ("AdminAuthInitialization", _) => {
                "; the KBS rejects the admin token: check that --kbs-admin-key is the private half of a key it \
                 trusts, that --kbs-admin-issuer and --kbs-admin-role are what it expects, and both clocks"
            }
            ("PolicyDeny", _) => "; the KBS's policy forbids it: check its policy for admins",
            (_, StatusCode::PAYLOAD_TOO_LARGE) => "; the resource is larger than the KBS accepts",
            (_, StatusCode::NOT_FOUND) => "; check that --kbs-url is a Trustee KBS",
            (_, status) if status.is_redirection() => {
                "; redirects are not followed: give its final address with --kbs-url"
            }
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => "; check --kbs-admin-key",
            _ => "",
        }
    }
}

impl fmt::Display for KbsResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.status.as_u16(), self.error)
    }
}
