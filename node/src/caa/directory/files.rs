//! Reading of the pods directory: only what its owner or we have written, never through a symbolic link in it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::geteuid;
use secure_comms_protocol::PodId;
use zeroize::Zeroizing;

/// The names of the file, the first that is there is read: cloud-api-adaptor up to v0.14 wrote `daemon.json`.
pub(super) const NAMES: [&str; 2] = ["apf.json", "daemon.json"];

/// The largest file that is read, in bytes. A file of a pod with few routes has some 3,000.
pub(super) const SIZE_MAX: u64 = 1024 * 1024;

/// Most entries of the pods directory that are looked at.
pub(super) const ENTRIES_MAX: usize = 20_000;

const WRITE_OF_GROUP_AND_OTHERS: u32 = 0o022;
const WRITE_OF_OTHERS: u32 = 0o002;

/// What tells one content of a file from the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(status: &FileStat) -> Self {
        Self {
            inode: status.st_ino,
            size: status.st_size,
            modified: (status.st_mtime, status.st_mtime_nsec),
            changed: (status.st_ctime, status.st_ctime_nsec),
        }
    }

    /// When the content was written; a time before 1970 counts as 1970.
    pub(super) fn written(&self) -> SystemTime {
        let seconds = u64::try_from(self.modified.0).unwrap_or(0);
        let nanoseconds = u32::try_from(self.modified.1).unwrap_or(0);
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds)
    }
}

/// What is in the place of a sandbox.
pub(super) enum Place {
    /// Nothing, or no directory.
    Nothing,
    /// A directory without the file.
    Empty(Stamp),
    /// A file, or what stands in its place.
    File(Stamp),
    /// It may not be read.
    Refused(Stamp),
}

/// The pods directory, open.
pub(super) struct Root {
    directory: OwnedFd,
    owner: u32,
    /// Device and inode: another one under the same path is another directory.
    pub(super) identity: (u64, u64),
}

impl Root {
    /// Opens it; a symbolic link in its path is followed, as /var/run is one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(path, flags, Mode::empty())?;
        let status = fstat(directory.as_fd())?;
        if status.st_mode & WRITE_OF_OTHERS != 0 {
            let fault = "every user of the node may write it; run chmod o-w on it";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, fault));
        }
        Ok(Self { directory, owner: status.st_uid, identity: (status.st_dev, status.st_ino) })
    }

    /// The names in it that can be a sandbox's; and whether there are more than are looked at.
    pub(super) fn ids(&self) -> io::Result<(Vec<PodId>, bool)> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // An open directory of its own: a duplicate would share the position.
        let mut directory = Dir::openat(self.directory.as_fd(), ".", flags, Mode::empty())?;
        let mut ids = Vec::new();
        for entry in directory.iter() {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if ids.len() == ENTRIES_MAX {
                return Ok((ids, true));
            }
            ids.push(id);
        }
        Ok((ids, false))
    }

    /// What is in the place of a sandbox, without reading it.
    pub(super) fn look(&self, id: &PodId) -> io::Result<Place> {
        Ok(match self.enter(id)? {
            Entered::Nothing => Place::Nothing,
            Entered::Refused(stamp, _) => Place::Refused(stamp),
            Entered::Directory(directory, stamp) => {
                find(&directory)?.map_or(Place::Empty(stamp), |(status, _)| Place::File(Stamp::of(&status)))
            }
        })
    }

    /// Reads the file of a sandbox. The stamp is older than the content: the next look sees what is written in between.
    pub(super) fn read(&self, id: &PodId) -> io::Result<Content> {
        let directory = match self.enter(id)? {
            Entered::Nothing => return Ok(Content::Nothing),
            Entered::Refused(stamp, reason) => return Ok(Content::Refused(stamp, reason)),
            Entered::Directory(directory, _) => directory,
        };
        let Some((status, name)) = find(&directory)? else { return Ok(Content::Nothing) };
        let refused = |reason: &str| Ok(Content::Refused(Stamp::of(&status), format!("{name}: {reason}")));
        // Non-blocking, so that a FIFO in its place does not block before it is recognised.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(Content::Nothing),
            Err(Errno::ELOOP) => return refused("it is a symbolic link, which is not followed"),
            Err(errno @ (Errno::EACCES | Errno::EPERM | Errno::ENXIO)) => return refused(errno.desc()),
            Err(errno) => return Err(errno.into()),
        };
        let opened = fstat(&file)?;
        let stamp = Stamp::of(&opened);
        if let Some(fault) = self.fault_of_file(&opened) {
            return Ok(Content::Refused(stamp, format!("{name}: {fault}")));
        }
        let size = u64::try_from(opened.st_size).unwrap_or(0).min(SIZE_MAX);
        // Allocated in full first: a vector that grows leaves copies of the private key behind that nothing wipes.
        let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
        file.take(size).read_to_end(&mut text)?;
        Ok(Content::Text(stamp, name, text))
    }

    fn enter(&self, id: &PodId) -> io::Result<Entered> {
        let status = match fstatat(&self.directory, id.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(Entered::Nothing),
            status => status?,
        };
        let stamp = Stamp::of(&status);
        match kind(&status) {
            SFlag::S_IFDIR => {}
            SFlag::S_IFLNK => {
                let reason = "its directory is a symbolic link, which is not followed".to_owned();
                return Ok(Entered::Refused(stamp, reason));
            }
            _ => return Ok(Entered::Nothing),
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = match openat(&self.directory, id.as_str(), flags, Mode::empty()) {
            // It was replaced just now; the next look sees what by.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Entered::Nothing),
            directory => directory?,
        };
        let opened = fstat(&directory)?;
        if !self.trusts(opened.st_uid) {
            let reason = format!("its directory belongs to user {}, who may not write it", opened.st_uid);
            return Ok(Entered::Refused(stamp, reason));
        }
        if opened.st_mode & WRITE_OF_OTHERS != 0 {
            return Ok(Entered::Refused(
                stamp,
                "every user may write its directory; run chmod o-w on it".to_owned(),
            ));
        }
        Ok(Entered::Directory(directory, stamp))
    }

    fn fault_of_file(&self, status: &FileStat) -> Option<String> {
        if kind(status) != SFlag::S_IFREG {
            return Some("it is not a regular file".to_owned());
        }
        if !self.trusts(status.st_uid) {
            return Some(format!("it belongs to user {}, who may not write it", status.st_uid));
        }
        if status.st_mode & WRITE_OF_GROUP_AND_OTHERS != 0 {
            return Some("other users may write it; run chmod go-w on it".to_owned());
        }
        let large = u64::try_from(status.st_size).is_ok_and(|size| size > SIZE_MAX);
        large.then(|| format!("it is larger than {SIZE_MAX} bytes"))
    }

    /// Root, we, and the owner of the pods directory, as some cloud-api-adaptors do not run as root.
    fn trusts(&self, owner: u32) -> bool {
        owner == 0 || owner == geteuid().as_raw() || owner == self.owner
    }
}

/// What a file has.
pub(super) enum Content {
    /// There is none.
    Nothing,
    /// It may not be read.
    Refused(Stamp, String),
    /// Its name and text.
    Text(Stamp, &'static str, Zeroizing<Vec<u8>>),
}

enum Entered {
    Nothing,
    Refused(Stamp, String),
    Directory(OwnedFd, Stamp),
}

fn find(directory: &OwnedFd) -> io::Result<Option<(FileStat, &'static str)>> {
    for name in NAMES {
        match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => {}
            status => return Ok(Some((status?, name))),
        }
    }
    Ok(None)
}

fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}
