//! What an agent needs for the Kubernetes phase, as one value and as one text.

use std::fmt;

use zeroize::Zeroizing;

use crate::error::{KeyError, PrivateKeyFault, PrivateKeyRole};
use crate::public_key::WorkerNodeKeys;
use crate::roles::PodKey;

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
