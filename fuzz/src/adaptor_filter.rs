//! The adaptor's filter of KBS requests, without the rest of that crate, whose dependencies would be built for fuzzing.

#[path = "../../adaptor/src/transport/kbs_filter/head.rs"]
mod head;
#[path = "../../adaptor/src/transport/kbs_filter/requests.rs"]
mod requests;

use bytes::Bytes;

/// As `kbs_filter::filtered` of the adaptor.
pub(crate) fn filtered(messages: Vec<Bytes>) -> (Vec<u8>, bool) {
    let (mut requests, mut received, mut refused) = (requests::Requests::default(), Vec::new(), false);
    for message in messages {
        refused |= requests.on_message(message, &mut |piece| received.extend_from_slice(&piece)).is_err();
    }
    assert_eq!(requests.is_refused(), refused);
    (received, refused)
}
