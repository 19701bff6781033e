use base64ct::{Base64, Encoding};
use ed25519_dalek::pkcs8::EncodePrivateKey;
use proptest::prelude::*;
use secure_comms_protocol::limits::KEY_MAX;
use ssh_key::{LineEnding, PublicKey};

use super::*;

const ED25519: &str = include_str!("../testdata/ed25519.openssh");
const ED25519_PUBLIC: &str = include_str!("../testdata/ed25519.pub");
const PKCS8: &str = include_str!("../testdata/ed25519.pkcs8");

fn fault(pem: &[u8]) -> String {
    parse(pem).unwrap_err().to_string()
}

#[test]
fn a_key_is_read_from_openssh_and_pkcs8_pem() {
    let key = parse(ED25519.as_bytes()).unwrap();
    assert_eq!(key.public_key().key_data(), PublicKey::from_openssh(ED25519_PUBLIC).unwrap().key_data());
    let windows = format!("\r\n{}\r\n", ED25519.replace('\n', "\r\n"));
    assert_eq!(parse(windows.as_bytes()).unwrap().public_key(), key.public_key());
    let pkcs8 = parse(PKCS8.as_bytes()).unwrap();
    let theirs = SigningKey::from_pkcs8_pem(PKCS8).unwrap();
    assert_eq!(pkcs8.public_key().key_data().ed25519().unwrap().0, theirs.verifying_key().to_bytes());
    let version_2 = theirs.to_pkcs8_pem(Default::default()).unwrap();
    assert_eq!(parse(version_2.as_bytes()).unwrap().public_key(), pkcs8.public_key(), "with the public key");
}

#[test]
fn other_texts_are_refused_with_the_reason() {
    for (pem, part) in [
        ("", "it is empty"),
        (" \n\t\n", "it is empty"),
        ("garbage", "not PEM"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "bad OpenSSH key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "bad PEM: no '-----END OPENSSH PRIVATE KEY-----' line"),
        ("-----BEGIN OPENSSH PRIVATE KEY", "bad PEM: a cut '-----BEGIN' line"),
        ("-----BEGIN PRIVATE KEY-----\n%\n-----END PRIVATE KEY-----\n", "bad PEM: not base64"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not an Ed25519 key in PKCS#8"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n",
            "'RSA PRIVATE KEY' is not",
        ),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "'PUBLIC KEY' is not a private key"),
        (include_str!("../testdata/rsa.openssh"), "a key of type ssh-rsa is not an Ed25519 key"),
        (include_str!("../testdata/ecdsa.openssh"), "ecdsa-sha2-nistp256 is not an Ed25519 key"),
        (include_str!("../testdata/ecdsa.pkcs8"), "not an Ed25519 key in PKCS#8"),
        (include_str!("../testdata/encrypted.openssh"), "it is encrypted"),
        (include_str!("../testdata/encrypted.pkcs8"), "it is encrypted"),
        (&"x".repeat(KEY_MAX + 1), "longer than 65536 bytes"),
    ] {
        let text = fault(pem.as_bytes());
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert!(parse(&[0xff, 0xfe]).unwrap_err().to_string().contains("not text"));
}

#[test]
fn halves_of_different_keys_are_refused() {
    let pair = |key: &PrivateKey| key.key_data().ed25519().unwrap().clone();
    let (one, other) = (generate().unwrap(), generate().unwrap());
    let mixed = Ed25519Keypair { public: pair(&other).public, private: pair(&one).private };
    let key = PrivateKey::new(KeypairData::Ed25519(mixed), "").unwrap();
    let text = fault(key.to_openssh(LineEnding::LF).unwrap().as_bytes());
    assert!(text.contains("bad OpenSSH key"), "{text}");
}

/// PKCS#8 version 2 as ring and rcgen write it, of these halves.
fn explicit(seed: &[u8], public: &[u8]) -> String {
    let head = b"\x30\x53\x02\x01\x01\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
    let der = [head, seed, b"\xa1\x23\x03\x21\x00", public].concat();
    format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", Base64::encode_string(&der))
}

#[test]
fn a_public_half_with_an_explicit_tag_is_read_and_checked() {
    let own = SigningKey::from_pkcs8_pem(PKCS8).unwrap();
    let (seed, public) = (own.to_bytes(), own.verifying_key().to_bytes());
    assert_eq!(parse(explicit(&seed, &public).as_bytes()).unwrap(), parse(PKCS8.as_bytes()).unwrap());
    let other = generate().unwrap().key_data().ed25519().unwrap().public.0;
    let text = fault(explicit(&seed, &other).as_bytes());
    assert!(text.ends_with("its public half belongs to another key"), "{text}");
    for (seed, public) in
        [(&seed[..31], &public[..]), (&seed, &public[..31]), (&seed, &[&public[..], &[0]].concat())]
    {
        let text = fault(explicit(seed, public).as_bytes());
        assert!(text.ends_with("not an Ed25519 key in PKCS#8"), "{text}");
    }
    // The tag of RFC 5958.
    let pair = ed25519_dalek::pkcs8::KeypairBytes {
        secret_key: seed,
        public_key: Some(ed25519_dalek::pkcs8::PublicKeyBytes(other)),
    };
    assert!(parse(pair.to_pkcs8_pem(Default::default()).unwrap().as_bytes()).is_err(), "the same check");
}

#[test]
fn every_generate_is_another_ed25519_key() {
    let (one, two) = (generate().unwrap(), generate().unwrap());
    assert_eq!(one.algorithm(), Algorithm::Ed25519);
    assert_ne!(one.public_key(), two.public_key());
}

#[test]
fn a_damaged_key_is_not_quoted_in_place_of_a_name() {
    // The name of a cipher, by its length.
    let secret = "a part of the key\n";
    let binary = [b"openssh-key-v1\0\0\0\0", &[secret.len() as u8][..], secret.as_bytes()].concat();
    let pem = format!(
        "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n",
        Base64::encode_string(&binary)
    );
    let text = parse(pem.as_bytes()).unwrap_err().to_string();
    assert!(text.contains("a name in it is not known") && !text.contains("a part"), "{text}");
}

#[test]
fn no_label_and_no_algorithm_is_quoted() {
    // In PKCS#8 the object identifier of an algorithm: 1.3.115.101.99.114.101.116 are the letters of a secret.
    let der = b"\x30\x12\x02\x01\x00\x30\x09\x06\x07\x2b\x73\x65\x63\x72\x65\x74\x04\x02\x04\x00";
    let pkcs8 =
        format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", Base64::encode_string(der));
    for (pem, quoted) in
        [(pkcs8, "115"), ("-----BEGIN MY SECRET-----\n-----END MY SECRET-----".into(), "SECRET")]
    {
        let text = parse(pem.as_bytes()).unwrap_err().to_string();
        assert!(!text.contains(quoted), "{text}");
    }
}

#[test]
fn a_damaged_first_line_is_not_quoted() {
    let pem = generate().unwrap().to_openssh(LineEnding::LF).unwrap();
    let body = pem.lines().nth(2).unwrap();
    for damaged in [
        pem.replacen("KEY-----\n", "KEY", 1),
        pem.replacen("KEY-----\n", "KEY ", 1),
        format!("-----BEGIN {}-----", body.to_uppercase()),
    ] {
        let text = parse(damaged.as_bytes()).unwrap_err().to_string();
        assert!(text.contains("a damaged '-----BEGIN' line"), "{text}");
    }
}

#[test]
fn a_comment_and_text_around_the_key_are_ignored() {
    let around = format!("Bag Attributes\n{ED25519}trailing text\n");
    assert_eq!(parse(around.as_bytes()).unwrap(), parse(ED25519.as_bytes()).unwrap());
    assert!(parse(ED25519.as_bytes()).unwrap().comment().as_bytes().is_empty());
}

#[test]
fn a_key_is_read_up_to_the_largest_size_only() {
    let padded = |length| format!("{ED25519}{}", " ".repeat(length - ED25519.len()));
    assert!(parse(padded(KEY_MAX).as_bytes()).is_ok());
    assert!(fault(padded(KEY_MAX + 1).as_bytes()).contains("longer than 65536 bytes"));
}

/// The PEM text with its base64 in lines of `width` characters.
fn rewrapped(pem: &str, width: usize, end: &str) -> String {
    let mut lines: Vec<&str> = pem.lines().collect();
    let (first, last) = (lines.remove(0), lines.pop().unwrap());
    let body = lines.concat();
    let body: Vec<&str> = body.as_bytes().chunks(width).map(|c| std::str::from_utf8(c).unwrap()).collect();
    [first, &body.join(end), last].join(end)
}

proptest! {
    #[test]
    fn a_key_is_read_however_it_is_wrapped(width in 1..400_usize, end in "\r?\n") {
        for pem in [ED25519, PKCS8] {
            let key = parse(rewrapped(pem, width, &end).as_bytes()).unwrap();
            prop_assert_eq!(key, parse(pem.as_bytes()).unwrap());
        }
    }

    #[test]
    fn a_damaged_key_is_an_error_that_does_not_quote_it(at in 0..ED25519.len(), byte: u8) {
        let mut damaged = ED25519.as_bytes().to_vec();
        damaged[at] = byte;
        if let Err(error) = parse(&damaged) {
            let text = error.to_string();
            prop_assert!(text.len() < 200 && !text.chars().any(char::is_control), "{:?}", text);
            let body = ED25519.lines().skip(1).filter(|line| !line.starts_with('-'));
            prop_assert!(body.into_iter().all(|line| !text.contains(&line[..16])), "{:?}", text);
        }
    }

    #[test]
    fn bytes_that_are_no_pem_are_refused(bytes: Vec<u8>) {
        prop_assert!(parse(&bytes).is_err());
    }
}
