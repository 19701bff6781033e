//! Properties of the reader of TLS hellos for any bytes of a client.

use std::collections::BTreeSet;

use rustls_pki_types::DnsName;

use super::hello::{HelloReader, MAX_HELLO};
use super::refusal::Refusal;

/// How the reading of a stream ends.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// A hello, for this server.
    Hello(String),
    Refused(Refusal, Vec<u8>),
    WantsMore,
}

/// Type of a TLS record with handshake messages, and the length of a record's head.
const HANDSHAKE: u8 = 22;
const RECORD_HEAD: usize = 5;

/// The first byte decides how the rest is split.
pub(crate) fn exercise(data: &[u8]) {
    let Some((step, stream)) = data.split_first() else { return };
    let (verdict, used) = read(stream.chunks(stream.len().max(1)));
    let (in_pieces, _) = read(stream.chunks(usize::from(*step).max(1)));
    assert_eq!(verdict, in_pieces, "it matters how the bytes are split: {step}");
    assert!(used <= MAX_HELLO.min(stream.len()));
    match verdict {
        Verdict::Hello(name) => {
            assert!(DnsName::try_from(name.as_str()).is_ok(), "not a host name: {name:?}");
            assert_eq!(name, name.to_ascii_lowercase());
            let sent = messages(stream).to_ascii_lowercase();
            assert!(sent.windows(name.len()).any(|part| part == name.as_bytes()), "{name:?} was not sent");
        }
        Verdict::WantsMore => assert!(used == stream.len() && used < MAX_HELLO),
        Verdict::Refused(refusal, alert) => {
            let reasons = BTreeSet::from([
                Refusal::HelloTooLong,
                Refusal::NotTls,
                Refusal::TlsVersion,
                Refusal::BadHello,
                Refusal::NoServerName,
            ]);
            assert!(reasons.contains(&refusal), "{refusal:?}");
            assert_eq!(refusal == Refusal::NotTls, stream.first().is_some_and(|first| *first != HANDSHAKE));
            // Type, version, length and two bytes.
            assert!(alert.is_empty() || alert.len() == RECORD_HEAD + 2, "{alert:?} is not one alert");
        }
    }
}

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Verdict, usize) {
    let (mut reader, mut used) = (HelloReader::default(), 0);
    for piece in pieces {
        let mut rest = piece;
        while !rest.is_empty() {
            assert!(reader.room() > 0, "it wants more, and has no room");
            let (now, later) = rest.split_at(reader.room().min(rest.len()));
            (rest, used) = (later, used + now.len());
            match reader.take(now) {
                Ok(None) => {}
                Ok(Some(hello)) => return (Verdict::Hello(hello.server_name), used),
                Err(fault) => {
                    let lines = fault.detail.chars().filter(|c| c.is_control()).count();
                    assert!(
                        lines == 0 || fault.refusal != Refusal::NotTls,
                        "it forges a line: {:?}",
                        fault.detail
                    );
                    return (Verdict::Refused(fault.refusal, fault.alert), used);
                }
            }
        }
    }
    (Verdict::WantsMore, used)
}

/// What the records carry, without their heads.
fn messages(mut stream: &[u8]) -> Vec<u8> {
    let mut messages = Vec::new();
    while let Some((&[_, _, _, high, low], rest)) = stream.split_first_chunk::<RECORD_HEAD>() {
        let length = usize::from(u16::from_be_bytes([high, low])).min(rest.len());
        let (record, later) = rest.split_at(length);
        messages.extend_from_slice(record);
        stream = later;
    }
    messages
}
