//! Properties of the adaptor's filter of KBS requests for any bytes of an unproven agent.

use bytes::Bytes;

/// How the requests that may pass begin.
const ALLOWED: [&[u8]; 3] = [b"POST /kbs/v0/auth", b"POST /kbs/v0/attest", b"GET /kbs/v0/resource/"];
/// The first byte of a TLS record with a handshake message: TLS passes unread.
const TLS: u8 = 22;

/// The first byte decides how the rest is split. `filtered` returns what passes, and whether a request was refused.
pub(crate) fn exercise(data: &[u8], filtered: impl Fn(Vec<Bytes>) -> (Vec<u8>, bool)) {
    let Some((step, stream)) = data.split_first() else { return };
    let (passed, refused) = filtered(vec![Bytes::copy_from_slice(stream)]);
    assert!(stream.starts_with(&passed), "only what was sent passes, in its order");
    let pieces = stream.chunks(usize::from(*step).max(1)).map(Bytes::copy_from_slice).collect();
    assert_eq!(filtered(pieces), (passed.clone(), refused), "it matters how the bytes are split: {step}");
    if refused {
        let more = vec![
            Bytes::copy_from_slice(stream),
            Bytes::from_static(b"GET /kbs/v0/resource/a/b/c HTTP/1.1\r\n\r\n"),
        ];
        assert_eq!(filtered(more), (passed.clone(), true), "something passes after a refusal");
    }
    if passed.first().is_some_and(|first| *first != TLS) {
        assert!(ALLOWED.iter().any(|allowed| passed.starts_with(allowed)), "another request passes");
    }
}
