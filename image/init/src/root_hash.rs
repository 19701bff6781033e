//! The root hash of a dm-verity tree, and the partitions that it names.

use std::fmt;

/// SHA-256 of the top of the hash tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RootHash([u8; 32]);

/// The text is not a root hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a root hash has 64 hex digits (SHA-256)")]
pub struct BadRootHash;

impl RootHash {
    /// Reads exactly 64 hex digits of either case.
    ///
    /// # Errors
    /// The text is anything else.
    pub fn parse(text: &str) -> Result<Self, BadRootHash> {
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(BadRootHash) };
        if pairs.len() != 32 {
            return Err(BadRootHash);
        }
        let digit =
            |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok()).ok_or(BadRootHash);
        let mut hash = [0; 32];
        for (to, [high, low]) in hash.iter_mut().zip(pairs) {
            *to = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(Self(hash))
    }

    /// UUID of the partition with the data: the first half (Discoverable Partitions Specification, "Root Verity").
    pub fn data_partition(&self) -> Uuid {
        self.half(0)
    }

    /// UUID of the partition with the hash tree: the second half.
    pub fn hash_partition(&self) -> Uuid {
        self.half(16)
    }

    fn half(&self, from: usize) -> Uuid {
        let mut uuid = [0; 16];
        for (to, byte) in uuid.iter_mut().zip(self.0.iter().skip(from)) {
            *to = *byte;
        }
        Uuid(uuid)
    }
}

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A UUID, its bytes in the order of the text form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Uuid([u8; 16]);

impl Uuid {
    /// Reads a UUID of a GPT entry, where the first three fields are little-endian (UEFI specification, appendix A).
    pub fn from_gpt(disk: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = disk;
        let [i, j, k, l, m, n, o, p] = rest;
        Self([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{RootHash, Uuid};
    use proptest::prelude::*;

    const HASH: &str = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210";

    #[test]
    fn the_halves_of_a_root_hash_name_the_partitions() {
        let hash = RootHash::parse(HASH).unwrap();
        assert_eq!(hash.data_partition().to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(hash.hash_partition().to_string(), "01234567-89ab-cdef-fedc-ba9876543210");
    }

    #[test]
    fn a_gpt_entry_has_three_little_endian_fields() {
        let disk =
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        assert_eq!(Uuid::from_gpt(disk), RootHash::parse(HASH).unwrap().data_partition());
    }

    #[test]
    fn anything_but_64_hex_digits_is_refused() {
        for bad in [
            "",
            "00",
            &HASH[1..],
            &format!("{HASH}00"),
            &format!("{}g", &HASH[1..]),
            &format!("+{}", &HASH[1..]),
        ] {
            assert!(RootHash::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_parsed_is_written_the_same(text in "[0-9a-fA-F]{64}") {
            prop_assert_eq!(RootHash::parse(&text).unwrap().to_string(), text.to_lowercase());
        }

        #[test]
        fn no_text_upsets_it(text in ".{0,80}") {
            prop_assert_eq!(RootHash::parse(&text).is_ok(),
                text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }
}
