use super::*;

const ED25519: &str = include_str!("../testdata/ed25519.openssh");
const ED25519_PUBLIC: &str = include_str!("../testdata/ed25519.pub");
const PKCS8: &str = include_str!("../testdata/ed25519.pkcs8");

fn public_line() -> (PublicKey, String) {
    let key = new_host_key().unwrap().public_key().clone();
    let line = key.to_openssh().unwrap();
    (key, line)
}

fn host_fault(pem: &str) -> String {
    parse_host_key(pem.as_bytes()).unwrap_err().to_string()
}

fn node_fault(lines: &str) -> String {
    WorkerNodeKeys::parse(lines.as_bytes()).unwrap_err().to_string()
}

#[test]
fn a_host_key_is_read_from_openssh_and_pkcs8_pem() {
    let key = parse_host_key(ED25519.as_bytes()).unwrap();
    assert_eq!(key.public_key().key_data(), PublicKey::from_openssh(ED25519_PUBLIC).unwrap().key_data());
    let windows = format!("\r\n{}\r\n", ED25519.replace('\n', "\r\n"));
    assert_eq!(parse_host_key(windows.as_bytes()).unwrap().public_key(), key.public_key());
    let mut theirs = Vec::new();
    let pkcs8 = parse_host_key(PKCS8.as_bytes()).unwrap();
    assert_eq!(
        pkcs8.public_key(),
        russh::keys::decode_secret_key(PKCS8, None).unwrap().public_key(),
        "the same key as russh reads"
    );
    russh::keys::encode_pkcs8_pem(&pkcs8, &mut theirs).unwrap();
    assert_eq!(
        parse_host_key(&theirs).unwrap().public_key(),
        pkcs8.public_key(),
        "version 2, with the public key"
    );
}

#[test]
fn what_is_not_an_unencrypted_ed25519_key_is_refused_with_advice() {
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
        let text = host_fault(pem);
        assert!(text.contains(part), "{part:?} is not in {text:?}");
        assert!(text.contains("ssh-keygen -t ed25519 -N ''"), "{text}");
    }
    assert!(parse_host_key(&[0xff, 0xfe]).unwrap_err().to_string().contains("not text"));
}

#[test]
fn a_host_key_whose_public_half_belongs_to_another_key_is_refused() {
    let pair = |key: &PrivateKey| key.key_data().ed25519().unwrap().clone();
    let (one, other) = (new_host_key().unwrap(), new_host_key().unwrap());
    let mixed = Ed25519Keypair { public: pair(&other).public, private: pair(&one).private };
    let key = PrivateKey::new(KeypairData::Ed25519(mixed), "").unwrap();
    let text = host_fault(&key.to_openssh(LineEnding::LF).unwrap());
    assert!(text.contains("bad OpenSSH key"), "{text}");
}

#[test]
fn worker_node_keys_are_authorized_keys_lines_without_duplicates() {
    let ((one, first), (two, second), (stranger, _)) = (public_line(), public_line(), public_line());
    let lines = format!("# node a\n\n  {first} with a comment\r\n{second}\n{first}\n");
    let keys = WorkerNodeKeys::parse(lines.as_bytes()).unwrap();
    assert_eq!(keys.fingerprints().count(), 2);
    assert!(keys.matches(&one) && keys.matches(&two));
    assert!(!keys.matches(&stranger));
    let rsa = PublicKey::from_openssh(include_str!("../testdata/ecdsa.pub")).unwrap();
    assert!(!keys.matches(&rsa));
}

#[test]
fn what_is_not_an_ed25519_line_is_refused_with_advice() {
    let (_, good) = public_line();
    let weak = PublicKey::from(Ed25519PublicKey([0; 32])).to_openssh().unwrap();
    for (lines, part) in [
        (String::new(), "it is empty"),
        ("  \n \n".into(), "it is empty"),
        ("# nothing\n# else\n".into(), "no key, only comments"),
        ("garbage".into(), "line 1: not a public key"),
        (format!("{good}\ngarbage"), "line 2: not a public key"),
        (format!("# x\nno-pty,command=\"x\" {good}"), "line 2: options before the key are not supported"),
        (include_str!("../testdata/rsa.pub").into(), "line 1: a key of type ssh-rsa is not an Ed25519 key"),
        (include_str!("../testdata/ecdsa.pub").into(), "a key of type ecdsa-sha2-nistp256 is not"),
        (
            "ssh-ed25519-cert-v01@openssh.com AAAA".into(),
            "a key of type ssh-ed25519-cert-v01@openssh.com is not",
        ),
        ("ssh-ed25519".into(), "line 1: bad key"),
        ("ssh-ed25519 AAAA".into(), "line 1: bad key"),
        (weak, "not a point that can verify signatures"),
        (ED25519.into(), "line 1: not a public key"),
        ("\n".repeat(KEY_MAX + 1), "longer than 65536 bytes"),
    ] {
        let text = node_fault(&lines);
        assert!(text.contains(part), "{part:?} is not in {text:?}");
        assert!(text.contains("give ssh-ed25519 authorized_keys lines"), "{text}");
    }
}

#[test]
fn pod_keys_survive_their_text_form_and_nothing_cut_short_does() {
    let (node, line) = public_line();
    let keys = PodKeys::parse(ED25519.as_bytes(), line.as_bytes()).unwrap();
    let text = keys.to_text().unwrap();
    let again = PodKeys::from_text(&text).unwrap();
    assert_eq!(again.host().public_key().key_data(), keys.host().public_key().key_data());
    assert!(again.worker_node() == keys.worker_node() && again.worker_node().matches(&node));
    // The last byte is a newline, which nothing needs.
    for end in 0..text.len() - 1 {
        assert!(PodKeys::from_text(&text[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn debug_prints_fingerprints_and_no_secret() {
    let keys = PodKeys::parse(ED25519.as_bytes(), public_line().1.as_bytes()).unwrap();
    let text = format!("{keys:?} {:?}", keys.host());
    assert!(text.contains(&keys.fingerprint()) && text.contains("SHA256:"), "{text}");
    let seed = keys.host().key_data().ed25519().unwrap().private.to_bytes();
    assert!(
        !text.contains(&format!("{seed:?}")) && !text.contains(&format!("{}, {}", seed[0], seed[1])),
        "{text}"
    );
}

#[test]
fn every_new_host_key_is_another_ed25519_key() {
    let (one, two) = (new_host_key().unwrap(), new_host_key().unwrap());
    assert_eq!(one.algorithm(), russh::keys::Algorithm::Ed25519);
    assert_ne!(one.public_key(), two.public_key());
}

#[test]
fn a_damaged_key_does_not_show_what_stands_where_a_name_should() {
    // The name of a cipher, by its length.
    let secret = "a part of the key\n";
    let binary = [b"openssh-key-v1\0\0\0\0", &[secret.len() as u8][..], secret.as_bytes()].concat();
    let pem = format!(
        "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n",
        Base64::encode_string(&binary)
    );
    let text = parse_host_key(pem.as_bytes()).unwrap_err().to_string();
    assert!(text.contains("a name in it is not known") && !text.contains("a part"), "{text}");
}

#[test]
fn a_damaged_first_line_does_not_show_the_key_that_stands_in_it() {
    let pem = new_host_key().unwrap().to_openssh(LineEnding::LF).unwrap();
    let body = pem.lines().nth(2).unwrap();
    for damaged in [
        pem.replacen("KEY-----\n", "KEY", 1),
        pem.replacen("KEY-----\n", "KEY ", 1),
        format!("-----BEGIN {}-----", body.to_uppercase()),
    ] {
        let text = parse_host_key(damaged.as_bytes()).unwrap_err().to_string();
        assert!(text.contains("a damaged '-----BEGIN' line"), "{text}");
    }
}
