//! Reads a request.

use std::io::{self, ErrorKind, Read};

/// Limit of a request in bytes.
const LIMIT: usize = 64 * 1024;

/// A request with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// As sent.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case, in the order of the request.
    pub headers: Vec<(String, String)>,
    /// As long as its Content-Length says.
    pub body: Vec<u8>,
}

impl Request {
    /// Reads one, byte by byte: what follows it stays unread.
    pub(super) fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            input.read_exact(&mut byte)?;
            head.extend_from_slice(&byte);
            if head.len() > LIMIT {
                return Err(malformed("the head is too long"));
            }
        }
        let text = String::from_utf8(head).map_err(|_| malformed("the head is no UTF-8"))?;
        let mut request = Self::parse(&text).ok_or_else(|| malformed("the head is malformed"))?;
        let length = request.header("content-length").unwrap_or("0").parse();
        let length: usize = length.map_err(|_| malformed("the length is no number"))?;
        if length > LIMIT {
            return Err(malformed("the body is too long"));
        }
        request.body = vec![0; length];
        input.read_exact(&mut request.body)?;
        Ok(request)
    }

    fn parse(head: &str) -> Option<Self> {
        let mut lines = head.trim_end().split("\r\n");
        let mut first = lines.next()?.split(' ');
        let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
        if first.next()? != "HTTP/1.1" {
            return None;
        }
        let header = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_ascii_lowercase(), value.to_owned()))
        };
        let headers = lines.map(header).collect::<Option<_>>()?;
        Some(Self { method, path, headers, body: Vec::new() })
    }

    /// The value of the first header of this name, given in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}
