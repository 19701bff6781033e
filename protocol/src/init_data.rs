//! The digest that binds a VM to the init-data it was started with.

use alloc::string::String;
use core::fmt;
use core::str::FromStr;

/// Hex digits that name a pod's keys in the KBS: those of a SHA-256, and the beginning of a longer digest. The launch
/// registers of some TEEs have room for no more (SEV-SNP's `HOST_DATA` has 32 bytes).
const DIGITS: usize = 64;
/// Lengths of SHA-256, SHA-384 and SHA-512, in hex digits.
const LENGTHS: [usize; 3] = [DIGITS, 96, 128];

/// The first 32 bytes of the digest of a VM's init-data, in lower-case hex.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct InitDataDigest(String);

/// A text is not the digest of init-data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitDataDigestError;

impl fmt::Display for InitDataDigestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not a digest of init-data: expected 64, 96 or 128 hex digits (SHA-256, SHA-384 or SHA-512)",
        )
    }
}

impl core::error::Error for InitDataDigestError {}

impl InitDataDigest {
    /// The 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InitDataDigest {
    type Err = InitDataDigestError;

    /// Reads a whole digest, with digits in either case, and keeps its first 64.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all_hex = text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let digits = text.get(..DIGITS).filter(|_| all_hex && LENGTHS.contains(&text.len()));
        digits.map(|digits| Self(digits.to_ascii_lowercase())).ok_or(InitDataDigestError)
    }
}

impl fmt::Display for InitDataDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for InitDataDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InitDataDigest({self})")
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn the_first_64_digits_of_a_whole_digest_count() {
        let digits = "0123456789abcdefABCDEF0123456789abcdefABCDEF0123456789abcdefABCD".repeat(2);
        for length in LENGTHS {
            let digest: InitDataDigest = digits[..length].parse().unwrap();
            assert_eq!(digest.to_string(), digits[..64].to_ascii_lowercase());
            assert_eq!(digest.to_string().parse(), Ok(digest));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let digits = "0".repeat(200);
        for length in (0..200).filter(|length| !LENGTHS.contains(length)) {
            assert_eq!(digits[..length].parse::<InitDataDigest>(), Err(InitDataDigestError), "{length}");
        }
        for odd in ["g", " ", "\n", "é", "/"] {
            let text = "0".repeat(64 - odd.len()) + odd;
            assert_eq!(text.parse::<InitDataDigest>(), Err(InitDataDigestError), "{text:?}");
        }
    }
}
