//! Properties of the key parsers for any input.

use base64ct::{Base64, Encoding};
use secure_comms_keys::{
    AdminKey, KeyError, PodKey, PodKeys, PrivateKeyRole, PublicKey, WorkerNodeKey, WorkerNodeKeys,
};
use secure_comms_protocol::limits::KEY_MAX;

/// A key that only the corpus uses.
const POD: &str = include_str!("../corpus/keys/host-openssh");
const WORKER_NODE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINdamAGCsQq31Uv+08lkBzoO4XLz2qYjJa8CGmj3B1Ea";
/// Length of a repeated text that can't be a coincidence, in bytes.
const SECRET_MIN: usize = 24;

/// The first byte says whether the rest is a text, or the binary that a text wraps, which a fuzzer would not find.
pub(crate) fn exercise(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    match what {
        b'h' | b'-' => private(&[&[*what][..], data].concat()),
        0 => private(pem("OPENSSH PRIVATE KEY", data).as_bytes()),
        1 => private(pem("PRIVATE KEY", data).as_bytes()),
        2 => worker_node(format!("ssh-ed25519 {}", Base64::encode_string(data)).as_bytes()),
        3 => {
            let blob = [b"\0\0\0\x0bssh-ed25519\0\0\0\x20", data].concat();
            worker_node(format!("ssh-ed25519 {} x", Base64::encode_string(&blob)).as_bytes());
        }
        5 => resource(data),
        4 => drop(std::str::from_utf8(data).map(|text| both(PodKeys::from_text(text)))),
        _ => worker_node(&[&[*what][..], data].concat()),
    }
}

fn pem(label: &str, binary: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", Base64::encode_string(binary))
}

/// All roles share one reader: the agent reads pod keys, the adaptor pod, worker-node and admin keys.
fn private(text: &[u8]) {
    let (node, admin) = (WorkerNodeKey::from_pem(text), AdminKey::from_pem(text));
    let error = match PodKey::from_pem(text) {
        Ok(key) => {
            let ssh = key.ssh();
            assert!(
                text.len() <= KEY_MAX && ssh.algorithm().as_str() == "ssh-ed25519" && !ssh.is_encrypted()
            );
            let (node, admin) = (node.expect("the same reader"), admin.expect("the same reader"));
            assert_eq!(node.fingerprint(), key.fingerprint());
            assert_eq!(format!("{admin:?}"), format!("AdminKey({})", key.fingerprint()));
            let again = key.to_pem().and_then(|pem| PodKey::from_pem(pem.as_bytes()));
            assert_eq!(again.expect("what was written can be read").fingerprint(), key.fingerprint());
            return both(PodKeys::parse(text, WORKER_NODE.as_bytes()));
        }
        Err(error) => error,
    };
    assert!(node.is_err() && admin.is_err(), "one reader");
    says_why(&error);
    assert!(matches!(error, KeyError::PrivateKey { role: PrivateKeyRole::Pod, .. }));
    let text = String::from_utf8_lossy(text);
    // The label is printed; the key follows it.
    let body =
        text.split_once("-----BEGIN ").and_then(|(_, rest)| rest.split_once("-----")).map(|(_, body)| body);
    let shown = error.to_string();
    let words = body.unwrap_or_default().split_whitespace().filter(|word| word.len() >= SECRET_MIN);
    assert!(words.into_iter().all(|word| !shown.contains(word)), "it shows the key: {shown}");
}

fn worker_node(text: &[u8]) {
    let keys = match WorkerNodeKeys::parse(text) {
        Ok(keys) => keys,
        Err(error) => {
            assert!(matches!(error, KeyError::WorkerNodeKeys(_)));
            return says_why(&error);
        }
    };
    // A comment may be in another encoding, after a byte order mark, and words may be apart by any blanks.
    let unmarked = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let ascii =
        || unmarked.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' }).collect();
    let decoded = std::str::from_utf8(unmarked).map_or_else(|_| ascii(), str::to_owned);
    let lines = decoded.lines().map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    for line in &lines {
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        let key = PublicKey::from_openssh(&words.join(" ")).expect("another reader takes it");
        assert!(words.first() == Some(&"ssh-ed25519") && keys.matches(&key));
    }
    let mut fingerprints: Vec<String> = keys.fingerprints().collect();
    fingerprints.sort_unstable();
    fingerprints.dedup();
    assert!(
        (1..=lines.len()).contains(&fingerprints.len()) && keys.fingerprints().count() == fingerprints.len()
    );
    let other = PublicKey::from_openssh(WORKER_NODE).expect("it is one");
    let is_among = fingerprints.contains(&other.fingerprint(Default::default()).to_string());
    assert_eq!(keys.matches(&other), is_among);
    let twice = [text, b"\n# again\n\n", unmarked].concat();
    if twice.len() <= KEY_MAX {
        assert_eq!(WorkerNodeKeys::parse(&twice), Ok(keys));
    }
    both(PodKeys::parse(POD.as_bytes(), text));
}

/// The one resource of a pod's keys, which a man in the middle can write.
fn resource(text: &[u8]) {
    let read = PodKeys::from_resource(text);
    if let Err(error) = &read {
        let shown = error.to_string();
        let text = String::from_utf8_lossy(text);
        let words = text.split_whitespace().filter(|word| word.len() >= SECRET_MIN && !word.contains('-'));
        assert!(words.into_iter().all(|word| !shown.contains(word)), "it shows the key: {shown}");
    }
    if let Ok(keys) = &read {
        let (text, both) =
            (String::from_utf8_lossy(text), keys.to_text().expect("what was read can be written"));
        assert_eq!(text.matches("-----BEGIN ").count(), 1, "one private key");
        let again = PodKeys::from_resource(both.as_bytes()).expect("what was written can be read");
        assert_eq!(again.fingerprint(), keys.fingerprint());
        assert_eq!(again.worker_node_keys(), keys.worker_node_keys());
        // The other order, as `cat` makes it.
        let end = "-----END OPENSSH PRIVATE KEY-----";
        let (pem, lines) = both.split_once(end).expect("the text of a key ends so");
        let turned =
            PodKeys::from_resource(format!("{lines}\n{pem}{end}\n").as_bytes()).expect("either order");
        assert_eq!(turned.worker_node_keys(), keys.worker_node_keys());
    }
    both(read);
}

fn both(keys: Result<PodKeys, KeyError>) {
    let keys = match keys {
        Ok(keys) => keys,
        Err(error) => return says_why(&error),
    };
    let text = keys.to_text().expect("what was read can be written");
    let again = PodKeys::from_text(&text).expect("what was written can be read");
    assert_eq!(again.fingerprint(), keys.fingerprint());
    assert_eq!(again.worker_node_keys(), keys.worker_node_keys());
    assert_eq!(*again.to_text().expect("and written again"), *text);
}

fn says_why(error: &KeyError) {
    let text = error.to_string();
    assert!(text.len() < 1000 && !text.chars().any(char::is_control), "not for a log: {text:?}");
}
