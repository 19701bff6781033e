//! Why a private file can't be read or written.

use std::io;
use std::path::{Path, PathBuf};

/// Why a private file or directory can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("{doing} {}", .path.display())]
    Io {
        /// The operation, as "reading".
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
    /// Others could have written it, or could read it.
    #[error("{}: {fault}: {}", .path.display(), .fault.advice())]
    NotPrivate {
        /// Path of the file or directory.
        path: PathBuf,
        /// What is wrong with it.
        fault: PrivacyFault,
    },
    /// It is too large to be what it should be.
    #[error("{}: is larger than {max} bytes: it is not what its name says, move it away", .path.display())]
    TooLarge {
        /// Path of the file.
        path: PathBuf,
        /// The largest size that is read, in bytes.
        max: usize,
    },
}

/// Why a file or directory is not ours alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivacyFault {
    /// A symbolic link in place of a file.
    #[error("it is a symbolic link")]
    SymbolicLink,
    /// A directory, FIFO or device in place of a file.
    #[error("it is not a regular file")]
    NotAFile,
    /// A file or a symbolic link in place of a directory.
    #[error("it is not a directory, or a symbolic link")]
    NotADirectory,
    /// Another user owns it.
    #[error("it belongs to user {owner}, not to us (user {us})")]
    Foreign {
        /// The owner's user id.
        owner: u32,
        /// The effective user id of this process.
        us: u32,
    },
    /// Its mode lets others in.
    #[error("others may access it (mode {mode:04o})")]
    Mode {
        /// Its permission bits.
        mode: u32,
        /// The permission bits that it should have.
        wanted: u32,
    },
}

impl PrivacyFault {
    fn advice(&self) -> String {
        match self {
            Self::SymbolicLink | Self::NotAFile | Self::NotADirectory => "move it away".to_owned(),
            Self::Foreign { us, .. } => format!("run chown {us} on it if it is ours"),
            Self::Mode { wanted, .. } => {
                format!("run chmod {wanted:04o} on it, and make new keys if they did")
            }
        }
    }
}

impl FileError {
    /// For `map_err`.
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn not_private(path: &Path, fault: PrivacyFault) -> Self {
        Self::NotPrivate { path: path.to_owned(), fault }
    }

    /// Whether the file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the system denies us access.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Whether the file system is mounted read-only.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
    }

    /// Whether the disk is full, or the user's share of it.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}
