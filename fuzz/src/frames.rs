//! Properties of the interceptor for any bytes towards the kata agent. Nothing here makes a directory.

use agent_protocol_forwarder::kata::frame::{FrameError, HEADER, Header, RESPONSE, Scanner};
use agent_protocol_forwarder::kata::requests::{Out, Requests};
use bytes::Bytes;

/// Result of a stream: bytes that pass, in one piece, and requests that are held back.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Passed(Vec<u8>),
    Held(u32, Vec<u8>),
    Refused(u32, String),
}

/// Sends the stream in messages of this size.
fn run(stream: &[u8], step: usize) -> Result<(Vec<Outcome>, Requests), FrameError> {
    let mut requests = Requests::new(Some("/run/netns/podns".into()));
    let mut outcomes = Vec::new();
    for message in stream.chunks(step) {
        requests.take(Bytes::copy_from_slice(message), &mut |out| match out {
            Out::Pass(piece) => match outcomes.last_mut() {
                Some(Outcome::Passed(bytes)) => bytes.extend_from_slice(&piece),
                _ => outcomes.push(Outcome::Passed(piece.to_vec())),
            },
            Out::Hold(held) => {
                assert!(held.mounts.sources.iter().all(|source| source.is_absolute()));
                assert!(held.mounts.volumes.iter().all(|volume| held.mounts.sources.contains(volume)));
                outcomes.push(Outcome::Held(held.stream, held.frame.to_vec()));
            }
            Out::Refuse { stream, refusal } => {
                let reply = refusal.reply(stream);
                let header = header(&reply);
                assert_eq!((header.stream, header.kind), (stream, RESPONSE));
                assert_eq!(header.length + HEADER, reply.len());
                outcomes.push(Outcome::Refused(stream, refusal.to_string()));
            }
        })?;
    }
    Ok((outcomes, requests))
}

fn header(frame: &[u8]) -> Header {
    let header = frame.first_chunk().expect("a frame has a header");
    Header::parse(*header).expect("a frame of ours is not too long")
}

/// The first byte decides how the rest, a stream of frames, is split into messages.
pub(crate) fn exercise(data: &[u8]) {
    let Some((step, stream)) = data.split_first() else { return };
    let split = run(stream, usize::from(*step).max(1));
    let (outcomes, requests) = match (run(stream, stream.len().max(1)), split) {
        (Ok((whole, requests)), Ok((split, _))) => {
            assert_eq!(whole, split, "it matters how frames are split into messages");
            (whole, requests)
        }
        (Err(whole), Err(split)) => return assert_eq!(whole, split),
        (whole, split) => panic!("only one is an error: {:?}, {:?}", whole.err(), split.err()),
    };
    let mut scanner = Scanner::default();
    for outcome in &outcomes {
        match outcome {
            Outcome::Passed(bytes) => {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (used, _) = scanner.advance(rest).expect("what passes is frames");
                    rest = &rest[used..];
                }
            }
            Outcome::Held(stream, frame) => {
                assert!(scanner.at_boundary());
                assert_eq!(header(frame).stream, *stream);
                assert_eq!(header(frame).length + HEADER, frame.len());
            }
            Outcome::Refused(..) => assert!(scanner.at_boundary()),
        }
    }
    // After a complete stream no bytes remain.
    if requests.end().is_ok() {
        assert!(scanner.at_boundary());
    }
}
