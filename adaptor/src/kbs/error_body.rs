//! What the body of an answer says about an error, if anything: it may be any server's.

use std::fmt;

use serde::Deserialize;

/// The most that is shown of an answer that we do not understand, in characters.
const SHOWN_MAX: usize = 200;

/// Trustee's name of its error, and the text beside it; each may be empty.
#[derive(Debug)]
pub(super) struct Said {
    /// The last segment of `type`.
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

impl Said {
    pub(super) fn read(body: &[u8]) -> Self {
        let error: ErrorBody = serde_json::from_slice(body).unwrap_or_else(|_| ErrorBody {
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

/// A blank and a text for each of the two, escaped.
impl fmt::Display for Said {
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
