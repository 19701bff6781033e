//! Text for log lines and error messages, one line each.

use std::error::Error;

use secure_comms_keys::text::one_line;

/// Longest quote of an unproven peer's text, in bytes.
const QUOTE_MAX: usize = 300;

/// An unproven peer's text, cut to [`QUOTE_MAX`] bytes and escaped.
pub(crate) fn quote(text: &str) -> String {
    one_line(text, QUOTE_MAX)
}

/// The error and its causes, joined by colons.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
