//! Files that hold secrets: read only if nobody else can, written whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use zeroize::Zeroizing;

/// What the names of unfinished files start with. No pod id can.
pub(crate) const TEMP_PREFIX: &str = ".tmp-";

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system said no.
    #[error("{doing} {}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("{}: others may access it (mode {mode:04o}): run chmod {advice} on it, and make new keys if they did", .path.display())]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What they should be.
        advice: &'static str,
    },
    /// It belongs to someone else.
    #[error("{}: belongs to user {owner}, not to us (user {us}): run chown {us} on it if it is ours", .path.display())]
    Foreign {
        /// The file or directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// It is not a file.
    #[error("{}: is not a regular file (links are refused): move it away", .0.display())]
    NotAFile(PathBuf),
    /// It is too large to be what it should be.
    #[error("{}: is larger than {max} bytes: it is not what its name says, move it away", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most it may have, in bytes.
        max: usize,
    },
}

impl FileError {
    /// For `map_err`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether the file is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether its disk can't be written.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
    }
}

fn check_owner(path: &Path, owner: u32) -> Result<(), FileError> {
    let us = nix::unistd::geteuid().as_raw();
    if owner == us { Ok(()) } else { Err(FileError::Foreign { path: path.to_owned(), owner, us }) }
}

/// Reads a file that is ours alone.
///
/// # Errors
/// It is not there, not a plain file, not ours, open to others, or larger than `max` bytes.
pub fn read(path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Non-blocking, so that a FIFO in its place does not hang us before it is recognised.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(|source| {
        if source.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) {
            FileError::NotAFile(path.to_owned())
        } else {
            FileError::Io { doing: "read", path: path.to_owned(), source }
        }
    })?;
    let meta = file.metadata().map_err(FileError::io("read", path))?;
    if !meta.is_file() {
        return Err(FileError::NotAFile(path.to_owned()));
    }
    check_owner(path, meta.uid())?;
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), mode, advice: "0600" });
    }
    let too_large = || FileError::TooLarge { path: path.to_owned(), max };
    let len = usize::try_from(meta.len()).ok().filter(|&len| len <= max).ok_or_else(too_large)?;
    // Room for all of it at once: a vector that grows leaves copies behind that nobody wipes.
    let mut bytes = Zeroizing::new(Vec::with_capacity(len + 1));
    file.take(len as u64).read_to_end(&mut bytes).map_err(FileError::io("read", path))?;
    Ok(bytes)
}

/// Makes a directory that is ours alone, if it is not there, and checks that nobody else can change what is in it.
///
/// # Errors
/// It cannot be made, is not ours, or others may write it.
pub fn own_directory(path: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(FileError::io("make directory", path))?;
    let meta = fs::metadata(path).map_err(FileError::io("read directory", path))?;
    check_owner(path, meta.uid())?;
    let mode = meta.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), mode, advice: "0700" });
    }
    Ok(())
}

/// A file under a temporary name; gone when dropped, unless it got its real one.
struct Unfinished {
    path: PathBuf,
    named: bool,
}

impl Unfinished {
    fn write(directory: &Path, bytes: &[u8]) -> Result<Self, FileError> {
        let path = directory.join(format!("{TEMP_PREFIX}{:032x}", rand::random::<u128>()));
        let failed = || FileError::io("write", &path);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed())?;
        let unfinished = Self { path: path.clone(), named: false };
        // Whatever the umask says.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed())?;
        file.write_all(bytes).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        Ok(unfinished)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.named {
            // A leftover holds nothing that its reader may not have, and is cleaned up at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in a directory outlast a crash.
pub(crate) fn sync_directory(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(FileError::io("sync directory", path))
}

/// Writes `path` (0600), in place of what was there.
///
/// # Errors
/// It could not be written; what was there before still is.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let directory = directory_of(path);
    let mut unfinished = Unfinished::write(directory, bytes)?;
    fs::rename(&unfinished.path, path).map_err(FileError::io("write", path))?;
    unfinished.named = true;
    sync_directory(directory)
}

/// Writes `path` (0600) if nobody has yet: of two that race, one gets `true`.
///
/// # Errors
/// It could not be written.
pub fn create(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let directory = directory_of(path);
    let unfinished = Unfinished::write(directory, bytes)?;
    // A link, unlike a rename, never replaces.
    match fs::hard_link(&unfinished.path, path) {
        Ok(()) => sync_directory(directory).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(FileError::Io { doing: "write", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        read(path, 100).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_written_whole_for_us_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert!(create(&path, b"one").unwrap());
        assert!(!create(&path, b"two").unwrap());
        assert_eq!(read(&path, 3).unwrap().as_slice(), b"one");
        replace(&path, b"three").unwrap();
        assert_eq!(read(&path, 100).unwrap().as_slice(), b"three");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left behind");
    }

    #[test]
    fn a_file_that_others_may_access_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"x").unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let expected = format!(
                "{}: others may access it (mode {mode:04o}): run chmod 0600 on it, and make new keys if they did",
                path.display()
            );
            assert_eq!(refusal(&path), expected);
        }
    }

    #[test]
    fn links_directories_fifos_and_large_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        replace(&at("file"), &[0; 101]).unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        for name in ["link", "directory", "fifo"] {
            assert!(refusal(&at(name)).contains("is not a regular file"), "{name}");
        }
        assert!(refusal(&at("file")).contains("is larger than 100 bytes"));
        assert!(read(&at("none"), 1).unwrap_err().is_not_found());
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        own_directory(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
        fs::set_permissions(&path, Permissions::from_mode(0o770)).unwrap();
        assert!(own_directory(&path).unwrap_err().to_string().contains("run chmod 0700 on it"));
    }

    #[test]
    fn a_file_of_someone_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"x").unwrap();
        match std::os::unix::fs::chown(&path, Some(12345), None) {
            Ok(()) => assert!(refusal(&path).contains("belongs to user 12345")),
            // Only root can give a file away; anybody else has root's files to try.
            Err(_) => assert!(refusal(Path::new("/etc/hostname")).contains("belongs to user 0")),
        }
    }
}
