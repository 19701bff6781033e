//! Properties of the reader of any answer in place of api-server-rest's.

use agent_protocol_forwarder::phases::kbs_fetch::{FetchError, fetch};
use secure_comms_protocol::limits::KEY_MAX;
use std::io;
use std::iter::repeat_n;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that are ever read of an answer: the longest head, and one byte more than the longest key.
const WANTED_MAX: usize = 16 * 1024 + KEY_MAX + 1;

/// An answer that arrives in pieces of this size, without delay.
struct Answer<'a> {
    data: &'a [u8],
    step: usize,
}

impl AsyncRead for Answer<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (piece, rest) = self.data.split_at(self.step.min(out.remaining()).min(self.data.len()));
        out.put_slice(piece);
        self.data = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Answer<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The first byte decides the size of pieces. A byte 0xff stands for many: a fuzzer does not reach the limits.
pub(crate) fn exercise(data: &[u8]) {
    let Some((step, rest)) = data.split_first() else { return };
    if rest.iter().filter(|byte| **byte == 0xff).count() > 9 {
        return;
    }
    let stretched = |byte: &u8| if *byte == 0xff { repeat_n(b'k', KEY_MAX / 4) } else { repeat_n(*byte, 1) };
    let answer: Vec<u8> = rest.iter().flat_map(stretched).collect();
    let (whole, used) = get(&answer, answer.len().max(1));
    assert!(used <= WANTED_MAX, "it read {used} bytes");
    // Each further piece makes the reader parse the head again.
    let least = if answer.len() > 4096 { 1024 } else { 1 };
    let (split, _) = get(&answer, usize::from(*step).max(least));
    assert_eq!(shown(&whole), shown(&split), "it matters in what pieces it comes");
    match whole {
        Ok(body) => {
            assert!(body.len() <= KEY_MAX);
            assert_eq!(Some(&*body), expected(&answer), "another body");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 2000 && !text.chars().any(char::is_control), "not for a log: {text:?}");
        }
    }
}

fn get(answer: &[u8], step: usize) -> (Result<Vec<u8>, FetchError>, usize) {
    let mut stream = Answer { data: answer, step };
    let fetched = pin!(fetch(&mut stream, "default/a/b")).poll(&mut Context::from_waker(Waker::noop()));
    let Poll::Ready(fetched) = fetched else { panic!("it waits, and nothing is missing") };
    (fetched.map(|body| body.to_vec()), answer.len() - stream.data.len())
}

fn shown(fetched: &Result<Vec<u8>, FetchError>) -> Result<&[u8], String> {
    fetched.as_deref().map_err(ToString::to_string)
}

/// The body of a valid answer, by a reader that implements RFC 9112 only for those.
fn expected(mut answer: &[u8]) -> Option<&[u8]> {
    loop {
        let begin = answer.iter().position(|byte| !b"\r\n".contains(byte))?;
        answer = &answer[begin..];
        // The reader skips interim answers: all 1xx but 101.
        let status = answer.get(8..)?.trim_ascii_start();
        if !status.starts_with(b"1") || status.starts_with(b"101") {
            return final_body(answer);
        }
        let ends = |window: &&[u8]| window.ends_with(b"\n\n") || window.ends_with(b"\n\r\n");
        let end = (1..=answer.len()).find(|end| ends(&&answer[..*end]))?;
        answer = &answer[end..];
    }
}

fn final_body(answer: &[u8]) -> Option<&[u8]> {
    let mut length = None;
    let mut rest = answer;
    for number in 0.. {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]).to_ascii_lowercase();
        rest = &rest[end + 1..];
        if line.is_empty() {
            break;
        }
        if number == 0 {
            assert!(
                line.starts_with(b"http/1.") && line[8..].trim_ascii().starts_with(b"200"),
                "no status 200"
            );
        }
        assert!(!line.starts_with(b"transfer-encoding:"), "it is chunked");
        if let Some(value) = line.strip_prefix(b"content-length:") {
            let value = std::str::from_utf8(value).ok()?.trim().parse::<usize>().ok()?;
            assert!(length.is_none_or(|length| length == value), "it has two lengths");
            length = Some(value);
        }
    }
    rest.get(..length.unwrap_or(rest.len()))
}
