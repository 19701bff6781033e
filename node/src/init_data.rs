//! Reads init-data, the text that a pod's VM is started with, and computes the digest that the VM's evidence binds.
//!
//! In: a file, as an operator has it: the TOML itself, or base64 of its gzip, as cloud-api-adaptor takes it (`INITDATA`).
//! Out: an [`InitDataDigest`] over the raw bytes of the TOML. Only the digest counts, so the text is not interpreted
//! further.

mod pod_name;
mod policy;
pub mod rules;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use base64ct::{Base64, Encoding};
use flate2::read::MultiGzDecoder;
use secure_comms_protocol::InitDataDigest;
use sha2::{Digest, Sha256, Sha384, Sha512};

pub use self::pod_name::PodName;
pub use self::policy::InitDataPolicy;

/// The largest file that is read, and the largest TOML in it, in bytes.
pub(crate) const FILE_MAX: u64 = 1 << 20;
/// How gzip begins (RFC 1952 2.3.1).
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// A file or text is not init-data, with its fault and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InitDataError(String);

fn fault(text: impl Into<String>) -> InitDataError {
    InitDataError(text.into())
}

/// The digest of the init-data in a file.
///
/// # Errors
/// The file cannot be read, is larger than 1 MiB, or is not init-data.
pub fn digest_of_file(path: &Path) -> Result<InitDataDigest, InitDataError> {
    digest(&read(path)?)
}

/// Reads a file of at most 1 MiB.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, InitDataError> {
    let file = File::open(path).map_err(|error| fault(error.to_string()))?;
    limited(file).map_err(|error| fault(error.to_string()))
}

fn limited(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > FILE_MAX) {
        return Err(io::Error::other("longer than 1 MiB"));
    }
    Ok(bytes)
}

/// The digest of init-data.
///
/// # Errors
/// It is neither TOML nor base64 of the gzip of TOML, or its `algorithm` is not one.
pub fn digest(text: &[u8]) -> Result<InitDataDigest, InitDataError> {
    let unpacked = unpack(text)?;
    let toml = unpacked.as_deref().unwrap_or(text);
    let digest = match algorithm(toml)?.as_str() {
        "sha256" => hex(&Sha256::digest(toml)),
        "sha384" => hex(&Sha384::digest(toml)),
        "sha512" => hex(&Sha512::digest(toml)),
        _ => return Err(fault("its algorithm is not sha256, sha384 or sha512")),
    };
    digest.parse().map_err(|error| fault(format!("{error}")))
}

/// The TOML of base64 of gzip; `None` if the text is not base64, and so the TOML itself.
fn unpack(text: &[u8]) -> Result<Option<Vec<u8>>, InitDataError> {
    let packed: Vec<u8> = text.iter().copied().filter(|byte| !b"\r\n".contains(byte)).collect();
    let Some(gzip) = std::str::from_utf8(&packed).ok().and_then(|packed| Base64::decode_vec(packed).ok())
    else {
        return Ok(None);
    };
    if gzip.is_empty() {
        return Err(fault("it is empty"));
    }
    if !gzip.starts_with(&GZIP) {
        return Err(fault(
            "base64 of something that is not gzip: expected TOML, or base64 of the gzip of TOML",
        ));
    }
    let toml = limited(MultiGzDecoder::new(gzip.as_slice()));
    toml.map(Some).map_err(|error| fault(format!("base64 of damaged gzip: {error}")))
}

/// The name of the digest. Other spellings of the key are refused: one reader would take them for it, and another not.
fn algorithm(toml: &[u8]) -> Result<String, InitDataError> {
    let not_toml = "expected TOML, or base64 of the gzip of TOML";
    let text = std::str::from_utf8(toml).map_err(|_| fault(format!("not UTF-8: {not_toml}")))?;
    let table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| fault(format!("{}: {not_toml}", error.message())))?;
    let keys: Vec<&String> = table.keys().filter(|key| key.eq_ignore_ascii_case("algorithm")).collect();
    if keys.iter().any(|key| *key != "algorithm") {
        return Err(fault("a key of it spells algorithm with capitals: write it in lower case"));
    }
    let algorithm = table.get("algorithm").and_then(toml::Value::as_str);
    algorithm
        .map(str::to_owned)
        .ok_or_else(|| fault("it has no algorithm: expected algorithm = \"sha256\" on top"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    /// Made by cloud-api-adaptor, with the digests that its `process-user-data` computed.
    const VECTORS: [(&str, &str); 5] = [
        (include_str!("../testdata/v1/initdata"), include_str!("../testdata/v1/initdata.digest")),
        (include_str!("../testdata/v2/initdata"), include_str!("../testdata/v2/initdata.digest")),
        (include_str!("../testdata/v3/initdata"), include_str!("../testdata/v3/initdata.digest")),
        (include_str!("../testdata/v4/initdata"), include_str!("../testdata/v4/initdata.digest")),
        (include_str!("../testdata/v5/initdata"), include_str!("../testdata/v5/initdata.digest")),
    ];

    fn packed(toml: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(toml).unwrap();
        gzip.finish().unwrap()
    }

    fn error(text: &[u8]) -> String {
        digest(text).unwrap_err().to_string()
    }

    #[test]
    fn the_digest_is_the_one_that_the_guest_computes() {
        for (initdata, expected) in VECTORS {
            let expected: InitDataDigest = expected.parse().unwrap();
            assert_eq!(digest(initdata.as_bytes()).unwrap(), expected);
            let toml = unpack(initdata.as_bytes()).unwrap().unwrap();
            assert_eq!(digest(&toml).unwrap(), expected, "the TOML itself");
            let wrapped: Vec<&str> =
                initdata.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
            assert_eq!(digest((wrapped.join("\r\n") + "\n").as_bytes()).unwrap(), expected, "wrapped");
        }
    }

    #[test]
    fn each_byte_of_the_text_counts() {
        let of = |toml: &str| digest(toml.as_bytes()).unwrap();
        let plain = of("algorithm = \"sha256\"\n");
        assert_ne!(of("algorithm = \"sha256\""), plain);
        assert_ne!(of("algorithm = \"sha256\"\r\n"), plain);
        assert_ne!(of("algorithm = \"sha256\"\n#\n"), plain);
    }

    #[test]
    fn what_a_guest_would_refuse_or_read_otherwise_is_refused() {
        for (text, expected) in [
            ("", "it is empty"),
            ("\n", "it is empty"),
            ("version = \"0.1.0\"\n", "it has no algorithm"),
            ("algorithm = 256\n", "it has no algorithm"),
            ("algorithm = \"SHA256\"\n", "not sha256, sha384 or sha512"),
            ("algorithm = \"sha1\"\n", "not sha256, sha384 or sha512"),
            ("Algorithm = \"sha256\"\n", "spells algorithm with capitals"),
            ("algorithm = \"sha256\"\nALGORITHM = \"sha512\"\n", "spells algorithm with capitals"),
            ("algorithm = \n", "expected TOML"),
            ("algorithm = \"sha256\"\nalgorithm = \"sha256\"\n", "expected TOML"),
            ("YWxnb3JpdGht", "not gzip"),
        ] {
            let error = error(text.as_bytes());
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        assert!(error(b"\xff\xfe").contains("not UTF-8"));
    }

    #[test]
    fn damaged_or_endless_gzip_is_refused() {
        let whole = packed(b"algorithm = \"sha256\"\n");
        let text = |bytes: &[u8]| Base64::encode_string(bytes).into_bytes();
        digest(&text(&whole)).unwrap();
        for end in 2..whole.len() {
            assert!(error(&text(&whole[..end])).contains("damaged gzip"), "cut at {end}");
        }
        assert!(error(&text(&[&whole[..], b"x"].concat())).contains("damaged gzip"));
        let bomb = packed(&vec![b'#'; 2 << 20]);
        assert!(error(&text(&bomb)).contains("longer than 1 MiB"));
    }
}
