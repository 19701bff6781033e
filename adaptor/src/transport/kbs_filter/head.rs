//! The head of one HTTP/1 request, read more strictly than a server has to: what two readers could understand differently
//! is refused.

use std::fmt;

/// Longest head. Tokens of attestation services take some KiB.
pub(super) const HEAD_MAX: usize = 64 * 1024;
/// Most header fields.
const FIELDS_MAX: usize = 64;
/// Longest body: the evidence of several devices takes some MiB.
pub(super) const BODY_MAX: u64 = 16 * 1024 * 1024;

/// What follows an accepted head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// This number of bytes.
    Length(u64),
    Chunked,
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is not one of the requests that an attesting agent makes.
    NotAllowed,
    /// It is too long.
    TooLong,
    /// It asks for another protocol.
    Upgrade,
    /// It pretends to be another request or to come from another client.
    Override,
    /// The length of its body is not clear.
    Length,
    /// It is not plain HTTP/1.
    NotHttp,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAllowed => {
                "only POST /kbs/v0/auth, POST /kbs/v0/attest and GET /kbs/v0/resource/... may pass"
            }
            Self::TooLong => "it is too long",
            Self::Upgrade => "it asks for another protocol",
            Self::Override => "it has a header that stands for another request or client",
            Self::Length => "the length of its body is not clear",
            Self::NotHttp => "it is not a plain HTTP/1 request",
        })
    }
}

/// Reads a head: everything up to and with the empty line, in which lines end with CR LF and no byte is a NUL.
pub(super) fn read(head: &[u8]) -> Result<Body, Fault> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Fault::TooLong),
        _ => return Err(Fault::NotHttp),
    }
    let is_post = match (request.method, request.path) {
        (Some("POST"), Some("/kbs/v0/auth" | "/kbs/v0/attest")) => true,
        (Some("GET"), Some(path)) if is_resource(path) => false,
        _ => return Err(Fault::NotAllowed),
    };
    let body = read_fields(request.headers, request.version == Some(1))?;
    match body {
        Body::Length(length) if length > BODY_MAX => Err(Fault::TooLong),
        Body::Length(0) => Ok(body),
        // A server may ignore the body of a GET, and take it for the next request.
        _ if !is_post => Err(Fault::Length),
        body => Ok(body),
    }
}

/// `/kbs/v0/resource/[<repository>/]<type>/<tag>`, with nothing that a server or a proxy could rewrite.
fn is_resource(path: &str) -> bool {
    let Some(resource) = path.strip_prefix("/kbs/v0/resource/") else { return false };
    let is_plain = |segment: &str| {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        !segment.is_empty() && !segment.starts_with('.') && segment.bytes().all(allowed)
    };
    (2..=3).contains(&resource.split('/').count()) && resource.split('/').all(is_plain)
}

fn read_fields(fields: &[httparse::Header<'_>], is_http_1_1: bool) -> Result<Body, Fault> {
    let (mut length, mut chunked, mut hosts) = (None, false, 0);
    for field in fields {
        // Some servers take one for the other.
        let name = field.name.to_ascii_lowercase().replace('_', "-");
        let value = std::str::from_utf8(field.value).map_err(|_| Fault::NotHttp)?.trim_matches([' ', '\t']);
        match name.as_str() {
            _ if field.name.contains('_') && is_framing(&name) => return Err(Fault::Length),
            // A second one, even of the same value: readers differ in which they take.
            "content-length" if length.is_some() => return Err(Fault::Length),
            "content-length" => length = Some(decimal(value)?),
            "transfer-encoding" => {
                if chunked || !is_http_1_1 || !value.eq_ignore_ascii_case("chunked") {
                    return Err(Fault::Length);
                }
                chunked = true;
            }
            "host" => hosts += 1,
            "upgrade" | "http2-settings" => return Err(Fault::Upgrade),
            "connection" | "proxy-connection" => {
                let allowed = |option: &str| matches!(option.trim(), "keep-alive" | "close");
                if !value.to_ascii_lowercase().split(',').all(allowed) {
                    return Err(Fault::Upgrade);
                }
            }
            "expect" if !value.eq_ignore_ascii_case("100-continue") => return Err(Fault::NotHttp),
            name if is_override(name) => return Err(Fault::Override),
            _ => {}
        }
    }
    match (length, chunked) {
        _ if hosts > 1 => Err(Fault::Override),
        (Some(_), true) => Err(Fault::Length),
        (_, true) => Ok(Body::Chunked),
        (length, false) => Ok(Body::Length(length.unwrap_or(0))),
    }
}

fn is_framing(name: &str) -> bool {
    matches!(name, "content-length" | "transfer-encoding" | "host" | "connection" | "upgrade")
}

/// Headers by which a proxy or a server takes the request for another one, or for one of another client.
fn is_override(name: &str) -> bool {
    let prefixes = ["x-forwarded", "x-original", "x-rewrite", "x-http-method", "x-method", "x-override"];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
        || matches!(name, "forwarded" | "x-real-ip" | "x-client-ip" | "true-client-ip" | "via" | "trailer")
}

fn decimal(text: &str) -> Result<u64, Fault> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return Err(Fault::Length);
    }
    // More digits than fit are more bytes than may pass.
    text.parse().map_err(|_| Fault::TooLong)
}
