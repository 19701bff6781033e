//! The latched keys: stored until the VM reboots, so that a restarted agent does not attest again.
//!
//! The directory must be on a tmpfs, which is encrypted memory in a confidential VM. Everything here fails closed: a file
//! that another user could have written, or that can't be read, is an error and never "no keys". Without keys the agent
//! would attest again, and an attacker that answers as the KBS would own a VM that already runs a pod.

use std::path::PathBuf;

use secure_comms_keys::private_directory::PrivateDirectory;
use secure_comms_keys::{FileError, KeyError, PodKeys, PrivacyFault};
use secure_comms_protocol::limits::KEY_MAX;
use zeroize::Zeroizing;

const FILE: &str = "keys";
/// The first line, so that a later version knows what it reads.
const HEADER: &str = "secure-comms latch 1\n";
const FILE_MAX: usize = 2 * KEY_MAX + HEADER.len();

/// Why the latched keys can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LatchError {
    /// A system call failed.
    #[error("{doing} {}: {source}; check the directory, or reboot the VM to start over", path.display())]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// Another user could have written or could read it.
    #[error(
        "checking the latched keys in {}: {fault}; it must be ours alone; reboot the VM to start over", path.display()
    )]
    Exposed {
        /// Path of the file or directory.
        path: PathBuf,
        /// The fault.
        fault: PrivacyFault,
    },
    /// The content is not what this agent wrote.
    #[error("reading the latched keys in {}: {fault}; reboot the VM to start over", path.display())]
    Broken {
        /// Path of the file.
        path: PathBuf,
        /// The fault.
        fault: String,
    },
    /// The keys have no text form.
    #[error("writing the latched keys: {0}")]
    Encode(#[from] KeyError),
}

impl From<FileError> for LatchError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { doing, path, source } => Self::Io { doing, path, source },
            FileError::NotPrivate { path, fault } => Self::Exposed { path, fault },
            FileError::TooLarge { path, max } => {
                Self::Broken { path, fault: format!("larger than {max} bytes") }
            }
        }
    }
}

/// The directory of the latched keys.
#[derive(Clone, Debug)]
pub(crate) struct Latch {
    directory: PathBuf,
}

impl Latch {
    /// The keys in `directory`, which need not exist yet.
    pub(crate) fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Reads the keys of this boot; `None` if none were stored.
    ///
    /// # Errors
    /// The keys exist and can't be trusted or read. The caller must not continue without them.
    pub(crate) fn load(&self) -> Result<Option<PodKeys>, LatchError> {
        let Some(directory) = PrivateDirectory::open(&self.directory)? else { return Ok(None) };
        let bytes = match directory.read(FILE, FILE_MAX) {
            Err(error) if error.is_not_found() => return Ok(None),
            bytes => bytes?,
        };
        let broken = |fault: &str| {
            let path = self.directory.join(FILE);
            LatchError::Broken { path, fault: fault.to_owned() }
        };
        let text = std::str::from_utf8(&bytes).map_err(|_| broken("not text"))?;
        let keys =
            text.strip_prefix(HEADER).ok_or_else(|| broken("not written by this agent, or cut short"))?;
        PodKeys::from_text(keys).map(Some).map_err(|error| broken(&error.to_string()))
    }

    /// Stores the keys for the rest of this boot: whole or not at all.
    ///
    /// # Errors
    /// They could not be stored safely.
    pub(crate) fn store(&self, keys: &PodKeys) -> Result<(), LatchError> {
        let keys = keys.to_text()?;
        // Allocated in full first: a text that grows leaves copies behind.
        let mut text = Zeroizing::new(String::with_capacity(HEADER.len() + keys.len()));
        text.push_str(HEADER);
        text.push_str(&keys);
        Ok(PrivateDirectory::make(&self.directory)?.replace(FILE, text.as_bytes())?)
    }
}

#[cfg(test)]
#[path = "latch_tests.rs"]
mod tests;
