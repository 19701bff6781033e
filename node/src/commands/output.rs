//! Where a command writes a secret: a new private file, or a stream that was there before. Devices, FIFOs and symbolic
//! links are never replaced by a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use nix::unistd::geteuid;
use secure_comms_keys::{FileError, private_file};

use super::print;

/// Why a secret is not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    /// The file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is at the path is no place for a secret.
    #[error("--output {}: {reason}", .path.display())]
    Refused {
        /// The path, as the user gave it.
        path: PathBuf,
        /// What is there, and what to do.
        reason: String,
    },
}

/// Where a secret goes.
#[derive(Debug)]
pub(crate) enum Output {
    /// Standard output.
    Standard,
    /// A regular file, which is written whole (mode 0600) and replaces the one that was there.
    File(PathBuf),
    /// An open device or FIFO, and its path.
    Stream(File, PathBuf),
}

impl Output {
    /// Opens `--output`; `-` and no path are standard output. Waits for the reader of a FIFO, and calls `waiting` before.
    ///
    /// A symbolic link is followed to a device, a FIFO or our own standard output, as /dev/stdout is one. It is refused
    /// if it leads to a file or nowhere: a user who may write its directory would choose the file that we overwrite.
    ///
    /// # Errors
    /// The path leads to a directory, a socket, a disk, a link as above, a FIFO of another user, or cannot be opened.
    pub(crate) fn open(path: Option<&Path>, waiting: impl FnOnce()) -> Result<Self, OutputError> {
        let Some(path) = path.filter(|path| *path != Path::new("-")) else { return Ok(Self::Standard) };
        let there = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::File(path.to_owned())),
            there => there.map_err(FileError::io("writing", path))?,
        };
        if there.file_type().is_symlink() {
            return follow(path, &there, waiting);
        }
        if there.is_file() {
            return Ok(Self::File(path.to_owned()));
        }
        if there.file_type().is_fifo() {
            refuse_foreign(path, &there)?;
        }
        stream(path, there.file_type(), OFlag::O_NOFOLLOW, waiting)
    }

    /// Whether a person sees what is written.
    pub(crate) fn is_terminal(&self) -> bool {
        match self {
            Self::Standard => io::stdout().is_terminal(),
            Self::File(_) => false,
            Self::Stream(file, _) => file.is_terminal(),
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// They cannot be written. A file that was there before is unchanged then.
    pub(crate) fn write(self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Standard => print(bytes),
            Self::File(path) => Ok(private_file::replace(&path, bytes)?),
            Self::Stream(mut file, path) => {
                Ok(file.write_all(bytes).map_err(FileError::io("writing", &path))?)
            }
        }
    }
}

fn refused(path: &Path, reason: impl Into<String>) -> OutputError {
    OutputError::Refused { path: path.to_owned(), reason: reason.into() }
}

/// Another user could read the secret, or lead it elsewhere. Root's links, such as /dev/stdout, are the system's.
fn refuse_foreign(path: &Path, there: &fs::Metadata) -> Result<(), OutputError> {
    let (owner, us) = (there.uid(), geteuid().as_raw());
    if owner == us || (there.file_type().is_symlink() && owner == 0) {
        return Ok(());
    }
    Err(refused(path, format!("it belongs to user {owner}, not to us (user {us}): give another path")))
}

fn follow(path: &Path, link: &fs::Metadata, waiting: impl FnOnce()) -> Result<Output, OutputError> {
    let target = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refused(
                path,
                "it is a symbolic link to nothing: remove it, or give the path of a file",
            ));
        }
        target => target.map_err(FileError::io("writing", path))?,
    };
    // A redirection: writing through keeps what `>>` has, and standard output may be a socket, which cannot be opened.
    let stdout = fstat(io::stdout().as_fd()).map_err(|errno| FileError::io("writing", path)(errno.into()))?;
    if (target.dev(), target.ino()) == (stdout.st_dev, stdout.st_ino) {
        return Ok(Output::Standard);
    }
    refuse_foreign(path, link)?;
    if target.is_file() {
        return Err(refused(path, "it is a symbolic link to a file: give the path of the file itself"));
    }
    stream(path, target.file_type(), OFlag::empty(), waiting)
}

fn stream(
    path: &Path,
    kind: fs::FileType,
    more: OFlag,
    waiting: impl FnOnce(),
) -> Result<Output, OutputError> {
    if kind.is_dir() {
        return Err(refused(path, "it is a directory: give the path of a file in it"));
    }
    if !kind.is_fifo() && !kind.is_char_device() {
        return Err(refused(path, "it is neither a file nor a stream: give the path of a file"));
    }
    // Never O_CREAT: no file takes the place of a stream that was removed since the check.
    let open = |flags: OFlag| OpenOptions::new().write(true).custom_flags((flags | more).bits()).open(path);
    let failed = || FileError::io("writing", path);
    // Closing a trial open would end a reader that came for it, so a trial that works is what is used.
    let opened = match open(OFlag::O_NOCTTY | OFlag::O_NONBLOCK) {
        Err(error) if kind.is_fifo() && error.raw_os_error() == Some(Errno::ENXIO as i32) => {
            waiting();
            open(OFlag::O_NOCTTY)
        }
        opened => opened,
    };
    let file = opened.map_err(failed())?;
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|errno| failed()(errno.into()))?;
    if file.metadata().map_err(failed())?.file_type() != kind {
        return Err(refused(path, "it was replaced while it was opened: run the command again"));
    }
    Ok(Output::Stream(file, path.to_owned()))
}
