//! Files that hold secrets: read only if no other user can have written or can read them, written whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use zeroize::Zeroizing;

use crate::file_error::{FileError, PrivacyFault};

/// The names of unfinished files start with this. A crash may leave such files behind. No pod id starts so.
pub const TEMP_PREFIX: &str = ".tmp-";

const GROUP_AND_OTHERS: u32 = 0o077;
const WRITE_OF_GROUP_AND_OTHERS: u32 = 0o022;

/// Reads a file that is ours alone.
///
/// # Errors
/// It does not exist, is a link or no regular file, is not ours, is open to others, or is larger than `max` bytes.
pub fn read(path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_at(AT_FDCWD, path, path, max)
}

/// Reads a file that no other user can have written, and that others may read.
///
/// # Errors
/// It does not exist, is a link or no regular file, is not ours, others may write it, or it is larger than `max` bytes.
pub fn read_ours(path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_checked(AT_FDCWD, path, path, max, (WRITE_OF_GROUP_AND_OTHERS, 0o644))
}

/// Reads the file `name` of an open directory; `path` names it in errors.
pub(crate) fn read_at(
    directory: BorrowedFd<'_>,
    name: &Path,
    path: &Path,
    max: usize,
) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read_checked(directory, name, path, max, (GROUP_AND_OTHERS, 0o600))
}

/// Reads a file whose mode has no bit of `forbidden`; an error says to give it the mode `wanted`.
fn read_checked(
    directory: BorrowedFd<'_>,
    name: &Path,
    path: &Path,
    max: usize,
    (forbidden, wanted): (u32, u32),
) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Non-blocking, so that a FIFO in its place does not block before it is recognised.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(directory, name, flags, Mode::empty()) {
        Err(Errno::ELOOP) => return Err(FileError::not_private(path, PrivacyFault::SymbolicLink)),
        file => File::from(file.map_err(|errno| FileError::io("reading", path)(errno.into()))?),
    };
    let metadata = file.metadata().map_err(FileError::io("reading", path))?;
    if !metadata.is_file() {
        return Err(FileError::not_private(path, PrivacyFault::NotAFile));
    }
    check(&metadata, path, forbidden, wanted)?;
    let too_large = || FileError::TooLarge { path: path.to_owned(), max };
    let length = usize::try_from(metadata.len()).ok().filter(|&length| length <= max);
    let length = length.ok_or_else(too_large)?;
    // Allocated in full first: a vector that grows leaves copies behind that nothing wipes.
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    file.take(length as u64).read_to_end(&mut bytes).map_err(FileError::io("reading", path))?;
    Ok(bytes)
}

/// Checks the owner, and that no bit of `forbidden` is set. The metadata must be that of an open file, so that the file
/// can't be exchanged after the check.
pub(crate) fn check(
    metadata: &fs::Metadata,
    path: &Path,
    forbidden: u32,
    wanted: u32,
) -> Result<(), FileError> {
    let (owner, us) = (metadata.uid(), geteuid().as_raw());
    if owner != us {
        return Err(FileError::not_private(path, PrivacyFault::Foreign { owner, us }));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & forbidden != 0 {
        return Err(FileError::not_private(path, PrivacyFault::Mode { mode, wanted }));
    }
    Ok(())
}

/// A file under a temporary name, written and synced; removed on drop, unless it got its real name.
pub(crate) struct Unfinished<'a> {
    directory: BorrowedFd<'a>,
    name: PathBuf,
    named: bool,
}

impl<'a> Unfinished<'a> {
    /// Writes a new file `name` (0600) of an open directory; `path` names it in errors.
    pub(crate) fn write(
        directory: BorrowedFd<'a>,
        name: PathBuf,
        path: &Path,
        bytes: &[u8],
    ) -> Result<Self, FileError> {
        let failed = || FileError::io("writing", path);
        // O_EXCL makes sure that the file is new, and so ours.
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, &name, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut file = File::from(file.map_err(|errno| failed()(errno.into()))?);
        let unfinished = Self { directory, name, named: false };
        // The umask may have cleared more bits.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed())?;
        file.write_all(bytes).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        Ok(unfinished)
    }

    fn next_to(path: &Path, bytes: &[u8]) -> Result<Self, FileError> {
        // Errors name the file that was asked for: the caller has not heard of the temporary one.
        Self::write(AT_FDCWD, directory_of(path).join(temporary_name(path)?), path, bytes)
    }

    /// Keeps the file: it has been renamed.
    pub(crate) fn keep(mut self) {
        self.named = true;
    }

    pub(crate) fn name(&self) -> &Path {
        &self.name
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.named {
            // Best effort: the caller needs to see the first error, and leftovers are removed at the next start.
            let _ = unlinkat(self.directory, &self.name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn temporary_name(path: &Path) -> Result<String, FileError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| FileError::io("writing", path)(io::Error::other(error)))?;
    Ok(format!("{TEMP_PREFIX}{:032x}", u128::from_be_bytes(bytes)))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in a directory outlast a crash.
///
/// # Errors
/// It can't be opened or synced.
pub fn sync_directory(path: &Path) -> Result<(), FileError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(FileError::io("syncing the directory", path))
}

/// Refuses to replace what is not a regular file: a rename would put a file in the place of a device, a FIFO or a
/// symbolic link such as /dev/stdout, for the whole machine.
pub(crate) fn check_replaceable(
    directory: BorrowedFd<'_>,
    name: &Path,
    path: &Path,
) -> Result<(), FileError> {
    let kind = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(FileError::io("writing", path)(errno.into())),
        Ok(status) => SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT,
    };
    match kind {
        SFlag::S_IFREG => Ok(()),
        SFlag::S_IFLNK => Err(FileError::not_private(path, PrivacyFault::SymbolicLink)),
        _ => Err(FileError::not_private(path, PrivacyFault::NotAFile)),
    }
}

/// Writes `path` (0600) and replaces the file that was there. The directory's owner and mode are not
/// checked.
///
/// # Errors
/// It could not be written, or what is there is no regular file; what was there before still is.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    check_replaceable(AT_FDCWD, path, path)?;
    let unfinished = Unfinished::next_to(path, bytes)?;
    fs::rename(unfinished.name(), path).map_err(FileError::io("writing", path))?;
    unfinished.keep();
    sync_directory(directory_of(path))
}

/// Writes `path` (0600) if it does not exist yet: of two that race, one gets `true`.
///
/// # Errors
/// It could not be written.
pub fn create(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let created = create_unsynced(path, bytes)?;
    if created {
        sync_directory(directory_of(path))?;
    }
    Ok(created)
}

/// As [`create`], but its name outlasts a crash only after [`sync_directory`]: for several files of one directory.
///
/// # Errors
/// It could not be written.
pub fn create_unsynced(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let unfinished = Unfinished::next_to(path, bytes)?;
    // A link, unlike a rename, never replaces.
    match fs::hard_link(unfinished.name(), path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(FileError::io("writing", path)(source)),
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
        assert!(refusal(&at("link")).contains("it is a symbolic link: move it away"));
        for name in ["directory", "fifo"] {
            assert!(refusal(&at(name)).contains("it is not a regular file: move it away"), "{name}");
        }
        assert!(refusal(&at("file")).contains("is larger than 100 bytes"));
        assert!(read(&at("none"), 1).unwrap_err().is_not_found());
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("target"), "kept").unwrap();
        for (link, target) in
            [("link", "target"), ("dangling", "none"), ("loop", "loop"), ("null", "/dev/null")]
        {
            std::os::unix::fs::symlink(target, at(link)).unwrap();
        }
        fs::create_dir(at("directory")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRUSR).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let kinds = || {
            let names = ["link", "dangling", "loop", "null", "directory", "fifo", "socket"];
            names.map(|name| (name, fs::symlink_metadata(at(name)).unwrap().file_type()))
        };
        let before = kinds();
        for (name, kind) in &before {
            let error = replace(&at(name), b"secret").unwrap_err().to_string();
            let reason = if kind.is_symlink() { "it is a symbolic link" } else { "it is not a regular file" };
            assert_eq!(error, format!("{}: {reason}: move it away", at(name).display()));
        }
        assert_eq!(kinds(), before);
        assert_eq!(fs::read(at("target")).unwrap(), b"kept");
        assert!(!at("none").exists());
        assert!(
            fs::read_dir(dir.path())
                .unwrap()
                .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with(TEMP_PREFIX) })
        );
    }

    #[test]
    fn an_error_names_the_file_that_was_asked_for() {
        let path = Path::new("/nodir/x");
        for error in [replace(path, b"x").unwrap_err(), create(path, b"x").unwrap_err()] {
            assert_eq!(error.to_string(), "writing /nodir/x");
        }
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
