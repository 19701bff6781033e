//! What `process-user-data` measures of init-data, into PCR 8.

use sha2::{Digest, Sha256, Sha384, Sha512};

use crate::event::{Digests, Event};
use crate::register::hex;

/// Init-data, or a digest, that can't be predicted from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadInitData {
    /// No line that names an algorithm.
    #[error(
        "no line algorithm = \"sha256\", \"sha384\" or \"sha512\" before its first table: give the digest instead"
    )]
    Algorithm,
    /// Not a digest.
    #[error("not a digest: 64, 96 or 128 hex digits")]
    Digest,
}

/// The digest of init-data as the evidence has it: lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitDataDigest(String);

impl InitDataDigest {
    /// The digest of `toml`, by the algorithm that it names.
    ///
    /// # Errors
    /// If it names none.
    pub fn of(toml: &[u8]) -> Result<Self, BadInitData> {
        let text = std::str::from_utf8(toml).map_err(|_| BadInitData::Algorithm)?;
        let mut root = text.lines().map(str::trim).take_while(|line| !line.starts_with('['));
        let algorithm = root.find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == "algorithm").then(|| value.split('#').next().unwrap_or_default().trim())
        });
        let digest = match algorithm.map(|value| value.trim_matches(['"', '\''])) {
            Some("sha256") => Sha256::digest(toml).to_vec(),
            Some("sha384") => Sha384::digest(toml).to_vec(),
            Some("sha512") => Sha512::digest(toml).to_vec(),
            _ => return Err(BadInitData::Algorithm),
        };
        Ok(Self(hex(&digest)))
    }

    /// A digest in hex.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> Result<Self, BadInitData> {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !digits || !matches!(text.len(), 64 | 96 | 128) {
            return Err(BadInitData::Digest);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// The event: the register is extended by the first 32 bytes of the digest, as they are.
    ///
    /// # Errors
    /// Never for a digest of this type.
    pub fn event(&self) -> Result<Event, BadInitData> {
        let mut sha256 = [0; 32];
        for (byte, digits) in sha256.iter_mut().zip(self.0.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| BadInitData::Digest)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| BadInitData::Digest)?;
        }
        // Of a TPM only, so without a SHA-384 digest: the evidence of TDX carries init-data in MRCONFIGID, and RTMR 2 takes nothing of
        // PCR 8.
        Ok(Event {
            pcr: 8,
            what: "the digest of init-data".to_owned(),
            digests: Digests { sha256, sha384: [0; 48] },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{BadInitData, InitDataDigest};
    use crate::register::{hex, pcr, rtmr2};

    #[test]
    fn the_digest_is_by_the_algorithm_that_init_data_name() {
        let toml = |algorithm: &str| {
            format!("version = \"0.1.0\"\nalgorithm = {algorithm} # why\n[data]\nalgorithm = \"no\"\n")
        };
        for (name, digits) in [("\"sha256\"", 64), ("'sha384'", 96), ("\"sha512\"", 128)] {
            assert_eq!(InitDataDigest::of(toml(name).as_bytes()).unwrap().0.len(), digits, "{name}");
        }
        assert_eq!(InitDataDigest::of(toml("\"md5\"").as_bytes()), Err(BadInitData::Algorithm));
        assert_eq!(InitDataDigest::of(b"[data]\nalgorithm = \"sha256\"\n"), Err(BadInitData::Algorithm));
    }

    #[test]
    fn the_register_takes_the_first_half_of_a_long_digest() {
        // By coreutils: { head -c 32 /dev/zero; head -c 32 /dev/zero | tr '\\0' '\\253'; } | sha256sum
        let expected = "debb3e7acfff6dd18d501042273629f0b79cb206bb8c24f59f62ddb80849403b";
        for digits in [64, 96, 128] {
            let text = format!("{}{}", "AB".repeat(32), "00".repeat(digits / 2 - 32));
            let event = InitDataDigest::parse(&text).unwrap().event().unwrap();
            assert_eq!(hex(&pcr(8, &[event])), expected);
        }
    }

    #[test]
    fn init_data_leave_rtmr_2_as_it_is() {
        let event = InitDataDigest::parse(&"ab".repeat(32)).unwrap().event().unwrap();
        assert_eq!(rtmr2(&[event]), [0; 48]);
    }

    #[test]
    fn other_texts_are_no_digests() {
        for text in ["", "ab", &"g".repeat(64), &"a".repeat(65), &"a".repeat(32)] {
            assert_eq!(InitDataDigest::parse(text), Err(BadInitData::Digest), "{text}");
        }
    }
}
