//! What an agent needs for the Kubernetes phase, as one value and as one text.

use std::fmt;

use zeroize::Zeroizing;

use crate::error::{KeyError, PrivateKeyFault, PrivateKeyRole, PublicKeyFault, checked_text};
use crate::public_key::WorkerNodeKeys;
use crate::roles::PodKey;

/// What a PEM text begins with.
const BEGIN: &str = "-----BEGIN ";

/// The keys of the Kubernetes phase: the pod key, and the worker nodes that may log in. Wiped on drop.
#[derive(Clone)]
pub struct PodKeys {
    pod_key: PodKey,
    worker_node_keys: WorkerNodeKeys,
}

impl PodKeys {
    /// Reads both from their texts, as the KBS or the user data hold them.
    ///
    /// # Errors
    /// One of them is not what it should be.
    pub fn parse(pod_pem: &[u8], worker_node_lines: &[u8]) -> Result<Self, KeyError> {
        let pod_key = PodKey::from_pem(pod_pem)?;
        Ok(Self { pod_key, worker_node_keys: WorkerNodeKeys::parse(worker_node_lines)? })
    }

    /// Reads the one resource of the KBS that holds both: a private key in PEM (OpenSSH or PKCS#8), and `authorized_keys`
    /// lines before or after it. `cat pod.pem worker-node.pub` makes such a text.
    ///
    /// # Errors
    /// There is no private key or more than one, another PEM text, no line, or anything else. No error quotes the text.
    pub fn from_resource(text: &[u8]) -> Result<Self, KeyError> {
        let pod = |fault| KeyError::PrivateKey { role: PrivateKeyRole::Pod, fault };
        let text = checked_text(text).map_err(|fault| pod(fault.into()))?;
        let Some((before, marked)) = text.find(BEGIN).and_then(|begin| text.split_at_checked(begin)) else {
            return Err(pod(PrivateKeyFault::NotPem));
        };
        // Without a label or an end, the reader of the key says what is wrong.
        let label =
            marked.get(BEGIN.len()..).and_then(|rest| rest.split_once("-----")).map(|(label, _)| label);
        let end = label.map(|label| format!("-----END {label}-----"));
        let end = end.and_then(|end| marked.find(&end).map(|at| at + end.len()));
        let (pem, after) = marked.split_at_checked(end.unwrap_or(marked.len())).unwrap_or((marked, ""));
        if before.contains(BEGIN) || after.contains(BEGIN) {
            return Err(pod(PrivateKeyFault::SecondPem));
        }
        let pod_key = PodKey::from_pem(pem.as_bytes())?;
        // Newlines in place of the key's lines, so that a fault names its line of the whole text. Wiped: in a damaged text
        // any line may be a part of the key.
        let mut lines = Zeroizing::new(String::with_capacity(text.len() + 1));
        lines.push_str(before);
        lines.extend(pem.chars().filter(|c| *c == '\n'));
        // The file of the key may have had no newline at its end.
        if !after.starts_with(['\n', '\r']) {
            lines.push('\n');
        }
        lines.push_str(after);
        if lines.trim().is_empty() {
            return Err(KeyError::WorkerNodeKeys(PublicKeyFault::OnlyPrivate));
        }
        Ok(Self { pod_key, worker_node_keys: WorkerNodeKeys::parse(lines.as_bytes())? })
    }

    /// The pod key.
    pub fn pod_key(&self) -> &PodKey {
        &self.pod_key
    }

    /// The keys of the worker nodes that may log in.
    pub fn worker_node_keys(&self) -> &WorkerNodeKeys {
        &self.worker_node_keys
    }

    /// The SHA256 fingerprint of the pod key, for logs.
    pub fn fingerprint(&self) -> String {
        self.pod_key.fingerprint()
    }

    /// Both as one text: the PEM, then the `authorized_keys` lines.
    ///
    /// # Errors
    /// A key can't be encoded.
    pub fn to_text(&self) -> Result<Zeroizing<String>, KeyError> {
        let (pem, lines) = (self.pod_key.to_pem()?, self.worker_node_keys.to_lines()?);
        // Allocated in full first: a text that grows leaves copies behind.
        let mut text = Zeroizing::new(String::with_capacity(pem.len() + 1 + lines.len()));
        text.push_str(pem.trim_end());
        text.push('\n');
        text.push_str(&lines);
        Ok(text)
    }

    /// Reads what [`Self::to_text`] wrote.
    ///
    /// # Errors
    /// The text is anything else.
    pub fn from_text(text: &str) -> Result<Self, KeyError> {
        const END: &str = "-----END OPENSSH PRIVATE KEY-----\n";
        let cut = || KeyError::PrivateKey {
            role: PrivateKeyRole::Pod,
            fault: PrivateKeyFault::BadPem("cut short".to_owned()),
        };
        let (pem, _) = text.split_once(END).ok_or_else(cut)?;
        let (pem, lines) = text.split_at(pem.len() + END.len());
        Self::parse(pem.as_bytes(), lines.as_bytes())
    }
}

impl fmt::Debug for PodKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodKeys")
            .field("pod_key", &self.fingerprint())
            .field("worker_node_keys", &self.worker_node_keys)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roles::WorkerNodeKey;

    const ED25519: &[u8] = include_bytes!("../testdata/ed25519.openssh");

    fn keys() -> (PodKeys, WorkerNodeKey) {
        let node = WorkerNodeKey::generate().unwrap();
        let line = node.public().unwrap().authorized_keys_line().unwrap();
        (PodKeys::parse(ED25519, line.as_bytes()).unwrap(), node)
    }

    #[test]
    fn pod_keys_survive_their_text_form() {
        let (keys, node) = keys();
        let text = keys.to_text().unwrap();
        let again = PodKeys::from_text(&text).unwrap();
        assert_eq!(again.pod_key().public().unwrap(), keys.pod_key().public().unwrap());
        assert_eq!(again.worker_node_keys(), keys.worker_node_keys());
        assert!(again.worker_node_keys().matches(node.ssh().public_key()));
        // The last byte is a newline, which nothing needs.
        for end in 0..text.len() - 1 {
            assert!(PodKeys::from_text(&text[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn the_resource_may_be_written_by_hand() {
        let (keys, node) = keys();
        let other = WorkerNodeKey::generate().unwrap().public().unwrap().authorized_keys_line().unwrap();
        let pem = String::from_utf8(ED25519.to_vec()).unwrap();
        let pkcs8 = include_str!("../testdata/ed25519.pkcs8");
        let line = node.public().unwrap().authorized_keys_line().unwrap();
        let line = line.trim_end();
        for text in [
            keys.to_text().unwrap().to_string(),
            format!("{pem}{line}"),
            format!("{}{line} a comment\n", pem.trim_end()),
            format!("{pem}\n# the node\n\n  {line}\n{other}\n").replace('\n', "\r\n"),
            format!("{line}\n{pem}"),
            format!("# keys\n{line}\n{pem}{other}"),
            format!("\u{feff}{pem}{line}\n"),
            format!("{}\n{line}\n", pem.replace('\n', "\n  ")),
        ] {
            let read =
                PodKeys::from_resource(text.as_bytes()).unwrap_or_else(|error| panic!("{error}: {text:?}"));
            assert_eq!(read.fingerprint(), keys.fingerprint(), "{text:?}");
            assert!(read.worker_node_keys().matches(node.ssh().public_key()), "{text:?}");
        }
        assert!(PodKeys::from_resource(format!("{pkcs8}{line}").as_bytes()).is_ok());
    }

    #[test]
    fn anything_else_is_no_resource_and_is_not_quoted() {
        const CANARY: &str = "b3BlbnNzaC1rZXkt";
        let (keys, node) = keys();
        let text = keys.to_text().unwrap().to_string();
        let pem = String::from_utf8(ED25519.to_vec()).unwrap();
        let line = node.public().unwrap().authorized_keys_line().unwrap();
        let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (text, part) in [
            (String::new(), "it is empty"),
            (line.clone(), "not PEM"),
            (pem.clone(), "no line next to the private key"),
            (format!("{pem}# only\n"), "no key"),
            (format!("{pem}{pem}{line}"), "another PEM text"),
            (format!("{line}{certificate}{pem}"), "another PEM text"),
            (format!("{pem}{line}{certificate}"), "another PEM text"),
            (format!("{certificate}{line}"), "not a private key"),
            (format!("{pem}ssh-rsa {CANARY}\n"), "ssh-rsa is not an Ed25519 key"),
            (format!("{pem}{line}\n{CANARY}\n"), "line 9: not a public key"),
            (format!("{pem}{CANARY} {line}"), "options before the key"),
            (format!("Bag Attributes {CANARY}\n{pem}{line}"), "line 1: not a public key"),
            (pem.replace("-----END", "-----EMD") + &line, "no '-----END OPENSSH PRIVATE KEY-----' line"),
            (text.replace("OPENSSH PRIVATE", CANARY), "damaged"),
            ("-----BEGIN ".to_owned(), "cut"),
            (format!("{text}{}", "#".repeat(secure_comms_protocol::limits::KEY_MAX)), "longer than"),
        ] {
            let error = PodKeys::from_resource(text.as_bytes()).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(part), "{part:?} is not in {shown:?}");
            assert!(!shown.contains(CANARY) && !shown.contains("AAAA"), "{shown}");
        }
        // The last line needs its key only: neither a comment nor a newline.
        for end in 0..text.len() - 1 {
            assert!(PodKeys::from_resource(&text.as_bytes()[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn debug_shows_fingerprints_and_no_secret() {
        let (keys, _) = keys();
        let text = format!("{keys:?} {:?}", keys.pod_key());
        assert!(text.contains(&keys.fingerprint()) && text.contains("SHA256:"), "{text}");
        let seed = keys.pod_key().ssh().key_data().ed25519().unwrap().private.to_bytes();
        assert!(
            !text.contains(&format!("{seed:?}")) && !text.contains(&format!("{}, {}", seed[0], seed[1])),
            "{text}"
        );
    }
}
