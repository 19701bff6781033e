//! What the KBS answered, and what that means.

use std::fmt;

use reqwest::{Method, Response, StatusCode};

use super::KbsError;
use super::error_body::Said;

/// The most that is read of an answer, in bytes: errors are short, and no answer has anything else for us.
const ANSWER_MAX: usize = 8 * 1024;

/// Status and error of an answer.
pub(super) struct Answer {
    status: StatusCode,
    said: Said,
}

impl Answer {
    pub(super) async fn read(mut response: Response) -> Self {
        let status = response.status();
        let mut body = Vec::new();
        if !status.is_success() {
            // An answer that breaks off still has its status.
            while let Ok(Some(chunk)) = response.chunk().await {
                body.extend(chunk.iter().take(ANSWER_MAX - body.len()));
                if body.len() == ANSWER_MAX {
                    break;
                }
            }
        }
        Self { status, said: Said::read(&body) }
    }

    pub(super) fn is_success(&self) -> bool {
        self.status.is_success()
    }

    pub(super) fn is_passing(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::REQUEST_TIMEOUT
    }

    pub(super) fn is_method_not_allowed(&self) -> bool {
        self.status == StatusCode::METHOD_NOT_ALLOWED
    }

    pub(super) fn is_missing_resource(&self) -> bool {
        self.said.variant() == "PluginInternalError"
    }

    pub(super) fn refusal(&self, path: &str, method: Method) -> KbsError {
        KbsError::Refused { path: path.to_owned(), method, answer: self.to_string(), advice: self.advice() }
    }

    fn advice(&self) -> &'static str {
        match (self.said.variant(), self.status) {
            ("AdminAuthInitialization", _) => {
                "; the KBS does not take our admin token: check that --kbs-admin-key is the private half of a key it \
                 trusts, that --kbs-admin-issuer and --kbs-admin-role are what it expects, and both clocks"
            }
            ("PolicyDeny", _) => "; the KBS's policy forbids it: check its policy for admins",
            (_, StatusCode::PAYLOAD_TOO_LARGE) => "; the KBS takes no resource of that size",
            (_, StatusCode::NOT_FOUND) => "; is that a Trustee KBS? check --kbs-url",
            (_, status) if status.is_redirection() => {
                "; redirects are not followed: give its final address with --kbs-url"
            }
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => "; check --kbs-admin-key",
            _ => "",
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.status.as_u16(), self.said)
    }
}
