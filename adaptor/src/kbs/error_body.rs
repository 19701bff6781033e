//! The body of an error response. It may come from any server.

use std::fmt;

use serde::Deserialize;

/// The longest text that is shown of each part, in characters.
const SHOWN_MAX: usize = 200;

/// Trustee's name of its error, and the text with it. Each may be empty.
#[derive(Debug)]
pub(super) struct ErrorBody {
    /// The last segment of `type`.
    variant: String,
    detail: String,
}

/// `{"type":".../errors/<Variant>","detail":"..."}`, without a content type.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TrusteeError {
    r#type: String,
    detail: String,
}

impl ErrorBody {
    pub(super) fn read(body: &[u8]) -> Self {
        let error: TrusteeError = serde_json::from_slice(body).unwrap_or_else(|_| TrusteeError {
            r#type: String::new(),
            detail: String::from_utf8_lossy(body).trim().to_owned(),
        });
        let variant = error.r#type.rsplit('/').next().unwrap_or_default().to_owned();
        Self { variant, detail: error.detail }
    }

    pub(super) fn variant(&self) -> &str {
        &self.variant
    }
}

/// A space and the escaped text for each part that is not empty.
impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for text in [&self.variant, &self.detail] {
            if !text.is_empty() {
                let shown: String = text.chars().take(SHOWN_MAX).collect();
                write!(f, " {}", shown.escape_debug())?;
            }
        }
        Ok(())
    }
}
