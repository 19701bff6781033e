//! Makes file systems.

use std::path::Path;
use std::time::Duration;

use crate::program::{self, ProgramError};
use crate::volume::FileSystem;

/// Limit for making a file system. Inode tables are made later, by the kernel: it takes seconds, also for large disks.
const LIMIT: Duration = Duration::from_secs(120);

/// Makes a file system on an empty disk. The disk is not trimmed before: it is new.
///
/// # Errors
/// The program for it is not in the image, fails, or takes longer than 120 s.
pub fn make(fs: FileSystem, node: &Path) -> Result<(), ProgramError> {
    let (name, args): (_, &[&str]) = match fs {
        FileSystem::Ext4 => ("mkfs.ext4", &["-q", "-E", "nodiscard"]),
        FileSystem::Ext3 => ("mkfs.ext3", &["-q", "-E", "nodiscard"]),
        FileSystem::Xfs => ("mkfs.xfs", &["-q", "-K"]),
    };
    let node = node.to_string_lossy();
    let args: Vec<&str> = args.iter().copied().chain([&*node]).collect();
    program::succeed(&program::find(name)?, &args, LIMIT).map(drop)
}

/// Makes the file system of the scratch disk: without a journal, since nothing survives the boot, and without reserved
/// blocks.
///
/// # Errors
/// As of [`make`].
pub fn make_scratch(node: &Path) -> Result<(), ProgramError> {
    let node = node.to_string_lossy();
    let args = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard", &node];
    program::succeed(&program::find("mkfs.ext4")?, &args, LIMIT).map(drop)
}
