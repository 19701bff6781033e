//! Fetches a KBS resource from `api-server-rest`, which serves them inside the VM.
//!
//! One GET on one connection, over HTTP/1.0, so that the answer is not chunked. The caller limits the time
//! (`limits::KEY_FETCH`: one fetch is a whole attestation), this module limits the memory.

use std::io;

use secure_comms_keys::text::escape;
use secure_comms_protocol::limits::{KEY_FETCH, KEY_MAX};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

/// The longest head of an answer, in bytes, with the interim heads before it.
const HEAD_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;
/// Interim answers (1xx) that are skipped.
const INTERIM_MAX: usize = 8;
/// Length in bytes to which an error cuts a part of a path: "pp-" and eight digits of a pod id.
const PART_MAX: usize = 20;
const PART_CUT: usize = 11;

/// Why a resource could not be fetched: the cause, what to do, and the resource.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault} ({resource})")]
pub struct FetchError {
    resource: String,
    fault: Fault,
}

/// The fault of a fetch.
///
/// Any part of an answer may be the private key, and an error's text reaches the log and an unproven peer. So a fault is
/// `Copy`: it has no place for bytes of an answer, only for its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The path is not `<repository>/<type>/<tag>`.
    #[error("this is not a resource path; expected <repository>/<type>/<tag>")]
    Path,
    /// The connection failed.
    #[error(
        "the connection to api-server-rest failed: {0}; check that it runs in the pod's network namespace"
    )]
    Connection(io::ErrorKind),
    /// The answer did not come in time.
    #[error("no answer from api-server-rest within {} s; see its log in the VM", KEY_FETCH.as_secs())]
    TimedOut,
    /// The answer is not HTTP.
    #[error("the answer in place of api-server-rest's is not HTTP ({0}); check what listens on its port")]
    NotHttp(httparse::Error),
    /// The answer's head breaks a rule of HTTP.
    #[error("the answer in place of api-server-rest's is not HTTP/1.0 ({0}); check what listens on its port")]
    Head(&'static str),
    /// The answer is too long.
    #[error("the {0} of api-server-rest's answer is longer than {1} bytes; check the resource in the KBS")]
    TooLong(&'static str, usize),
    /// The connection ended within the body.
    #[error("api-server-rest's answer was cut short after {0} bytes; see its log in the VM")]
    Truncated(usize),
    /// The connection ended before the answer began or its head was complete.
    #[error(
        "api-server-rest closed the connection before its answer's head was complete; see its log in the VM"
    )]
    NoHead,
    /// A status other than 200.
    #[error(
        "api-server-rest answered with status {0}; check that the KBS has the resource and that its policy allows this VM"
    )]
    Status(u16),
}

impl From<io::Error> for Fault {
    /// Keeps the kind only: an error may wrap any text.
    fn from(error: io::Error) -> Self {
        Self::Connection(error.kind())
    }
}

impl FetchError {
    /// The error of fetching the resource at `path`.
    pub fn new(path: &str, fault: Fault) -> Self {
        Self { resource: shortened(path), fault }
    }

    /// The fault.
    pub fn fault(&self) -> Fault {
        self.fault
    }
}

/// The path with its long parts cut: an operator sees few bytes of an error, and a pod id may have 64.
fn shortened(path: &str) -> String {
    let short = |part: &str| match part.get(..PART_CUT) {
        Some(beginning) if part.len() > PART_MAX => format!("{beginning}..."),
        _ => part.to_owned(),
    };
    escape(&path.split('/').map(short).collect::<Vec<_>>().join("/"))
}

/// Fetches the resource at `path` over `stream`, a fresh connection to `api-server-rest`.
///
/// # Errors
/// Every answer other than status 200 with a complete body of at most `limits::KEY_MAX` bytes.
pub async fn fetch<S>(stream: S, path: &str) -> Result<Zeroizing<Vec<u8>>, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    get(stream, path).await.map_err(|fault| FetchError::new(path, fault))
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
    if head.status != 200 {
        return Err(Fault::Status(head.status));
    }
    if head.length.is_some_and(|length| length > KEY_MAX) {
        return Err(Fault::TooLong("body", KEY_MAX));
    }
    let end = head.end + head.length.unwrap_or(KEY_MAX + 1);
    read_to(&mut stream, &mut answer, end).await?;
    let body = answer.get(head.end..answer.len().min(end)).unwrap_or_default();
    match head.length {
        Some(length) if body.len() < length => Err(Fault::Truncated(body.len())),
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

/// Reads the head of the answer, and skips the interim answers before it (RFC 9110 15.2).
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> Result<Head, Fault> {
    let (mut begin, mut interim) = (0, 0);
    loop {
        while let Some(head) = parse_head(buffer.get(begin..).unwrap_or_default())? {
            begin += head.end;
            if !head.is_interim() {
                return Ok(Head { end: begin, ..head });
            }
            interim += 1;
            if interim > INTERIM_MAX {
                return Err(Fault::Head("interim answers without an end"));
            }
        }
        let room = HEAD_MAX.saturating_sub(buffer.len());
        if room == 0 {
            return Err(Fault::TooLong("head", HEAD_MAX));
        }
        if stream.take(room as u64).read_buf(buffer).await? == 0 {
            return Err(Fault::NoHead);
        }
    }
}

impl Head {
    /// 101 is no interim answer: the protocol changes after it.
    fn is_interim(&self) -> bool {
        matches!(self.status, 100 | 102..=199)
    }
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).map_err(Fault::NotHttp)?;
    let httparse::Status::Complete(end) = parsed else { return Ok(None) };
    let status = response.code.filter(|code| (100..=599).contains(code));
    let status = status.ok_or(Fault::Head("its status is none of HTTP's"))?;
    let mut length = None;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Fault::Head("it has a Transfer-Encoding"));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = content_length(header.value)?;
            if length.is_some_and(|length| length != value) {
                return Err(Fault::Head("it has two values for Content-Length"));
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
    length.ok_or(Fault::Head("its Content-Length is not a length"))
}

#[cfg(test)]
#[path = "kbs_fetch_tests.rs"]
mod tests;
