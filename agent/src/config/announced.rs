//! What the agent announces of its configuration in `hello`: the adaptor compares it with what it expects.

use secure_comms_protocol::limits::{CONTROL_LINE_MAX, KEY_MAX};
use secure_comms_protocol::{AgentConfig, Control, Hello, InitDataDigest, PhaseName, PodId, TunnelNames};

use super::error::ConfigError;
use super::user_data::UserDataMode;

/// The shortest line of a worker-node key with its newline, in bytes: "ssh-ed25519", a blank, 68 digits of base64.
const LINE_MIN: usize = 81;
/// The longest fingerprint: "SHA256:" and 43 digits of base64.
const FINGERPRINT_MAX: usize = 50;
/// The longest pod id, in bytes.
const POD_ID_MAX: usize = 128;

/// The part of the configuration that `hello` announces and that is known at the start.
#[derive(Clone, Debug)]
pub(crate) struct Announced {
    /// Digest of the VM's init-data.
    pub(crate) init_data: Option<InitDataDigest>,
    /// Tags of the inbounds, of both phases.
    pub(crate) inbounds: Vec<String>,
    /// Tags of the outbounds, of both phases.
    pub(crate) outbounds: Vec<String>,
    /// What user data may decide.
    pub(crate) user_data: UserDataMode,
}

impl Announced {
    /// The configuration with the keys in use: the pod they belong to, and the fingerprints that may log in.
    pub(crate) fn with_keys(&self, pod: Option<&PodId>, worker_nodes: Vec<String>) -> AgentConfig {
        AgentConfig {
            pod_id: pod.map(ToString::to_string),
            worker_nodes,
            inbounds: self.inbounds.clone(),
            outbounds: self.outbounds.clone(),
            user_data: self.user_data.to_string(),
        }
    }

    /// Checks that every hello fits into a control line, whichever keys come.
    ///
    /// # Errors
    /// It does not; with its length.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let fingerprints = vec!["x".repeat(FINGERPRINT_MAX); KEY_MAX / LINE_MIN];
        let config =
            AgentConfig { pod_id: Some("x".repeat(POD_ID_MAX)), ..self.with_keys(None, fingerprints) };
        let names = TunnelNames { inbounds: names(&self.inbounds), outbounds: names(&self.outbounds) };
        let instance = format!("{:016x}", u64::MAX);
        let hello = Hello {
            init_data: self.init_data.as_ref().map(ToString::to_string),
            config: Some(config),
            ..Hello::from_agent(PhaseName::Kubernetes, &instance, u32::MAX, names)
        };
        let mut line = Vec::new();
        Control::Hello(hello).write_line(&mut line);
        // Its newline does not count.
        match line.len().saturating_sub(1).checked_sub(CONTROL_LINE_MAX) {
            None | Some(0) => Ok(()),
            Some(excess) => Err(ConfigError::TooManyTunnels { excess }),
        }
    }
}

/// The names of all tags; a phase has a part of them.
fn names(tags: &[String]) -> Vec<String> {
    tags.iter().filter_map(|tag| Some(tag.split(':').nth(1)?.to_owned())).collect()
}
