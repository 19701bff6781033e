//! Registers that can only be extended.

use sha2::{Digest, Sha256, Sha384};

use crate::event::Event;

/// Value of `pcr` in a TPM's SHA-256 bank after these events.
pub fn pcr(pcr: u8, events: &[Event]) -> [u8; 32] {
    events.iter().filter(|event| event.pcr == pcr).fold([0; 32], |value, event| {
        Sha256::new().chain_update(value).chain_update(event.digests.sha256).finalize().into()
    })
}

/// Value of TDX's RTMR 2 after these events: those of PCR 9 to 15, in their order. The firmware would put PCR 8 there as well, but
/// `process-user-data`, the only one that extends it, does so in a TPM alone.
pub fn rtmr2(events: &[Event]) -> [u8; 48] {
    events.iter().filter(|event| (9..=15).contains(&event.pcr)).fold([0; 48], |value, event| {
        Sha384::new().chain_update(value).chain_update(event.digests.sha384).finalize().into()
    })
}

/// Lower-case hex digits of bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{hex, pcr, rtmr2};
    use crate::event::Event;

    #[test]
    fn a_register_without_events_is_zero() {
        let events = [Event::separator(4)];
        assert_eq!(pcr(12, &events), [0; 32]);
        assert_eq!(rtmr2(&events), [0; 48]);
    }

    #[test]
    fn an_extended_register_is_the_digest_of_both() {
        // PCR 4 of a machine whose firmware found nothing to boot: a separator only.
        let value = hex(&pcr(4, &[Event::separator(4)]));
        assert_eq!(value, "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969");
    }
}
