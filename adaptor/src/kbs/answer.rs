//! What the KBS answered, and what that means.

use std::fmt;

use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;

use super::KbsError;

/// The most that is read of an answer, in bytes: errors are short, and no answer has anything else for us.
const ANSWER_MAX: usize = 8 * 1024;
/// The most that is shown of an answer that we do not understand, in characters.
const SHOWN_MAX: usize = 200;

/// Status and error of an answer.
pub(super) struct Answer {
    status: StatusCode,
    /// The last segment of `type`; Trustee's names of its errors.
    variant: String,
    detail: String,
}

/// `{"type":".../errors/<Variant>","detail":"..."}`, without a content type.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorBody {
    r#type: String,
    detail: String,
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
        let error: ErrorBody = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
            r#type: String::new(),
            detail: String::from_utf8_lossy(&body).trim().to_owned(),
        });
        let variant = error.r#type.rsplit('/').next().unwrap_or_default().to_owned();
        Self { status, variant, detail: error.detail }
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
        self.variant == "PluginInternalError"
    }

    pub(super) fn refusal(&self, path: &str, method: Method) -> KbsError {
        KbsError::Refused { path: path.to_owned(), method, answer: self.to_string(), advice: self.advice() }
    }

    fn advice(&self) -> &'static str {
        match (self.variant.as_str(), self.status) {
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
        write!(f, "{}", self.status.as_u16())?;
        for text in [&self.variant, &self.detail] {
            if !text.is_empty() {
                let shown: String = text.chars().take(SHOWN_MAX).collect();
                write!(f, " {}", shown.escape_debug())?;
            }
        }
        Ok(())
    }
}
