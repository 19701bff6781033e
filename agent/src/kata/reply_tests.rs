use std::io;
use std::path::PathBuf;
use std::time::Duration;

use prost::Message;

use super::RequestRefusal;
use crate::kata::frame::{HEADER, Header};
use crate::kata::messages::{Response, Status};
use crate::kata::protobuf::Malformed;

/// The refusal, as a ttrpc client decodes it.
fn heard(refusal: &RequestRefusal) -> Status {
    let frame = refusal.reply(0x0a0b_0c0d);
    let header = Header::parse(frame[..HEADER].try_into().unwrap()).unwrap();
    assert_eq!(header, Header { length: frame.len() - HEADER, stream: 0x0a0b_0c0d, kind: 2, flags: 0 });
    let response = Response::decode(&frame[HEADER..]).unwrap();
    assert!(response.payload.is_empty());
    response.status.unwrap()
}

#[test]
fn refusals_have_a_code_and_say_why() {
    let failed = || io::Error::from(io::ErrorKind::PermissionDenied);
    for (refusal, code, part) in [
        (RequestRefusal::Malformed(Malformed::Truncated), 3, "it ends within a field; check"),
        (RequestRefusal::Malformed(Malformed::Repeated("OCI")), 3, "it has several 'OCI', and decoders"),
        (
            RequestRefusal::Volume { path: "/v".into(), waited: Duration::from_millis(9960) },
            4,
            "the volume /v: nothing was mounted there within 10.0 s",
        ),
        (
            RequestRefusal::Sources(Duration::from_secs(10)),
            4,
            "not done within 10.0 s; check the file systems",
        ),
        (RequestRefusal::TimedOut, 4, "its timeout has ended"),
        (RequestRefusal::FrameTooLong(5), 8, "a frame of 5 bytes: ttrpc allows 4194304"),
        (RequestRefusal::AnswerTooLong(5), 8, "the kata agent's frame of 5 bytes: ttrpc allows 4194304"),
        (RequestRefusal::TooLong(5), 8, "the request of 5 bytes becomes longer than the 4194304"),
        (RequestRefusal::TooMany, 8, "64 requests, or 8388608 bytes of them"),
        (
            RequestRefusal::Source { path: "/s".into(), source: failed() },
            9,
            "making /s, the source of a bind mount",
        ),
        (RequestRefusal::Mounts(failed()), 13, "permission denied"),
    ] {
        let Status { code: heard, message } = heard(&refusal);
        assert_eq!(heard, code, "{message}");
        assert!(message.contains(part), "{message}");
    }
    let short = RequestRefusal::TooMany.short_reply(7);
    let Status { code, message } = Response::decode(&short[HEADER..]).unwrap().status.unwrap();
    assert_eq!((code, message.as_str(), short[7]), (8, "", 7));
    assert!(short.len() < 32, "{}", short.len());
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let path = PathBuf::from("/é".repeat(1000));
    let message = heard(&RequestRefusal::Volume { path, waited: Duration::ZERO }).message;
    assert!((1021..=1024).contains(&message.len()), "{}", message.len());
}
