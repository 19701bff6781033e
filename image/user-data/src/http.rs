//! A client for the few HTTP/1.1 requests to a cloud's metadata service: one request per connection, to a literal address.
//!
//! It follows no redirect, asks no resolver and no proxy, and accepts no content encoding: the service needs none of them, and each would
//! let another server answer.

mod answer;
mod connection;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

pub use answer::{Answer, BODY_LIMIT, read_answer};
use connection::Connection;
pub use connection::Source;

/// A request; what it holds comes from this program, except values that [`is_header_value`] has accepted.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// `GET`, `PUT` or `POST`.
    pub method: &'static str,
    /// Where it is sent.
    pub address: SocketAddr,
    /// The value of its header `Host`.
    pub host: &'a str,
    /// Path and query, from the first `/`.
    pub path: &'a str,
    /// Headers other than `Host`, `Connection`, `User-Agent` and `Content-Length`.
    pub headers: &'a [(&'a str, &'a str)],
    /// Empty for none. A POST or PUT states its length in any case.
    pub body: &'a [u8],
}

/// How long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Until the connection is there.
    pub connect: Duration,
    /// From then on until the answer is complete; bytes that arrive do not extend it.
    pub answer: Duration,
    /// For both together.
    pub total: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let (connect, answer) = (Duration::from_secs(5), Duration::from_secs(10));
        Self { connect, answer, total: connect + answer }
    }
}

impl Limits {
    /// These, but no longer than `time` in total.
    #[must_use]
    pub fn within(self, time: Duration) -> Self {
        Self { connect: self.connect.min(time), answer: self.answer, total: self.total.min(time) }
    }
}

/// Why there is no answer. No text of it holds anything that the service sent.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Refused, no route, no address of its own, and the like.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// Nothing answers at the address.
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    /// The answer was not complete in time.
    #[error("the answer is not complete in time")]
    AnswerTimeout,
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// The connection was closed before the answer was complete.
    #[error("the connection was closed {0}")]
    Cut(&'static str),
    /// Redirects are not followed.
    #[error("a redirect (status {0}), which is not followed")]
    Redirect(u16),
    /// What came is not HTTP/1.
    #[error("what came is no HTTP answer: {0}")]
    Malformed(httparse::Error),
    /// HTTP that says two things, or has parts that no metadata service uses.
    #[error("{0} is refused")]
    Refused(&'static str),
    /// More than the limit; permanent.
    #[error("the {what} is longer than {limit} bytes")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// In bytes.
        limit: usize,
    },
    /// Its body is encoded; permanent.
    #[error("the body has a content encoding, which is refused")]
    ContentEncoding,
}

impl HttpError {
    /// Whether the next try will fare no better: the service is there, and answers something that is refused.
    #[must_use]
    pub const fn is_permanent(&self) -> bool {
        matches!(self, Self::TooLong { .. } | Self::ContentEncoding)
    }
}

/// Sends `request` and reads the answer, of whatever status but a redirect. A body is read only of 200 and 201: the others end with
/// their head, so that a status is reported even if the service never sends what it announced.
///
/// # Errors
/// If there is no complete answer within `limits`, or one that is refused.
pub fn request(request: &Request<'_>, limits: Limits) -> Result<Answer, HttpError> {
    let mut connection = Connection::open(request.address, limits)?;
    connection.send(&head(request))?;
    connection.send(request.body)?;
    read_answer(&mut connection)
}

fn head(request: &Request<'_>) -> Vec<u8> {
    let mut head = format!("{} {} HTTP/1.1\r\nHost: {}\r\n", request.method, request.path, request.host);
    for (name, value) in request.headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    if request.method != "GET" {
        head.push_str(&format!("Content-Length: {}\r\n", request.body.len()));
    }
    head.push_str("User-Agent: process-user-data\r\nConnection: close\r\n\r\n");
    head.into_bytes()
}

/// Whether `value` can be sent as a header's value: 1 to 1024 visible ASCII characters, so that it can't end the header.
#[must_use]
pub fn is_header_value(value: &[u8]) -> bool {
    (1..=1024).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request<'a>(method: &'static str, body: &'a [u8]) -> Request<'a> {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        Request { method, address, host: "host", path: "/a?b=c", headers: &[("X-Token", "abc")], body }
    }

    #[test]
    fn a_get_states_no_length() {
        let expected = "GET /a?b=c HTTP/1.1\r\nHost: host\r\nX-Token: abc\r\nUser-Agent: process-user-data\r\nConnection: close\r\n\r\n";
        assert_eq!(String::from_utf8(head(&request("GET", b""))).unwrap(), expected);
    }

    #[test]
    fn a_put_states_the_length_of_nothing() {
        let head = String::from_utf8(head(&request("PUT", b""))).unwrap();
        assert!(head.contains("\r\nContent-Length: 0\r\n"), "{head}");
    }

    #[test]
    fn a_token_cannot_end_its_header() {
        assert!(is_header_value(b"TOK-abc=="));
        for value in [&b""[..], b"a b", b"a\r\nX: y", b"a\n", b"\xc3\xa9", &[b'a'; 1025]] {
            assert!(!is_header_value(value), "{value:?}");
        }
    }
}
