//! The latched keys: stored until the VM reboots, so that a restarted agent does not attest again.
//!
//! The directory must be on a tmpfs, which is encrypted memory in a confidential VM, unless the operator says otherwise. Everything here fails closed: a file
//! that another user could have written, or that can't be read, is an error and never "no keys". Without keys the agent
//! would attest again, and an attacker that answers as the KBS would own a VM that already runs a pod.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
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
    /// Another user could use the directory.
    #[error("checking -secure-comms-state-dir {}: {fault}; {}", path.display(), directory_advice(path, *fault))]
    Directory {
        /// Path of the directory.
        path: PathBuf,
        /// The fault.
        fault: PrivacyFault,
    },
    /// The directory is not in memory.
    #[error(
        "checking -secure-comms-state-dir {}: it is not on a tmpfs or ramfs: the keys of this boot would reach a disk, where \
         the host can read them; name a directory below /run, or set -secure-comms-state-dir-on-disk if the disk is \
         encrypted with a key of this VM", .0.display()
    )]
    OnDisk(PathBuf),
    /// Another user could have written the keys or could read them.
    #[error(
        "checking the latched keys in {}: {fault}; it must be ours alone; reboot the VM to start over", path.display()
    )]
    Exposed {
        /// Path of the file.
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

fn directory_advice(path: &Path, fault: PrivacyFault) -> String {
    let path = path.display();
    match fault {
        PrivacyFault::Mode { wanted, .. } => {
            format!("run chmod {wanted:04o} {path}, or name another directory")
        }
        PrivacyFault::Foreign { us, .. } => format!("run chown {us} {path}, or name another directory"),
        _ => "name a directory, which is made if it does not exist".to_owned(),
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

    /// Checks the directory, and the keys in it. `may_be_on_disk`: the operator says that the disk is encrypted with a key of
    /// this VM, which can't be seen here.
    ///
    /// # Errors
    /// Those of [`Self::load`], or it is on a disk.
    pub(crate) fn check(&self, may_be_on_disk: bool) -> Result<(), LatchError> {
        self.load()?;
        if is_in_memory(&self.directory) {
            return Ok(());
        }
        if !may_be_on_disk {
            return Err(LatchError::OnDisk(self.directory.clone()));
        }
        log::warn!(
            "-secure-comms-state-dir {}: it is not on a tmpfs: unless its disk is encrypted with a key of this VM, the host \
             can read the keys of this boot; they outlast a reboot",
            self.directory.display()
        );
        Ok(())
    }

    /// Reads the keys of this boot; `None` if none were stored.
    ///
    /// # Errors
    /// The keys exist and can't be trusted or read. The caller must not continue without them.
    pub(crate) fn load(&self) -> Result<Option<PodKeys>, LatchError> {
        let open = PrivateDirectory::open(&self.directory).map_err(|error| self.fault(error))?;
        let Some(directory) = open else { return Ok(None) };
        let bytes = match directory.read(FILE, FILE_MAX) {
            Err(error) if error.is_not_found() => return Ok(None),
            bytes => bytes.map_err(|error| self.fault(error))?,
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
        PrivateDirectory::make(&self.directory)
            .and_then(|directory| directory.replace(FILE, text.as_bytes()))
            .map_err(|error| self.fault(error))
    }

    fn fault(&self, error: FileError) -> LatchError {
        match error {
            FileError::Io { doing, path, source } => LatchError::Io { doing, path, source },
            FileError::NotPrivate { path, fault } if path == self.directory => {
                LatchError::Directory { path, fault }
            }
            FileError::NotPrivate { path, fault } => LatchError::Exposed { path, fault },
            FileError::TooLarge { path, max } => {
                LatchError::Broken { path, fault: format!("larger than {max} bytes") }
            }
        }
    }
}

/// The magic number of a ramfs (statfs(2)).
const RAMFS: u64 = 0x8584_58f6;

/// Whether a directory is on a tmpfs or ramfs. One that does not exist is on the file system of its nearest parent.
fn is_in_memory(directory: &Path) -> bool {
    let mut found = directory.ancestors().filter_map(|path| statfs(path).ok());
    // A system that can't be asked is not known to be memory.
    found.next().is_some_and(|found| {
        let kind = found.filesystem_type();
        kind == TMPFS_MAGIC || u64::try_from(kind.0).is_ok_and(|kind| kind == RAMFS)
    })
}

#[cfg(test)]
#[path = "latch_tests.rs"]
mod tests;
