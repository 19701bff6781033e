//! The scratch disk: an encrypted disk for the images that the guest pulls, with a key that only the kernel keeps.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use zeroize::Zeroizing;

use crate::block::{self, Device};
use crate::format;
use crate::log;
use crate::mappings::Mappings;
use crate::mountinfo::{self, DeviceNumber, Mount};
use crate::mounting::{Patience, Woken};
use crate::mounts;
use crate::program::ProgramError;
use crate::roots::Roots;
use crate::signature;
use crate::spare::{self, NoSpace, Partitions};
use crate::volume::FileSystem;

/// File with which the user data asks for the disk, as in cloud-api-adaptor.
pub const MARKER: &str = "/run/peerpod/scratch-space.marker";
/// Where it is mounted: where the guest's programs keep images.
pub const MOUNT_POINT: &str = "/run/kata-containers/image";
/// Its name in the device mapper.
pub const MAPPING: &str = "podvm-scratch";
/// Label of its partition, as in cloud-api-adaptor; serial number of its disk, if it has one of its own.
pub const LABEL: &str = "trusted_store";

/// Number of attempts to find the disk.
const ATTEMPTS: u32 = 60;
/// Number of attempts to remove the mapping of an earlier run, which a program that was killed with it may hold for a moment.
const REMOVALS: u32 = 20;
/// Pause between two of them.
const DELAY: Duration = Duration::from_millis(500);
/// Bytes of the key: two keys of AES-256, for XTS.
const KEY: usize = 64;
/// Sectors of 512 bytes in one of dm-crypt's, which are of 4096 bytes: fewer to encrypt.
const SECTORS: u64 = 8;

/// There is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// sysfs or the mounts can't be read.
    #[error("looking for the disk")]
    Search(#[source] io::Error),
    /// No disk is for it.
    #[error(
        "no unused partition with the GPT label {LABEL}, no disk without partitions with the serial number {LABEL}, \
        and no free space behind the image on its own disk: images stay in memory; give the VM a larger disk \
        for its root, or remove {MARKER} from the user data"
    )]
    NoDisk(#[source] NoSpace),
    /// No disk is labelled, and no other one is to be taken.
    #[error(
        "no unused partition with the GPT label {LABEL}, and no disk without partitions with the serial number {LABEL} \
        (--labelled-only): images stay in memory; attach one when the VM is made, or remove {MARKER} from the user data"
    )]
    NoLabelled,
    /// The free space of the image's own disk can't be used.
    #[error("making a partition of the free space of {}", node.display())]
    Partition {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The kernel has made it, and it is another one.
    #[error("the kernel has made partition {} of {}, but it can't be used", spare::NUMBER, node.display())]
    Made {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: NoSpace,
    },
    /// The mapping of an earlier run is in use.
    #[error(
        "removing the mapping {MAPPING} of an earlier run: images stay in memory; if it is in use, end what uses it \
        and restart scratch-disk.service, or restart the VM"
    )]
    LeftBehind(#[source] io::Error),
    /// Several are.
    #[error("both {first} and {second} are labelled {LABEL}: only one may be")]
    Several {
        /// One of them.
        first: String,
        /// Another one.
        second: String,
    },
    /// Another file system is mounted in its place.
    #[error("another file system is mounted at {MOUNT_POINT}")]
    OtherMounted,
    /// The guest has pulled images already; a mount would hide them.
    #[error("images are at {MOUNT_POINT} already: the disk came too late for this boot")]
    TooLate,
    /// The disk is in use.
    #[error("opening {}", node.display())]
    Open {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// It has less than one sector.
    #[error("{} is too small", .0.display())]
    TooSmall(PathBuf),
    /// The kernel gave no random bytes.
    #[error("making a key: {0}")]
    Key(getrandom::Error),
    /// The device mapper failed.
    #[error("encrypting {} (the kernel's log says more)", node.display())]
    Encrypt {
        /// The disk.
        node: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The file system could not be made.
    #[error("making its file system")]
    Format(#[source] ProgramError),
    /// The mount failed.
    #[error("mounting it at {MOUNT_POINT}")]
    Mount(#[source] io::Error),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The user data does not ask for a scratch disk.
    NotWanted,
    /// It is mounted.
    Mounted,
    /// It was mounted already.
    WasMounted,
}

/// Encrypts, formats and mounts the scratch disk, if the marker is there. What was on the disk is lost. Without `partitions`
/// only a labelled one counts, and the free space is left alone.
///
/// # Errors
/// The first step that fails; what was made before it is removed, but for the kernel's partition of the free space, which
/// the next run takes as it is.
pub fn run(
    roots: &Roots,
    marker: &Path,
    mappings: &dyn Mappings,
    partitions: Option<&dyn Partitions>,
    patience: &dyn Patience,
) -> Result<Outcome, ScratchError> {
    if !marker.exists() {
        return Ok(Outcome::NotWanted);
    }
    let mounts = mountinfo::read(roots).map_err(ScratchError::Search)?;
    if let Some(mount) = mountinfo::at(&mounts, Path::new(MOUNT_POINT)) {
        let is_ours = block::mapping_of(roots, mount.device).as_deref() == Some(MAPPING);
        return if is_ours { Ok(Outcome::WasMounted) } else { Err(ScratchError::OtherMounted) };
    }
    remove_left_behind(roots, mappings, patience)?;
    let disk = wait(roots, &mounts, partitions, patience)?;
    let _held = signature::open_unused(&disk)
        .map_err(|cause| ScratchError::Open { node: disk.node.clone(), cause })?;
    let sectors = disk.sectors(roots).unwrap_or(0) / SECTORS * SECTORS;
    if sectors == 0 {
        return Err(ScratchError::TooSmall(disk.node));
    }
    if fs::read_dir(MOUNT_POINT).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ScratchError::TooLate);
    }
    let key = key()?;
    let minor = mappings
        .create_crypt(MAPPING, &table(disk.number, &key), sectors)
        .map_err(|cause| ScratchError::Encrypt { node: disk.node.clone(), cause })?;
    let node = roots.dev.join(format!("dm-{minor}"));
    format_and_mount(&node).inspect_err(|_| {
        if let Err(error) = mappings.remove(MAPPING, true) {
            log::line(format_args!("scratch: removing {MAPPING}: {error}"));
        }
    })?;
    log::line(format_args!(
        "scratch: {} is mounted at {MOUNT_POINT}, {} MiB, encrypted with a key of this boot",
        disk.node.display(),
        sectors / 2048
    ));
    Ok(Outcome::Mounted)
}

/// Removes the mapping of a run that was interrupted before its mount.
fn remove_left_behind(
    roots: &Roots,
    mappings: &dyn Mappings,
    patience: &dyn Patience,
) -> Result<(), ScratchError> {
    let names = block::names(roots).map_err(ScratchError::Search)?;
    if !names.iter().any(|name| block::mapping_named(roots, name).as_deref() == Some(MAPPING)) {
        return Ok(());
    }
    let mut attempts = 1;
    loop {
        match mappings.remove(MAPPING, false) {
            Err(cause) if cause.raw_os_error() == Some(Errno::EBUSY as i32) && attempts < REMOVALS => {
                attempts += 1;
                // As in `wait`.
                match patience.pause(DELAY) {
                    Woken::Time | Woken::Event | Woken::GivenUp => {}
                }
            }
            // Its removal was deferred by that run, and came to pass.
            Err(cause) if cause.raw_os_error() == Some(Errno::ENXIO as i32) => return Ok(()),
            result => return result.map_err(ScratchError::LeftBehind),
        }
    }
}

fn wait(
    roots: &Roots,
    mounts: &[Mount],
    partitions: Option<&dyn Partitions>,
    patience: &dyn Patience,
) -> Result<Device, ScratchError> {
    let mut attempts = 0;
    loop {
        let found = find(roots).map_err(ScratchError::Search)?;
        if let [first, second, ..] = found.as_slice() {
            return Err(ScratchError::Several { first: first.name.clone(), second: second.name.clone() });
        }
        if let Some(disk) = found.into_iter().next() {
            return Ok(disk);
        }
        // At the first attempt: this space is there from the start, and the pod waits. A disk with the label may still come.
        let free = partitions
            .map_or(Err(ScratchError::NoLabelled), |partitions| free_space(roots, mounts, partitions));
        let fault = match free {
            Ok(disk) => return Ok(disk),
            Err(fault) => fault,
        };
        attempts += 1;
        // What the kernel has made does not change.
        if attempts >= ATTEMPTS || matches!(fault, ScratchError::Made { .. }) {
            return Err(fault);
        }
        // Nothing gives a boot up; an event counts as an attempt, which keeps the wait bounded.
        match patience.pause(DELAY) {
            Woken::Time | Woken::Event | Woken::GivenUp => {}
        }
    }
}

/// A partition of the free space behind the image on its own disk, where the cloud made that disk larger than the image.
fn free_space(roots: &Roots, mounts: &[Mount], partitions: &dyn Partitions) -> Result<Device, ScratchError> {
    let space = spare::find(roots, mounts).map_err(ScratchError::NoDisk)?;
    if let Some(partition) = space.partition {
        return Ok(partition);
    }
    let node = space.disk.node;
    partitions
        .add(&node, spare::NUMBER, space.first, space.sectors)
        .map_err(|cause| ScratchError::Partition { node: node.clone(), cause })?;
    // Its bounds are checked, as those of an earlier run's.
    let made =
        spare::find(roots, mounts).map_err(|cause| ScratchError::Made { node: node.clone(), cause })?;
    made.partition.ok_or_else(|| ScratchError::Partition { node, cause: io::ErrorKind::NotFound.into() })
}

/// The partitions with the label; only if there is none, the disks with it.
fn find(roots: &Roots) -> io::Result<Vec<Device>> {
    let mut disks = Vec::new();
    let mut partitions = Vec::new();
    for name in block::names(roots)? {
        let Ok(device) = Device::named(roots, &name) else { continue };
        if device.is_partition(roots) {
            if device.partition_label(roots).as_deref() == Some(LABEL) {
                partitions.push(device);
            }
        } else if device.serial(roots).as_deref() == Some(LABEL) && device.partitions(roots)?.is_empty() {
            disks.push(device);
        }
    }
    Ok(if partitions.is_empty() { disks } else { partitions })
}

fn key() -> Result<Zeroizing<[u8; KEY]>, ScratchError> {
    let mut key = Zeroizing::new([0; KEY]);
    getrandom::fill(&mut *key).map_err(ScratchError::Key)?;
    Ok(key)
}

/// The kernel's table of the device (Documentation/admin-guide/device-mapper/dm-crypt.rst): cipher, key, first IV, disk,
/// first sector, options. Without `allow_discards`: which blocks are free would show the cloud what the pod stores.
fn table(disk: DeviceNumber, key: &[u8; KEY]) -> Zeroizing<String> {
    // Large enough, so that the key is in one place only.
    let mut table = Zeroizing::new(String::with_capacity(256));
    table.push_str("aes-xts-plain64 ");
    for nibble in key.iter().flat_map(|byte| [byte >> 4, byte & 0xf]) {
        table.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
    }
    table.push_str(&format!(" 0 {disk} 0 1 sector_size:4096"));
    table
}

fn format_and_mount(node: &Path) -> Result<(), ScratchError> {
    format::make_scratch(node).map_err(ScratchError::Format)?;
    let at = Path::new(MOUNT_POINT);
    mounts::make_directory(at)
        .and_then(|()| mounts::attach(node, FileSystem::Ext4, at, false))
        .map_err(ScratchError::Mount)?;
    // The programs of the guest expect an empty directory; the disk is of use all the same.
    if let Err(error) = fs::remove_dir(at.join("lost+found")) {
        log::line(format_args!("scratch: removing lost+found: {error}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_the_kernel_documents() {
        let disk = DeviceNumber { major: 254, minor: 17 };
        let table = table(disk, &[0xa5; KEY]);
        let expected = format!("aes-xts-plain64 {} 0 254:17 0 1 sector_size:4096", "a5".repeat(64));
        assert_eq!(table.as_str(), expected);
        assert!(table.capacity() == 256, "the text has moved");
    }

    #[test]
    fn each_key_is_another() {
        assert_ne!(*key().unwrap(), *key().unwrap());
    }
}
