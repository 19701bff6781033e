//! Mounts and unmounts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, fchown, syncfs};

use crate::volume::FileSystem;

/// Mode of a volume with a group: the group may write, and what is made there has the group.
const GROUP_MODE: u32 = 0o2775;

/// How long a mount in use is waited for.
#[derive(Clone, Copy, Debug)]
pub struct BusyLimit {
    /// Number of attempts.
    pub attempts: u32,
    /// Pause between them.
    pub pause: Duration,
}

/// How an unmount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// The file system is closed, or has other mounts.
    Fully,
    /// It was in use: it is out of sight, and closed once its last user ends.
    Lazily,
}

/// Makes the directory for a mount, and its parent, both for root only.
///
/// # Errors
/// One of them can't be made, or is no directory. A link is none: the mount would come to lie where it leads, and not count.
pub fn make_directory(at: &Path) -> io::Result<()> {
    // The parent first: nothing is made where a link leads.
    for directory in at.parent().into_iter().chain([at]) {
        if !is_directory(directory)? {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
    }
    Ok(())
}

/// Whether the directory is there.
///
/// # Errors
/// A link or something else is in its place, or it can't be looked at.
pub fn is_directory(path: &Path) -> io::Result<bool> {
    let what = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        there => {
            if there?.is_symlink() {
                "a link"
            } else {
                "a file"
            }
        }
    };
    let why = format!("{} is {what}, not a directory", path.display());
    Err(io::Error::new(io::ErrorKind::NotADirectory, why))
}

/// Mounts the file system of a disk.
///
/// # Errors
/// The kernel refuses.
pub fn attach(node: &Path, fs: FileSystem, at: &Path, read_only: bool) -> io::Result<()> {
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, read_only);
    // The superblock, which is the disk's word, could ask for a panic of the kernel at an error.
    let options = match fs {
        FileSystem::Ext4 | FileSystem::Ext3 => Some("errors=remount-ro"),
        // A clone of a volume has its UUID. That no disk is mounted twice was checked before.
        FileSystem::Xfs => Some("nouuid"),
    };
    match mount(Some(node), at, Some(fs.name()), flags, options) {
        // The kernel's text would not say what is to be done: a journal has to be replayed.
        Err(Errno::EROFS) if read_only => Err(io::Error::new(
            io::ErrorKind::ReadOnlyFilesystem,
            "it is read-only, and its file system was not unmounted: attach it once for writing",
        )),
        // What the kernel says of a superblock that it does not take.
        Err(error @ (Errno::EINVAL | Errno::EUCLEAN | Errno::EBADMSG)) => {
            let error = io::Error::from(error);
            let why = format!(
                "{error}: its {} is damaged, or has a feature that this kernel lacks (the kernel's log says which)",
                fs.name()
            );
            Err(io::Error::new(error.kind(), why))
        }
        result => result.map_err(io::Error::from),
    }
}

/// Sets the flags of [`attach`] on a mount that another program made.
///
/// # Errors
/// Nothing is mounted there, or the kernel refuses.
pub fn restrict(at: &Path, read_only: bool) -> io::Result<()> {
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, read_only);
    mount(None::<&Path>, at, None::<&str>, flags, None::<&str>).map_err(io::Error::from)
}

/// Gives the root directory of the mounted file system to the group.
///
/// # Errors
/// The file system refuses.
pub fn give_to_group(at: &Path, group: Gid) -> io::Result<()> {
    let root = open_directory(at)?;
    fchown(&root, None, Some(group))?;
    // After the change of the owner, which clears the set-group-id bit.
    fchmod(&root, Mode::from_bits_truncate(GROUP_MODE)).map_err(io::Error::from)
}

/// Writes what the file system at `at` still has in memory to its disk: an unmount does not, while the file system is mounted
/// elsewhere or is only detached.
///
/// # Errors
/// The disk takes it not.
pub fn flush(at: &Path) -> io::Result<()> {
    syncfs(open_directory(at)?).map_err(io::Error::from)
}

fn open_directory(at: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(at)
}

/// Unmounts; if it stays in use, detaches the mount.
///
/// # Errors
/// Nothing is mounted there, or the kernel refuses.
pub fn detach(at: &Path, limit: BusyLimit) -> io::Result<Unmounted> {
    for attempt in 1..=limit.attempts {
        match umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) if attempt < limit.attempts => sleep(limit.pause),
            Err(Errno::EBUSY) => {}
            result => return result.map(|()| Unmounted::Fully).map_err(io::Error::from),
        }
    }
    umount2(at, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?;
    Ok(Unmounted::Lazily)
}
