//! The files below [`DIRECTORY`] that user data and init-data bring.

use std::fmt;

/// Where the guest's programs look for them.
pub const DIRECTORY: &str = "/run/peerpod";

/// A file of [`DIRECTORY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileName {
    /// The agent's daemon config.
    Apf,
    /// Credentials for registries.
    Auth,
    /// Init-data as they came: base64 of gzip of TOML.
    InitData,
    /// Asks for the scratch disk; without content.
    ScratchSpaceMarker,
    /// The attestation agent's configuration.
    AttestationAgent,
    /// The confidential data hub's configuration.
    ConfidentialDataHub,
    /// The kata agent's policy.
    Policy,
    /// Settings of Secure Comms that are measured.
    SecureComms,
    /// The TOML of init-data, for the attestation agent's evidence.
    InitDataToml,
    /// The digest of that TOML, in hex.
    InitDataDigest,
}

impl FileName {
    /// Those that user data may bring.
    pub const USER_DATA: [Self; 6] = [
        Self::AttestationAgent,
        Self::ConfidentialDataHub,
        Self::Apf,
        Self::Auth,
        Self::InitData,
        Self::ScratchSpaceMarker,
    ];
    /// Those that `[data]` of init-data may bring.
    pub const INIT_DATA: [Self; 4] =
        [Self::AttestationAgent, Self::ConfidentialDataHub, Self::Policy, Self::SecureComms];

    /// Its name in [`DIRECTORY`].
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Apf => "apf.json",
            Self::Auth => "auth.json",
            Self::InitData => "initdata",
            Self::ScratchSpaceMarker => "scratch-space.marker",
            Self::AttestationAgent => "aa.toml",
            Self::ConfidentialDataHub => "cdh.toml",
            Self::Policy => "policy.rego",
            Self::SecureComms => "secure-comms.toml",
            Self::InitDataToml => "initdata.toml",
            Self::InitDataDigest => "initdata.digest",
        }
    }
}

/// What user data bring: files that a cloud may write. Of two with one name the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserData {
    /// Each file with its content, in the order of the user data; only those that user data may bring.
    pub files: Vec<(FileName, Vec<u8>)>,
    /// The items that were left out, for the log.
    pub skipped: Vec<Skipped>,
}

/// Something that the VM does not take. Its text is not kept: the cloud, or who starts the pod, wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The line where it begins, from 1.
    pub line: usize,
    /// Why it is left out.
    pub reason: SkipReason,
}

/// Why something is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// An item of user data for a path that user data may not write.
    Path,
    /// An item of user data without a path.
    NoPath,
    /// A key of init-data that is none of algorithm, version and data.
    Key,
    /// A file of init-data that the VM does not take.
    File,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            SkipReason::Path => "an item for a path that user data may not write",
            SkipReason::NoPath => "an item without a path",
            SkipReason::Key => "a key that is none of algorithm, version, data",
            SkipReason::File => "a file that init-data may not bring",
        };
        write!(f, "line {}: {reason}: skipped", self.line)
    }
}

/// Init-data that were decoded: bound to the VM's evidence by their digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitData {
    /// The TOML, byte for byte: what the digest is of.
    pub toml: Vec<u8>,
    /// Lower-case hex of the digest by the algorithm that the TOML names; 64, 96 or 128 digits.
    pub digest: String,
    /// Each file of its `[data]` that the VM takes, with its content.
    pub files: Vec<(FileName, Vec<u8>)>,
    /// What was left out, for the log.
    pub skipped: Vec<Skipped>,
}
