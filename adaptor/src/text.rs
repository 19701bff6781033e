//! Text for log lines and error messages, one line each.

use std::error::Error;

/// Escapes the control characters of `text`, and nothing else.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { escaped.extend(c.escape_default()) } else { escaped.push(c) }
    }
    escaped
}

/// The longest quote of a stranger's text, in characters.
const QUOTE_MAX: usize = 300;

/// A stranger's text, cut to [`QUOTE_MAX`] characters and escaped.
pub(crate) fn quote(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTE_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    escape(&short)
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
