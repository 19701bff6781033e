//! Where the kernel's and udev's file systems are: fixed in a VM, a folder of a test otherwise.

use std::path::{Path, PathBuf};

/// The file systems through which disks are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Device nodes, and udev's links to them.
    pub dev: PathBuf,
    /// sysfs.
    pub sys: PathBuf,
    /// The file that lists the mounts of this process.
    pub mountinfo: PathBuf,
}

impl Roots {
    /// Those of this system.
    #[must_use]
    pub fn system() -> Self {
        Self { dev: "/dev".into(), sys: "/sys".into(), mountinfo: "/proc/self/mountinfo".into() }
    }

    /// Those below a folder, with the same names.
    #[must_use]
    pub fn below(folder: &Path) -> Self {
        Self {
            dev: folder.join("dev"),
            sys: folder.join("sys"),
            mountinfo: folder.join("proc/self/mountinfo"),
        }
    }
}
