//! Directories that hold private files.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};
use zeroize::Zeroizing;

use crate::file_error::{FileError, PrivacyFault};
use crate::private_file::{Unfinished, check, check_replaceable, read_at};

/// Makes a directory (0700) if it does not exist, and checks that no other user can change what is in it. Links are
/// followed, and others may list it: the files in it are private themselves.
///
/// # Errors
/// It can't be made, is not ours, or others may write it.
pub fn own_directory(path: &Path) -> Result<(), FileError> {
    make(path)?;
    let directory = open_directory(path, OFlag::empty())?;
    check_directory(&directory, path, 0o022)
}

/// An open directory that no other user can list, read or write. One process at a time may write in it.
#[derive(Debug)]
pub struct PrivateDirectory {
    directory: File,
    path: PathBuf,
}

impl PrivateDirectory {
    /// Opens the directory. `None` if it does not exist.
    ///
    /// # Errors
    /// It can't be opened, is a link or no directory, is not ours, or is open to others.
    pub fn open(path: &Path) -> Result<Option<Self>, FileError> {
        let directory = match open_directory(path, OFlag::O_NOFOLLOW) {
            Err(error) if error.is_not_found() => return Ok(None),
            directory => directory?,
        };
        check_directory(&directory, path, 0o077)?;
        Ok(Some(Self { directory, path: path.to_owned() }))
    }

    /// Opens the directory. Makes it and its parents (0700) if they do not exist.
    ///
    /// # Errors
    /// Those of [`Self::open`], and it can't be made.
    pub fn make(path: &Path) -> Result<Self, FileError> {
        make(path)?;
        let gone = || FileError::io("opening", path)(io::ErrorKind::NotFound.into());
        Self::open(path)?.ok_or_else(gone)
    }

    /// Reads the private file `name`; see [`crate::private_file::read`].
    ///
    /// # Errors
    /// Those of [`crate::private_file::read`].
    pub fn read(&self, name: &str, max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
        read_at(self.fd(), Path::new(name), &self.path.join(name), max)
    }

    /// Writes the private file `name` (0600): whole, or not at all.
    ///
    /// # Errors
    /// It could not be written; what was there before still is.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        let temporary = PathBuf::from(format!("{name}.new"));
        let path = &self.path.join(name);
        let failed = |doing| move |errno: Errno| FileError::io(doing, path)(errno.into());
        check_replaceable(self.fd(), Path::new(name), path)?;
        // The name is always the same, so that the file that a crash has left behind is found here.
        match unlinkat(self.fd(), &temporary, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => {
                return Err(FileError::io("removing", &self.path.join(&temporary))(errno.into()));
            }
        }
        let unfinished = Unfinished::write(self.fd(), temporary, path, bytes)?;
        renameat(self.fd(), unfinished.name(), self.fd(), name).map_err(failed("renaming"))?;
        unfinished.keep();
        fsync(self.fd()).map_err(failed("syncing the directory of"))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn make(path: &Path) -> Result<(), FileError> {
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        // A file or a dangling link in its place: opening it says so.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(FileError::io("making the directory", path)),
    }
}

fn open_directory(path: &Path, flags: OFlag) -> Result<File, FileError> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Err(Errno::ELOOP | Errno::ENOTDIR) => Err(FileError::not_private(path, PrivacyFault::NotADirectory)),
        directory => directory.map(File::from).map_err(|errno| FileError::io("opening", path)(errno.into())),
    }
}

fn check_directory(directory: &File, path: &Path, forbidden: u32) -> Result<(), FileError> {
    let metadata = directory.metadata().map_err(FileError::io("checking", path))?;
    check(&metadata, path, forbidden, 0o700)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

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
    fn an_own_directory_may_be_a_link_and_be_listed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("link"));
        own_directory(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        symlink(&path, &link).unwrap();
        own_directory(&link).unwrap();
    }

    #[test]
    fn a_private_directory_is_neither_a_link_nor_open_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("link"));
        assert!(PrivateDirectory::open(&path).unwrap().is_none());
        PrivateDirectory::make(&path).unwrap();
        symlink(&path, &link).unwrap();
        let text = PrivateDirectory::make(&link).unwrap_err().to_string();
        assert!(text.contains("it is not a directory, or a symbolic link"), "{text}");
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        let text = PrivateDirectory::open(&path).unwrap_err().to_string();
        assert!(text.contains("(mode 0750): run chmod 0700 on it"), "{text}");
    }

    #[test]
    fn a_file_is_replaced_whole_and_a_leftover_removed() {
        let dir = tempfile::tempdir().unwrap();
        let directory = PrivateDirectory::make(&dir.path().join("a")).unwrap();
        assert!(directory.read("f", 9).unwrap_err().is_not_found());
        fs::write(dir.path().join("a/f.new"), "half of it").unwrap();
        directory.replace("f", b"one").unwrap();
        directory.replace("f", b"two").unwrap();
        assert_eq!(directory.read("f", 3).unwrap().as_slice(), b"two");
        assert!(matches!(directory.read("f", 2), Err(FileError::TooLarge { .. })));
        let names: Vec<_> =
            fs::read_dir(dir.path().join("a")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["f"]);
    }

    #[test]
    fn what_is_no_regular_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let directory = PrivateDirectory::make(&dir.path().join("a")).unwrap();
        fs::create_dir(dir.path().join("a/f")).unwrap();
        symlink("/dev/null", dir.path().join("a/g")).unwrap();
        for (name, reason) in [("f", "it is not a regular file"), ("g", "it is a symbolic link")] {
            let error = directory.replace(name, b"one").unwrap_err().to_string();
            assert_eq!(error, format!("{}/a/{name}: {reason}: move it away", dir.path().display()));
            assert!(!dir.path().join(format!("a/{name}.new")).exists());
        }
        assert!(dir.path().join("a/g").is_symlink());
    }
}
