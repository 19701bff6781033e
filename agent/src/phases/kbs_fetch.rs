//! Fetches a KBS resource from `api-server-rest`, which serves them inside the VM.
//!
//! One GET on one connection, over HTTP/1.0, so that the answer is not chunked. The caller limits the time
//! (`limits::KEY_FETCH`: one fetch is a whole attestation), this module limits the memory.

use secure_comms_protocol::limits::KEY_MAX;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

/// The longest head of an answer, in bytes.
const HEAD_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;
/// Bytes of the body that an error quotes.
const EXCERPT: usize = 200;

/// Why a resource could not be fetched.
#[derive(Debug, thiserror::Error)]
#[error("fetching {path} from api-server-rest: {fault}")]
pub struct FetchError {
    path: String,
    fault: Fault,
}

/// The fault of a fetch.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The path is not `<repository>/<type>/<tag>`.
    #[error("not a resource path; expected <repository>/<type>/<tag>")]
    Path,
    /// The connection failed.
    #[error("{0}; check that api-server-rest runs in the pod's network namespace")]
    Io(#[from] std::io::Error),
    /// The answer is not HTTP.
    #[error("the answer is not HTTP ({0}); check what listens on its port")]
    Malformed(String),
    /// The answer is too long.
    #[error("the {0} of the answer is longer than {1} bytes; check the resource in the KBS")]
    TooLong(&'static str, usize),
    /// The connection ended within the body.
    #[error("the answer was cut short after {0} of {1} bytes; retrying")]
    Truncated(usize, usize),
    /// The connection ended before the answer began or its head was complete.
    #[error("the connection closed before the answer's head was complete; see the log of api-server-rest")]
    NoHead,
    /// A status other than 200.
    #[error(
        "status {status}{}; check that the KBS has the resource and that its policy allows this VM",
        quote(body)
    )]
    Status {
        /// HTTP status.
        status: u16,
        /// Beginning of the body, escaped.
        body: String,
    },
}

fn quote(body: &str) -> String {
    if body.is_empty() { String::new() } else { format!(": {body}") }
}

impl FetchError {
    /// The fault.
    pub fn fault(&self) -> &Fault {
        &self.fault
    }
}

/// Fetches the resource at `path` over `stream`, a fresh connection to `api-server-rest`.
///
/// # Errors
/// Every answer other than status 200 with a complete body of at most `limits::KEY_MAX` bytes.
pub async fn fetch<S>(stream: S, path: &str) -> Result<Zeroizing<Vec<u8>>, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    get(stream, path).await.map_err(|fault| FetchError { path: excerpt(path.as_bytes()), fault })
}

async fn get<S>(mut stream: S, path: &str) -> Result<Zeroizing<Vec<u8>>, Fault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let part_ok = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(allowed);
    if path.split('/').count() != 3 || !path.split('/').all(part_ok) {
        return Err(Fault::Path);
    }
    let request =
        format!("GET /cdh/resource/{path} HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    // Sized first: the body is a key, and a buffer that grows leaves copies of it behind.
    let mut answer = Zeroizing::new(Vec::with_capacity(HEAD_MAX + KEY_MAX + 1));
    let head = read_head(&mut stream, &mut answer).await?;
    let wanted = if head.status == 200 { head.length } else { None };
    if wanted.is_some_and(|length| length > KEY_MAX) {
        return Err(Fault::TooLong("body", KEY_MAX));
    }
    let end = head.end + wanted.unwrap_or(if head.status == 200 { KEY_MAX + 1 } else { EXCERPT });
    read_to(&mut stream, &mut answer, end).await?;
    let body = answer.get(head.end..answer.len().min(end)).unwrap_or_default();
    if head.status != 200 {
        return Err(Fault::Status { status: head.status, body: excerpt(body) });
    }
    match wanted {
        Some(length) if body.len() < length => Err(Fault::Truncated(body.len(), length)),
        None if body.len() > KEY_MAX => Err(Fault::TooLong("body", KEY_MAX)),
        _ => Ok(Zeroizing::new(body.to_vec())),
    }
}

/// Reads until `buffer` holds `end` bytes, or until the stream ends.
async fn read_to<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    end: usize,
) -> Result<(), Fault> {
    while buffer.len() < end {
        let missing = (end - buffer.len()) as u64;
        if stream.take(missing).read_buf(buffer).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// The parts of an answer's head that matter here.
struct Head {
    status: u16,
    length: Option<usize>,
    /// Offset of the body.
    end: usize,
}

async fn read_head<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> Result<Head, Fault> {
    loop {
        let room = HEAD_MAX.saturating_sub(buffer.len());
        if room == 0 {
            return Err(Fault::TooLong("head", HEAD_MAX));
        }
        if stream.take(room as u64).read_buf(buffer).await? == 0 {
            return Err(Fault::NoHead);
        }
        if let Some(head) = parse_head(buffer)? {
            return Ok(head);
        }
    }
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).map_err(|error| Fault::Malformed(error.to_string()))?;
    let httparse::Status::Complete(end) = parsed else { return Ok(None) };
    let status = response.code.unwrap_or_default();
    let mut length = None;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Fault::Malformed("it has a Transfer-Encoding, which HTTP/1.0 does not know".into()));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = content_length(header.value)?;
            if length.is_some_and(|length| length != value) {
                return Err(Fault::Malformed("it has two values for Content-Length".into()));
            }
            length = Some(value);
        }
    }
    Ok(Some(Head { status, length, end }))
}

/// RFC 9110 8.6: digits, nothing else.
fn content_length(value: &[u8]) -> Result<usize, Fault> {
    let digits = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|c| c.is_ascii_digit()));
    let length = digits.and_then(|text| text.parse().ok());
    length.ok_or_else(|| Fault::Malformed(format!("Content-Length '{}'", excerpt(value))))
}

fn excerpt(bytes: &[u8]) -> String {
    let bytes = bytes.get(..EXCERPT).unwrap_or(bytes);
    bytes.trim_ascii().escape_ascii().to_string()
}

#[cfg(test)]
#[path = "kbs_fetch_tests.rs"]
mod tests;
