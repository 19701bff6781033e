//! The body of an error response. It may come from any server.

use std::fmt;

use secure_comms_keys::text::one_line;
use serde::Deserialize;

/// The longest text that is shown of each part, in bytes.
const SHOWN_MAX: usize = 200;

/// Trustee's name of its error, and the text with it. Each may be empty.
#[derive(Debug)]
pub(super) struct ErrorBody {
    /// The last segment of `type`.
    variant: String,
    detail: String,
    /// A page for browsers, as proxies answer.
    page: bool,
}

/// `{"type":".../errors/<Variant>","detail":"..."}`, without a content type.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TrusteeError {
    r#type: String,
    detail: String,
}

impl ErrorBody {
    /// Reads a body; `html` says that the response calls itself HTML.
    pub(super) fn read(body: &[u8], html: bool) -> Self {
        let error = serde_json::from_slice::<TrusteeError>(body).ok();
        // Another server's JSON is shown as it is.
        if let Some(error) = error.filter(|error| !error.r#type.is_empty() || !error.detail.is_empty()) {
            let variant = error.r#type.rsplit('/').next().unwrap_or_default().to_owned();
            return Self { variant, detail: error.detail, page: html };
        }
        let text = String::from_utf8_lossy(body).trim().to_owned();
        let start: String = text.chars().take(16).collect::<String>().to_lowercase();
        let page = html || ["<!doctype", "<html", "<head"].iter().any(|tag| start.starts_with(tag));
        Self { variant: String::new(), detail: text, page }
    }

    pub(super) fn variant(&self) -> &str {
        &self.variant
    }

    pub(super) fn detail(&self) -> &str {
        &self.detail
    }

    pub(super) fn is_page(&self) -> bool {
        self.page
    }

    /// Whether a server says that it got plain HTTP at a port for TLS.
    pub(super) fn names_https_port(&self) -> bool {
        ["HTTPS port", "HTTPS server", "SSL-enabled server port"]
            .iter()
            .any(|text| self.detail.contains(text))
    }

    /// The title of a page, which says more than its markup.
    fn title(&self) -> Option<&str> {
        let lower = self.detail.to_ascii_lowercase();
        let start = lower.find("<title>")? + "<title>".len();
        let end = start + lower.get(start..)?.find("</title>")?;
        self.detail.get(start..end).map(str::trim)
    }
}

/// A space and the escaped text for each part that is not empty.
impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.page {
            f.write_str(" (a web page")?;
            if let Some(title) = self.title() {
                write!(f, ": {}", one_line(title, SHOWN_MAX))?;
            }
            return f.write_str(")");
        }
        for text in [&self.variant, &self.detail] {
            if !text.is_empty() {
                write!(f, " {}", one_line(text, SHOWN_MAX))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_shown_as_one_bounded_line() {
        let long = "x\u{2028}\u{202e}\u{9b}\n".repeat(4000);
        for body in [long.clone(), format!(r#"{{"type":"a/{}","detail":"b"}}"#, "n".repeat(9999))] {
            let shown = ErrorBody::read(body.as_bytes(), false).to_string();
            assert!(shown.len() < 600, "{} bytes", shown.len());
            assert!(
                !shown.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{202e}')),
                "{shown}"
            );
        }
    }

    #[test]
    fn a_page_is_shown_by_its_title() {
        let nginx = "<html>\r\n<head><title>503 Service Temporarily Unavailable</title></head>\r\n<body>...</body></html>";
        let shown = |body: &str, html| ErrorBody::read(body.as_bytes(), html).to_string();
        assert_eq!(shown(nginx, true), " (a web page: 503 Service Temporarily Unavailable)");
        assert_eq!(shown("<!DOCTYPE html><p>no", false), " (a web page)");
        assert_eq!(shown("<TITLE>a\nb</TITLE>", true), " (a web page: a\\nb)");
        assert_eq!(shown("<title>without end", true), " (a web page)");
        assert_eq!(shown("İ<title>ok</title>", true), " (a web page: ok)");
        assert_eq!(shown("no page", false), " no page");
        assert_eq!(shown(r#"{"message":"no Route matched"}"#, false), r#" {"message":"no Route matched"}"#);
    }
}
