//! Init-data: base64 of gzip of a TOML document, whose digest the VM's evidence has.
//!
//! Other programs read the same TOML, so what two readers could understand differently is refused: keys count as exact strings,
//! every value is a string, and nothing is nested.

mod error;
mod gzip;
mod toml;

use base64ct::{Base64, Encoding};
use sha2::{Digest, Sha256, Sha384, Sha512};

pub use error::{InitDataError, TomlFault};
use toml::Entry;

use crate::files::{DIRECTORY, FileName, InitData, SkipReason, Skipped};

/// The longest TOML, in bytes.
pub const TOML_MAX: usize = 1024 * 1024;

/// The init-data of a pod that brings none, as cloud-api-adaptor's programs write them: an empty aa.toml and nothing else.
pub const DUMMY: &str = "H4sIAAAAAAAA/0rMSc8vyizJyFWwVVAqzkg0MjVT4ipLLSrOzM8DCRnoGeoZKHFxRackliTGciklJuqV5OfmKCnYKqir\
                         q3Opq6sDAgAA//8lc7IOQgAAAA==";
const DUMMY_TOML: &str = "algorithm = \"sha256\"\nversion = \"0.1.0\"\n\n[data]\n\"aa.toml\" = '''\n'''";
const DUMMY_DIGEST: &str = "adb48cc14fea9403d3d51f3b5f5068fd4d80445a14e94f1b3d5dbabaad66478d";

/// What [`DUMMY`] says.
pub fn dummy() -> InitData {
    InitData {
        toml: DUMMY_TOML.as_bytes().to_vec(),
        digest: DUMMY_DIGEST.to_owned(),
        files: vec![(FileName::AttestationAgent, Vec::new())],
        skipped: Vec::new(),
    }
}

/// Decodes init-data: standard base64 with padding, in which CR and LF are skipped.
///
/// # Errors
/// The first fault. No text holds a byte of the input.
pub fn decode(base64: &[u8]) -> Result<InitData, InitDataError> {
    let toml = gzip::inflate(&from_base64(base64)?, TOML_MAX)?;
    let document = toml::read(&toml)?;
    let required =
        |key| document.top.iter().find(|entry| entry.key == key).ok_or(InitDataError::Missing(key));
    let algorithm = required("algorithm")?;
    let version = required("version")?;
    if !is_known_version(&version.value) {
        return Err(InitDataError::Version { line: version.line });
    }
    let digest = digest(&algorithm.value, &toml).ok_or(InitDataError::Algorithm { line: algorithm.line })?;
    let mut init_data = InitData { digest, files: Vec::new(), skipped: Vec::new(), toml: Vec::new() };
    for Entry { key, line, .. } in &document.top {
        match key.as_str() {
            "algorithm" | "version" => {}
            key if ["algorithm", "version", "data"].iter().any(|known| key.eq_ignore_ascii_case(known)) => {
                return Err(InitDataError::Doubtful { line: *line });
            }
            _ => init_data.skipped.push(Skipped { line: *line, reason: SkipReason::Key }),
        }
    }
    for Entry { key, line, value } in document.data {
        match file(&key) {
            Some(Ok(name)) => init_data.files.push((name, value.into_bytes())),
            Some(Err(Doubtful)) => return Err(InitDataError::Doubtful { line }),
            None => init_data.skipped.push(Skipped { line, reason: SkipReason::File }),
        }
    }
    Ok(InitData { toml, ..init_data })
}

fn from_base64(text: &[u8]) -> Result<Vec<u8>, InitDataError> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !b"\r\n".contains(byte)).collect();
    if text.is_empty() {
        return Err(InitDataError::Empty);
    }
    let decoded = std::str::from_utf8(&text).ok().and_then(|text| Base64::decode_vec(text).ok());
    let is_cut = !text.len().is_multiple_of(4)
        && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(byte));
    decoded.ok_or(if is_cut { InitDataError::CutBase64 } else { InitDataError::Base64 })
}

/// The first version and its corrections.
fn is_known_version(version: &str) -> bool {
    let patch = version.strip_prefix("0.1.").unwrap_or_default();
    let is_canonical = patch == "0" || !patch.starts_with('0');
    (1..=3).contains(&patch.len()) && patch.bytes().all(|digit| digit.is_ascii_digit()) && is_canonical
}

fn digest(algorithm: &str, toml: &[u8]) -> Option<String> {
    match algorithm {
        "sha256" => Some(hex(&Sha256::digest(toml))),
        "sha384" => Some(hex(&Sha384::digest(toml))),
        "sha512" => Some(hex(&Sha512::digest(toml))),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

/// A key that another reader takes for the name of a file.
struct Doubtful;

/// The file of a key in `[data]`; none if the VM does not take it.
fn file(key: &str) -> Option<Result<FileName, Doubtful>> {
    let known = FileName::INIT_DATA;
    if let Some(name) = known.into_iter().find(|name| name.as_str() == key) {
        return Some(Ok(name));
    }
    // The original cleans paths: `./cdh.toml`, `x/../cdh.toml` and `cdh.toml/x/..` are cdh.toml to it.
    let last = key.trim().trim_end_matches(['/', '.']).rsplit('/').next().unwrap_or(key);
    let cleaned = clean(key);
    let is_like =
        |name: &FileName| [last, &cleaned].iter().any(|key| name.as_str().eq_ignore_ascii_case(key));
    known.iter().any(is_like).then_some(Err(Doubtful))
}

/// What is left of a path in [`DIRECTORY`] without its `.` and `..`, relative to that folder if it is in there.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = DIRECTORY.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let whole = format!("/{}", parts.join("/"));
    whole.strip_prefix(DIRECTORY).map_or(whole.clone(), |rest| rest.trim_start_matches('/').to_owned())
}

#[cfg(test)]
#[path = "init_data_tests.rs"]
mod tests;
