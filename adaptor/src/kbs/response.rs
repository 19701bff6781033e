//! A response of the KBS: its status, its error, and how long it asks to wait.

use std::fmt;
use std::time::{Duration, SystemTime};

use reqwest::header::{CONTENT_TYPE, DATE, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode};

use super::KbsError;
use super::error_body::ErrorBody;
use super::verdict::{Advice, Verdict, verdict};

/// The longest error body that is read, in bytes. Errors are short, and other bodies are not needed.
const BODY_MAX: usize = 8 * 1024;
/// A difference of the clocks from which on it may be why a token is refused. Trustee allows a minute or more.
const CLOCK_SKEW_MIN: Duration = Duration::from_secs(50);

/// Status and error of a response.
pub(super) struct KbsResponse {
    method: Method,
    status: StatusCode,
    error: ErrorBody,
    /// How long the KBS asks to wait.
    pub(super) retry_after: Option<Duration>,
    /// How far the KBS's clock is from ours; `None` if it does not say, or our clock is before 1970.
    skew: Option<Skew>,
    admin: bool,
}

/// The KBS's clock, compared with ours.
enum Skew {
    Ahead(Duration),
    Behind(Duration),
}

impl KbsResponse {
    /// Reads the response to a request of this method; `admin` says whether an admin token was sent with it.
    pub(super) async fn read(mut response: Response, method: Method, admin: bool) -> Self {
        let status = response.status();
        let headers = response.headers();
        let html =
            header(headers, CONTENT_TYPE).is_some_and(|kind| kind.trim_start().starts_with("text/html"));
        let now = SystemTime::now();
        let date = header(headers, DATE).and_then(|text| httpdate::parse_http_date(text).ok());
        let retry_after =
            header(headers, RETRY_AFTER).and_then(|text| wait_asked_for(text, date.unwrap_or(now)));
        let skew = date.map(|date| match date.duration_since(now) {
            Ok(ahead) => Skew::Ahead(ahead),
            Err(behind) => Skew::Behind(behind.duration()),
        });
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
        Self { method, status, error: ErrorBody::read(&body, html), retry_after, skew, admin }
    }

    pub(super) fn verdict(&self) -> Verdict {
        verdict(&self.method, self.status, &self.error)
    }

    /// The error for a response that a retry does not help.
    pub(super) fn refusal(&self, path: &str, advice: Advice) -> KbsError {
        KbsError::Refused {
            path: path.to_owned(),
            method: self.method.clone(),
            response: self.to_string(),
            advice: self.advice(advice),
        }
    }

    /// The text of the advice, with its separator; empty if none fits.
    pub(super) fn advice(&self, advice: Advice) -> String {
        let text = match advice {
            Advice::Admin if !self.admin => Advice::NoAdmin.text().to_owned(),
            Advice::Admin => self.admin_advice(),
            other => other.text().to_owned(),
        };
        if text.is_empty() { text } else { format!("; {text}") }
    }

    /// Why an admin token that was sent is refused. The texts are those of Trustee's `kbs/src/admin/error.rs`.
    fn admin_advice(&self) -> String {
        let (detail, skew) = (self.error.detail(), self.skew.as_ref());
        if detail.contains("endpoints disabled") {
            return "the KBS takes no admin at all: configure one in its [admin] section".to_owned();
        }
        if detail.contains("Auth Bearer header") {
            return "an admin token was sent and did not arrive: check that no proxy removes the header Authorization"
                .to_owned();
        }
        match skew {
            Some(Skew::Ahead(by)) if *by >= CLOCK_SKEW_MIN => {
                format!("the KBS's clock is {} s ahead of this node's: check both clocks", by.as_secs())
            }
            Some(Skew::Behind(by)) if *by >= CLOCK_SKEW_MIN => {
                format!("the KBS's clock is {} s behind this node's: check both clocks", by.as_secs())
            }
            _ if self.error.variant().is_empty() => {
                "this is not Trustee's answer: check --kbs-url, and whether a proxy in front of the KBS wants a login"
                    .to_owned()
            }
            skew => {
                let clocks = if skew.is_none() { ", and both clocks" } else { "" };
                format!(
                    "the KBS rejects the admin token: check that --kbs-admin-key is the private half of a key it \
                     trusts, that --kbs-admin-issuer and --kbs-admin-role are what it expects, that it asks for no \
                     audience{clocks}"
                )
            }
        }
    }
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The value of `Retry-After` (RFC 9110, 10.2.3): seconds, or a date, which is compared with the server's own clock.
/// `None` if it is neither or the date is past.
fn wait_asked_for(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More seconds than fit are still a long time.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    httpdate::parse_http_date(text).ok()?.duration_since(now).ok()
}

impl fmt::Display for KbsResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.status.as_u16(), self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let wait = |text| wait_asked_for(text, now).map(|wait| wait.as_secs());
        assert_eq!(wait("0"), Some(0));
        assert_eq!(wait(" 120 "), Some(120));
        assert_eq!(wait("99999999999999999999999"), Some(u64::MAX));
        assert_eq!(wait("Sun, 06 Nov 1994 08:50:37 GMT"), Some(60));
        assert_eq!(wait("Sunday, 06-Nov-94 08:49:47 GMT"), Some(10));
        for bad in ["", "-1", "+5", "1.5", "soon", "Sun, 06 Nov 1994 08:49:00 GMT"] {
            assert_eq!(wait(bad), None, "{bad}");
        }
    }
}
