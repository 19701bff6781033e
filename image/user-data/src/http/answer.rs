//! Reads an answer: its head, and a body whose end is known by a length, by chunks or by the end of the connection.

use super::HttpError;
use super::connection::Source;

/// Limit of a body in bytes: what the most generous cloud stores (GCP).
pub const BODY_LIMIT: usize = 256 * 1024;
/// Limit of the bytes before the body, those of interim answers included.
const HEAD_LIMIT: usize = 16 * 1024;
/// Limit of headers.
const HEADERS_LIMIT: usize = 64;
/// Limit of what a chunked body may need more than its content: sizes, extensions, trailers.
const CHUNK_OVERHEAD_LIMIT: usize = 64 * 1024;

/// What a service answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 200 to 299, or 400 and above.
    pub status: u16,
    /// Empty if the status is neither 200 nor 201.
    pub body: Vec<u8>,
}

/// Reads one answer.
///
/// # Errors
/// As [`super::request`], except those of connecting.
pub fn read_answer(source: &mut impl Source) -> Result<Answer, HttpError> {
    let mut input = Input { source, bytes: Vec::new(), at: 0 };
    let head = final_head(&mut input)?;
    match head.status {
        300..=399 => return Err(HttpError::Redirect(head.status)),
        200 | 201 => {}
        _ => return Ok(Answer { status: head.status, body: Vec::new() }),
    }
    if head.encoded {
        return Err(HttpError::ContentEncoding);
    }
    let body = match head.end {
        End::Length(length) => by_length(&mut input, length)?,
        End::Chunks => by_chunks(&mut input)?,
        End::Connection => until_closed(&mut input)?,
    };
    Ok(Answer { status: head.status, body })
}

/// What came, and how much of it was looked at.
struct Input<'a, S> {
    source: &'a mut S,
    bytes: Vec<u8>,
    at: usize,
}

impl<S: Source> Input<'_, S> {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Waits for more; false at the end of the connection.
    fn more(&mut self) -> Result<bool, HttpError> {
        let mut buffer = [0; 4096];
        let length = self.source.receive(&mut buffer)?;
        self.bytes.extend_from_slice(buffer.get(..length).unwrap_or_default());
        Ok(length > 0)
    }
}

/// How the end of a body is known.
enum End {
    Length(usize),
    Chunks,
    Connection,
}

struct Head {
    status: u16,
    encoded: bool,
    end: End,
}

/// The head of the answer itself; interim ones (100 and the like) are skipped.
fn final_head(input: &mut Input<'_, impl Source>) -> Result<Head, HttpError> {
    loop {
        let parsed = parse_head(input.rest())?;
        match parsed {
            Some((head, length)) => {
                input.at += length;
                match head.status {
                    101 => return Err(HttpError::Refused("a switch of protocols")),
                    100..=199 => {}
                    200..=999 => return Ok(head),
                    _ => return Err(HttpError::Refused("the status")),
                }
            }
            None if input.bytes.len() > HEAD_LIMIT => {
                return Err(HttpError::TooLong { what: "head of the answer", limit: HEAD_LIMIT });
            }
            None if !input.more()? => return Err(HttpError::Cut("before the answer's head was complete")),
            None => {}
        }
    }
}

/// The head that `bytes` begin with, and its length; `None` if it is not complete.
fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = response.parse(bytes).map_err(HttpError::Malformed)? else {
        return Ok(None);
    };
    let mut head = Head { status: response.code.unwrap_or_default(), encoded: false, end: End::Connection };
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("Content-Encoding") {
            head.encoded |= !header.value.trim_ascii().eq_ignore_ascii_case(b"identity");
        } else if header.name.eq_ignore_ascii_case("Content-Length") {
            let length = decimal(header.value).ok_or(HttpError::Refused("the value of Content-Length"))?;
            head.end = only_one(&head.end, End::Length(length))?;
        } else if header.name.eq_ignore_ascii_case("Transfer-Encoding") {
            // HTTP/1.0 does not have it: one reader takes the chunks, another their sizes too (RFC 9112 section 6.1).
            if response.version != Some(1) {
                return Err(HttpError::Refused("a Transfer-Encoding in HTTP/1.0"));
            }
            if !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return Err(HttpError::Refused("a Transfer-Encoding other than chunked"));
            }
            head.end = only_one(&head.end, End::Chunks)?;
        }
    }
    Ok(Some((head, length)))
}

/// Two statements about the end would let two readers see different bodies.
fn only_one(before: &End, end: End) -> Result<End, HttpError> {
    match before {
        End::Connection => Ok(end),
        End::Length(_) | End::Chunks => Err(HttpError::Refused("a second statement of the body's length")),
    }
}

fn decimal(value: &[u8]) -> Option<usize> {
    let value = std::str::from_utf8(value.trim_ascii()).ok()?;
    if value.bytes().all(|byte| byte.is_ascii_digit()) { value.parse().ok() } else { None }
}

const TOO_LONG: HttpError = HttpError::TooLong { what: "body", limit: BODY_LIMIT };

fn by_length(input: &mut Input<'_, impl Source>, length: usize) -> Result<Vec<u8>, HttpError> {
    if length > BODY_LIMIT {
        return Err(TOO_LONG);
    }
    loop {
        if let Some(body) = input.rest().get(..length) {
            return Ok(body.to_vec());
        }
        if !input.more()? {
            return Err(HttpError::Cut("before the body had its Content-Length"));
        }
    }
}

fn until_closed(input: &mut Input<'_, impl Source>) -> Result<Vec<u8>, HttpError> {
    loop {
        if input.rest().len() > BODY_LIMIT {
            return Err(TOO_LONG);
        }
        if !input.more()? {
            return Ok(input.rest().to_vec());
        }
    }
}

/// The end of the body is its last chunk, of size 0; trailers are not waited for.
fn by_chunks(input: &mut Input<'_, impl Source>) -> Result<Vec<u8>, HttpError> {
    let (mut body, start) = (Vec::new(), input.at);
    loop {
        if input.at - start > body.len() + CHUNK_OVERHEAD_LIMIT
            || input.rest().len() > BODY_LIMIT + CHUNK_OVERHEAD_LIMIT
        {
            return Err(HttpError::TooLong {
                what: "framing of the chunked body",
                limit: CHUNK_OVERHEAD_LIMIT,
            });
        }
        let parsed = httparse::parse_chunk_size(input.rest());
        let size = match parsed.map_err(|_| HttpError::Refused("a chunk's size"))? {
            httparse::Status::Partial => {
                chunk_needs_more(input)?;
                continue;
            }
            httparse::Status::Complete((length, size)) => {
                let line = input.rest().get(..length).and_then(|line| line.strip_suffix(b"\r\n"));
                if !line.is_some_and(is_chunk_line) {
                    return Err(HttpError::Refused("a chunk's size"));
                }
                input.at += length;
                size
            }
        };
        if size == 0 {
            return Ok(body);
        }
        let size = usize::try_from(size)
            .ok()
            .filter(|size| body.len().saturating_add(*size) <= BODY_LIMIT)
            .ok_or(TOO_LONG)?;
        loop {
            if let Some(chunk) = input.rest().get(..size + 2) {
                let (content, end) = chunk.split_at(size);
                if end != b"\r\n" {
                    return Err(HttpError::Refused("a chunk without its end"));
                }
                body.extend_from_slice(content);
                break;
            }
            chunk_needs_more(input)?;
        }
        input.at += size + 2;
    }
}

/// httparse takes a line without a digit for the last chunk, which cuts the body, and a line break for a part of an extension.
fn is_chunk_line(line: &[u8]) -> bool {
    line.first().is_some_and(u8::is_ascii_hexdigit) && !line.contains(&b'\n')
}

fn chunk_needs_more(input: &mut Input<'_, impl Source>) -> Result<(), HttpError> {
    if input.more()? { Ok(()) } else { Err(HttpError::Cut("before the last chunk of the body")) }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
