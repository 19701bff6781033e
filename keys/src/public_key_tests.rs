use proptest::prelude::*;
use secure_comms_protocol::limits::KEY_MAX;

use super::*;
use crate::private_key::generate;

const ED25519: &str = include_str!("../testdata/ed25519.openssh");

fn public_line() -> (PublicKey, String) {
    let key = generate().unwrap().public_key().clone();
    let line = key.to_openssh().unwrap();
    (key, line)
}

fn node_fault(lines: &str) -> String {
    WorkerNodeKeys::parse(lines.as_bytes()).unwrap_err().to_string()
}

#[test]
fn worker_node_keys_are_authorized_keys_lines_once_each() {
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
fn only_known_types_are_quoted() {
    for secret in ["ssh-c2VjcmV0", "sk-c2VjcmV0", "ecdsa-c2VjcmV0 AAAA", "ssh-rsa-c2VjcmV0@x"] {
        let text = node_fault(secret);
        assert!(text.contains("line 1: a key of an unknown type") && !text.contains("c2Vjcm"), "{text}");
    }
}

proptest! {
    #[test]
    fn a_text_without_a_key_is_an_error_in_one_line(text: String) {
        let fault = WorkerNodeKeys::parse(text.as_bytes()).unwrap_err().to_string();
        prop_assert!(fault.len() < 1000 && !fault.chars().any(char::is_control), "{:?}", fault);
    }
}
