//! The one reader of private keys: Ed25519 in PEM, OpenSSH (PROTOCOL.key) or PKCS#8 (RFC 8410), not encrypted.

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use ssh_key::private::{Ed25519Keypair, Ed25519PrivateKey, KeypairData};
use ssh_key::public::KeyData;
use ssh_key::{Algorithm, Error as SshKeyError, PrivateKey};
use zeroize::Zeroizing;

use crate::error::{KeyError, PrivateKeyFault, checked_text, scrubbed};
use crate::pem::Pem;

/// The fault of a file whose two halves differ.
const OTHER_HALF: &str = "its public half belongs to another key";

/// Makes a key from the operating system's randomness.
pub(crate) fn generate() -> Result<PrivateKey, KeyError> {
    let mut seed = Zeroizing::new([0; Ed25519PrivateKey::BYTE_SIZE]);
    getrandom::fill(seed.as_mut()).map_err(|error| KeyError::Random(error.to_string()))?;
    Ok(from_seed(&seed))
}

fn from_seed(seed: &[u8; Ed25519PrivateKey::BYTE_SIZE]) -> PrivateKey {
    PrivateKey::from(Ed25519Keypair::from_seed(seed))
}

/// Reads a private key. A comment in it is dropped.
pub(crate) fn parse(pem: &[u8]) -> Result<PrivateKey, PrivateKeyFault> {
    // An error names only labels that are listed here: in a damaged text the key itself may stand in a label's place.
    let text = checked_text(pem)?;
    let pem = Pem::find(&text)?;
    match pem.label {
        "OPENSSH PRIVATE KEY" => parse_openssh(&pem.decode()?),
        "PRIVATE KEY" => parse_pkcs8(&pem.decode()?),
        "ENCRYPTED PRIVATE KEY" => Err(PrivateKeyFault::Encrypted),
        label @ ("RSA PRIVATE KEY" | "EC PRIVATE KEY" | "DSA PRIVATE KEY") => {
            Err(PrivateKeyFault::NotEd25519(format!("a '{label}'")))
        }
        _ => Err(PrivateKeyFault::NotPrivateKey("a PEM text of another label")),
    }
}

fn parse_pkcs8(der: &[u8]) -> Result<PrivateKey, PrivateKeyFault> {
    // The decoder's error is dropped: it quotes the algorithm, which may be any bytes of a damaged key.
    if let Ok(key) = SigningKey::from_pkcs8_der(der) {
        return Ok(from_seed(key.as_bytes()));
    }
    let (seed, public) = explicit_public_key(der).ok_or(PrivateKeyFault::BadPkcs8)?;
    let key = from_seed(seed);
    match key.key_data() {
        KeypairData::Ed25519(pair) if &pair.public.0 == public => Ok(key),
        _ => Err(PrivateKeyFault::OtherHalf),
    }
}

/// The halves of a key as ring and rcgen write it: PKCS#8 version 2 whose public key has an explicit tag, where RFC 5958 has an
/// implicit one. There is one such encoding, byte for byte.
fn explicit_public_key(der: &[u8]) -> Option<(&[u8; 32], &[u8; 32])> {
    const HEAD: [u8; 16] = *b"\x30\x53\x02\x01\x01\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
    const BETWEEN: [u8; 5] = *b"\xa1\x23\x03\x21\x00";
    let (seed, rest) = der.strip_prefix(&HEAD)?.split_first_chunk()?;
    Some((seed, rest.strip_prefix(&BETWEEN)?.try_into().ok()?))
}

fn parse_openssh(bytes: &[u8]) -> Result<PrivateKey, PrivateKeyFault> {
    let bad = |error: SshKeyError| PrivateKeyFault::BadOpenSsh(scrubbed(&error));
    let key = PrivateKey::from_bytes(bytes).map_err(bad)?;
    if key.is_encrypted() {
        return Err(PrivateKeyFault::Encrypted);
    }
    let KeypairData::Ed25519(pair) = key.key_data() else {
        return Err(PrivateKeyFault::NotEd25519(match key.algorithm() {
            // Its name is any bytes of the file.
            Algorithm::Other(_) => "a key of another type".to_owned(),
            known => format!("a key of type {known}"),
        }));
    };
    // The file holds both halves. A signature by halves that differ would give the private one away.
    let sound = from_seed(pair.private.as_ref());
    if sound.public_key().key_data() != &KeyData::Ed25519(pair.public) {
        return Err(PrivateKeyFault::BadOpenSsh(OTHER_HALF.to_owned()));
    }
    Ok(sound)
}

#[cfg(test)]
#[path = "private_key_tests.rs"]
mod tests;
