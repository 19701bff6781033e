//! What the cloud forges: the VM's user data, and the KBS's answers on their way to the VM.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding as _};
use russh::keys::PrivateKey;
use serde_json::{Value, json};

use super::script::{Forgery, UserData};
use crate::simulators::openssh::OpenSsh;

/// Tunnel that only hostile user data names.
pub(super) const BAIT_TUNNEL: &str = "BAIT";
/// Private key with which the attacker logs in.
pub(super) const LOGIN_KEY: &str = "attacker";
/// Bytes of a forged answer that was cut off: within the private key.
const CUT: usize = 300;

/// The keys of the attacker.
#[derive(Debug)]
pub(super) struct HostileCloud {
    /// `authorized_keys` line of [`LOGIN_KEY`].
    login: String,
    /// Keys of another pod, in PEM.
    other_pod: String,
    /// `authorized_keys` line of a worker node with which nobody logs in: a VM that took it is only of no use.
    other_node: String,
}

impl HostileCloud {
    /// Makes the attacker's keys in `directory`.
    ///
    /// # Errors
    /// If `ssh-keygen` fails.
    pub(super) async fn new(directory: &Path) -> Result<Self> {
        let (_, login) = OpenSsh::keygen(directory, LOGIN_KEY).await.context("the key of the attacker")?;
        let (other_pod, _) = OpenSsh::keygen(directory, "other-pod").await?;
        let (_, other_node) = OpenSsh::keygen(directory, "other-node").await?;
        let other_pod = std::fs::read_to_string(other_pod)?;
        Ok(Self { login, other_pod, other_node })
    }

    /// The text of apf.json; `bait` is the server of the attacker.
    pub(super) fn user_data(&self, kind: UserData, directory: &Path, bait: SocketAddr) -> String {
        let [bus, run] = ["bus.sock", "run.sock"].map(|name| directory.join(name));
        let value: Value = match kind {
            UserData::Empty => json!({}),
            UserData::Tunnels => json!({
                "sc-outbounds": format!("ATTESTATION_PHASE:{BAIT_TUNNEL}:{bait},BOTH_PHASES:KATAAGENT:{bait}"),
                "sc-inbounds": "BOTH_PHASES:KBS:127.0.0.1:1",
            }),
            UserData::UnixSockets => json!({
                "sc-outbounds": format!("KUBERNETES_PHASE:{BAIT_TUNNEL}:{bait},KUBERNETES_PHASE:BUS:{}", bus.display()),
                "sc-inbounds": format!("KUBERNETES_PHASE:RUN:{}", run.display()),
            }),
            UserData::Keys => json!({
                "sc": true,
                "sc-pp-prv": Base64::encode_string(self.other_pod.as_bytes()),
                "sc-wn-pub": Base64::encode_string(self.login.as_bytes()),
            }),
            UserData::WrongTypes => {
                let text = r#"{"sc": "true", "sc": true, "sc-pp-prv": [1], "sc-wn-pub": {"a": null}, "sc-inbounds": 5}"#;
                return text.to_owned();
            }
        };
        value.to_string()
    }

    /// What the VM reads in place of the KBS's answer.
    ///
    /// # Errors
    /// If the worker node's key in the adaptor's store can't be read.
    pub(super) fn forged(&self, forgery: Forgery, store: &Path) -> Result<Vec<u8>> {
        let Self { login, other_pod, other_node } = self;
        let mut text = match forgery {
            Forgery::WorkerNode => login.clone(),
            Forgery::BothKeys | Forgery::Cut => format!("{other_pod}{other_node}\n"),
            Forgery::OtherPod => {
                let node = PrivateKey::from_openssh(std::fs::read_to_string(store.join("worker-node.key"))?)?;
                format!("{other_pod}{}\n", node.public_key().to_openssh()?)
            }
        };
        if forgery == Forgery::Cut {
            text.truncate(CUT);
        }
        Ok(text.into_bytes())
    }

    /// Whether a VM can take the forged keys: then it is of no use to its pod until it reboots.
    pub(super) fn can_be_taken(forgery: Forgery) -> bool {
        matches!(forgery, Forgery::BothKeys | Forgery::OtherPod)
    }
}
