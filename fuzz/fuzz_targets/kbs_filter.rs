//! Requests of an unproven agent to the KBS, as the adaptor filters them.
#![no_main]

#[path = "../src/kbs_filter.rs"]
mod kbs_filter;

mod filter {
    #[path = "../../../adaptor/src/transport/kbs_filter/head.rs"]
    mod head;
    #[path = "../../../adaptor/src/transport/kbs_filter/requests.rs"]
    mod requests;

    use bytes::Bytes;

    /// As `kbs_filter::filtered` of the adaptor, whose other dependencies would be fuzzed along.
    pub(super) fn filtered(messages: Vec<Bytes>) -> (Vec<u8>, bool) {
        let (mut requests, mut received, mut refused) = (requests::Requests::default(), Vec::new(), false);
        for message in messages {
            refused |= requests.on_message(message, &mut |piece| received.extend_from_slice(&piece)).is_err();
        }
        (received, refused)
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| kbs_filter::exercise(data, filter::filtered));
