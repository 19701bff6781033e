//! File systems: those of the kernel, the root, and the switch from the initramfs to the root.

use std::fs;
use std::os::unix::fs::chroot;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::failure::{Context, Failure};

const NO_TYPE: Option<&str> = None;

fn attach(what: &str, fs_type: &str, at: &str, flags: MsFlags, options: Option<&str>) -> Result<(), Failure> {
    fs::create_dir_all(at).context(|| format!("creating {at}"))?;
    mount(Some(what), at, Some(fs_type), flags, options)
        .context(|| format!("mounting {what} ({fs_type}) on {at}"))
}

/// Mounts /proc, /sys and /dev, which [`switch_root`] moves into the root.
///
/// # Errors
/// A mount fails.
pub fn kernel_file_systems() -> Result<(), Failure> {
    // The flags that systemd uses; it keeps existing mounts.
    let data = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    attach("devtmpfs", "devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755"))?;
    attach("proc", "proc", "/proc", data, None)?;
    attach("sysfs", "sysfs", "/sys", data, None)
}

/// Mounts an empty /run, for a PID 1 that stays in the initramfs.
///
/// # Errors
/// The mount fails.
pub fn run() -> Result<(), Failure> {
    attach("tmpfs", "tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
}

/// Mounts the erofs of `device` read-only at `at`.
///
/// # Errors
/// The mount fails.
pub fn root(device: &Path, at: &str) -> Result<(), Failure> {
    attach(&device.to_string_lossy(), "erofs", at, MsFlags::MS_RDONLY, None)
}

/// Makes the file system at `to` the root, and moves /dev, /proc and /sys into it. Removes the files of the initramfs
/// first, because nothing would free their memory later.
///
/// # Errors
/// A step fails.
pub fn switch_root(to: &str) -> Result<(), Failure> {
    for dir in ["/dev", "/proc", "/sys"] {
        let target = format!("{to}{dir}");
        mount(Some(dir), target.as_str(), NO_TYPE, MsFlags::MS_MOVE, NO_TYPE)
            .context(|| format!("moving {dir} to {target}"))?;
    }
    fs::remove_dir_all("/lib").and_then(|()| fs::remove_file("/init")).context(|| "freeing the initramfs")?;
    std::env::set_current_dir(to).context(|| format!("entering {to}"))?;
    mount(Some("."), "/", NO_TYPE, MsFlags::MS_MOVE, NO_TYPE).context(|| format!("moving {to} to /"))?;
    chroot(".").and_then(|()| std::env::set_current_dir("/")).context(|| "entering the new root")
}
