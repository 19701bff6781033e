//! The keys that an adaptor would have made for a pod, for tests that drive the agent by hand.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding};
use serde_json::{Value, json};

use crate::simulators::kbs::Kbs;
use crate::simulators::openssh::OpenSsh;

/// The pod's host key and the worker node's key, made by `ssh-keygen`.
#[derive(Clone, Debug)]
pub struct PodKeys {
    /// The pod's private key.
    pub host: PathBuf,
    /// Its public half, as in a `.pub` file.
    pub host_public: String,
    /// The worker node's private key.
    pub node: PathBuf,
    /// Its public half, as in a `.pub` file.
    pub node_public: String,
}

impl PodKeys {
    /// Makes them in `directory`, in files whose names begin with `name`.
    ///
    /// # Errors
    /// If `ssh-keygen` fails.
    pub async fn make(directory: &Path, name: &str) -> Result<Self> {
        let (host, host_public) = OpenSsh::keygen(directory, &format!("{name}-pod")).await?;
        let (node, node_public) = OpenSsh::keygen(directory, &format!("{name}-node")).await?;
        Ok(Self { host, host_public, node, node_public })
    }

    /// Publishes them at the KBS, where the pod's VM fetches them.
    ///
    /// # Errors
    /// If the pod's id makes no resource path.
    pub fn publish(&self, kbs: &Kbs, pod: &str) -> Result<()> {
        kbs.put(&format!("default/pp-{pod}/keys"), self.host_pem()? + &self.node_public)
    }

    /// The Secure Comms part of apf.json.
    ///
    /// # Errors
    /// If the key file can't be read.
    pub fn user_data(&self) -> Result<Value> {
        Ok(json!({
            "sc": true,
            "sc-pp-prv": Base64::encode_string(self.host_pem()?.as_bytes()),
            "sc-wn-pub": Base64::encode_string(self.node_public.as_bytes()),
        }))
    }

    fn host_pem(&self) -> Result<String> {
        std::fs::read_to_string(&self.host).with_context(|| format!("reading {}", self.host.display()))
    }
}
