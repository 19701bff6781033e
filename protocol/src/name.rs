//! Names of tunnels and ids of pods: types whose values are always valid.

use alloc::borrow::ToOwned;
use alloc::string::String;
use core::fmt;
use core::hash::{Hash, Hasher};
use core::str::FromStr;

/// Longest tunnel name, in bytes.
pub(crate) const TUNNEL_NAME_MAX: usize = 64;
/// Longest pod id, in bytes.
const POD_ID_MAX: usize = 128;

/// Name of a tunnel: `[A-Za-z0-9._-]{1,64}`. Comparison ignores ASCII case; the spelling is kept.
///
/// The name is sent as an SSH host name, and some SSH libraries convert those to lower case.
#[derive(Clone, Debug)]
pub struct TunnelName(String);

impl TunnelName {
    /// Tunnel on which the VM's attestation traffic reaches the KBS.
    pub fn kbs() -> Self {
        Self("KBS".to_owned())
    }

    /// Tunnel on which the runtime reaches the kata agent.
    pub fn kata_agent() -> Self {
        Self("KATAAGENT".to_owned())
    }

    /// Whether this is the tunnel to the kata agent.
    pub fn is_kata_agent(&self) -> bool {
        self.0.eq_ignore_ascii_case("KATAAGENT")
    }

    /// Name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not a tunnel name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameError(String);

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "tunnel name '{}': expected 1 to {TUNNEL_NAME_MAX} characters out of A-Z a-z 0-9 . _ -",
            self.0.escape_default()
        )
    }
}

impl core::error::Error for NameError {}

impl FromStr for TunnelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        if (1..=TUNNEL_NAME_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(2 * TUNNEL_NAME_MAX).collect()))
        }
    }
}

impl fmt::Display for TunnelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PartialEq for TunnelName {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Eq for TunnelName {}

impl Hash for TunnelName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for byte in self.0.bytes() {
            state.write_u8(byte.to_ascii_lowercase());
        }
        state.write_u8(0xff);
    }
}

/// Id of a pod: the container runtime's id of its sandbox, usually 64 hex digits.
///
/// `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`, so that `pp-<id>` is a valid KBS path segment
/// (Trustee: `[A-Za-z0-9_-]+[A-Za-z0-9_.-]*`) and a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodId(String);

impl PodId {
    /// Id as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not a pod id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodIdError(String);

impl fmt::Display for PodIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pod id '{}': expected 1 to {POD_ID_MAX} characters out of A-Z a-z 0-9 . _ -, the first a letter or \
             digit (the runtime's sandbox id)",
            self.0.escape_default()
        )
    }
}

impl core::error::Error for PodIdError {}

impl FromStr for PodId {
    type Err = PodIdError;

    fn from_str(text: &str) -> Result<Self, PodIdError> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let first_ok = text.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first_ok && text.len() <= POD_ID_MAX && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(PodIdError(text.chars().take(2 * POD_ID_MAX).collect()))
        }
    }
}

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
