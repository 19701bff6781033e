//! Free space on the disk of the image: a cloud that makes this disk larger than the image leaves it unpartitioned.
//!
//! It gets a partition in the kernel only, by BLKPG: the table on the disk stays as it is, and so does PCR 5, which the
//! firmware extends by it. What is in the partition is of no use after the boot anyway.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use podvm_device_mapper::partitions;

use crate::block::{self, Device};
use crate::mountinfo::{self, Mount};
use crate::roots::Roots;

/// Number of the partition: the last one in a GPT of the usual size, so none of the image's.
pub const NUMBER: i32 = 128;
/// Least size in sectors, 1 GiB. Less is what is left when a cloud rounds the image up to whole GiB: memory holds more.
pub const SECTORS_MIN: u64 = 1 << 21;
/// Bounds are multiples of this number of sectors, 1 MiB.
const UNIT: u64 = 1 << 11;
/// Sectors of a backup GPT: its entries, and behind them its header.
const BACKUP: u64 = 33;
/// Size of a sector in bytes, also of the image's GPT.
const SECTOR: usize = 512;

/// The kernel's partitions; a test has others.
pub trait Partitions {
    /// Makes a partition of these sectors, of 512 bytes each, and its node.
    ///
    /// # Errors
    /// There is one with this number, or in these sectors, or the kernel refuses.
    fn add(&self, disk: &Path, number: i32, first: u64, sectors: u64) -> io::Result<()>;

    /// Removes a partition.
    ///
    /// # Errors
    /// It is in use, or there is none.
    fn remove(&self, disk: &Path, number: i32) -> io::Result<()>;
}

/// Those of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl Partitions for Kernel {
    fn add(&self, disk: &Path, number: i32, first: u64, sectors: u64) -> io::Result<()> {
        partitions::add(&File::open(disk)?, number, first, sectors)
    }

    fn remove(&self, disk: &Path, number: i32) -> io::Result<()> {
        partitions::remove(&File::open(disk)?, number)
    }
}

/// Sectors of a disk that no partition has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// The disk.
    pub disk: Device,
    /// The first of them.
    pub first: u64,
    /// Their number.
    pub sectors: u64,
}

/// The free space on the root's disk, if it is of use. A partition with [`NUMBER`] counts as free.
///
/// # Errors
/// sysfs or the disk can't be read.
pub fn find(roots: &Roots, mounts: &[Mount]) -> io::Result<Option<Space>> {
    let Some(root) = mountinfo::at(mounts, Path::new("/")) else { return Ok(None) };
    let disks = block::disks_under(roots, root.device);
    let (Some(name), 1) = (disks.first(), disks.len()) else { return Ok(None) };
    // The root of a VM without a disk: in memory.
    let Ok(disk) = Device::named(roots, name) else { return Ok(None) };
    let Some(size) = disk.sectors(roots) else { return Ok(None) };
    let Some(backup) = backup_of(&disk)? else { return Ok(None) };
    let mut end = 0;
    for name in disk.partitions(roots)? {
        let partition = Device::named(roots, &name)?;
        if partition.partition_number(roots) != Some(NUMBER) {
            let bounds = partition.first_sector(roots).zip(partition.sectors(roots));
            let Some(last) = bounds.and_then(|(first, sectors)| first.checked_add(sectors)) else {
                return Ok(None);
            };
            end = end.max(last);
        }
    }
    Ok(free(end, backup, size).map(|(first, sectors)| Space { disk, first, sectors }))
}

/// The partition with [`NUMBER`], if there is one.
///
/// # Errors
/// sysfs can't be read.
pub fn partition(roots: &Roots, disk: &Device) -> io::Result<Option<Device>> {
    for name in disk.partitions(roots)? {
        let partition = Device::named(roots, &name)?;
        if partition.partition_number(roots) == Some(NUMBER) {
            return Ok(Some(partition));
        }
    }
    Ok(None)
}

/// First sector and number of sectors behind the last partition. The backup GPT splits this space, unless it was moved to
/// the end of the disk: firmware would write it again, so the larger part without it counts.
fn free(end: u64, backup: u64, size: u64) -> Option<(u64, u64)> {
    let before = (end, backup.min(size).saturating_sub(BACKUP));
    let behind = (end.max(backup.saturating_add(1)), size.saturating_sub(BACKUP));
    let parts = [before, behind].into_iter().filter_map(|(first, end)| {
        let first = first.checked_next_multiple_of(UNIT)?;
        let sectors = (end / UNIT * UNIT).checked_sub(first)?;
        Some((first, sectors))
    });
    parts.max_by_key(|(_, sectors)| *sectors).filter(|(_, sectors)| *sectors >= SECTORS_MIN)
}

/// Where the disk's GPT says that its backup is, in sectors; none if there is no GPT.
fn backup_of(disk: &Device) -> io::Result<Option<u64>> {
    const SIGNATURE: &[u8] = b"EFI PART";
    let mut header = [0; SECTOR];
    File::open(&disk.node)?.read_exact_at(&mut header, SECTOR as u64)?;
    let number = header.get(32..40).and_then(|bytes| bytes.try_into().ok());
    Ok(number.filter(|_| header.starts_with(SIGNATURE)).map(u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 21;

    #[test]
    fn an_image_as_large_as_its_disk_leaves_nothing() {
        assert_eq!(free(240_000, 245_759, 245_760), None);
        // Whole GiB, as Google Cloud takes images, with the backup moved to the end or not.
        assert_eq!(free(240_000, GIB - 1, GIB), None);
        assert_eq!(free(240_000, 245_759, GIB), None);
    }

    #[test]
    fn what_the_cloud_added_is_free() {
        let (first, sectors) = free(240_000, 245_759, 30 * GIB).unwrap();
        assert_eq!(first, 245_760);
        assert_eq!(first + sectors, 30 * GIB - UNIT);
        // The backup was moved to the end.
        let (first, sectors) = free(240_000, 30 * GIB - 1, 30 * GIB).unwrap();
        assert_eq!((first, first + sectors), (241_664, 30 * GIB - UNIT));
    }

    #[test]
    fn no_partition_and_no_backup_is_ever_within() {
        for end in [0, 1, 2047, 2048, 240_000, 5 * GIB, u64::MAX] {
            for backup in [0, 1, 34, 239_999, 245_759, 2 * GIB, 30 * GIB - 1, 30 * GIB, u64::MAX] {
                for size in [0, 1, 245_760, 30 * GIB, u64::MAX] {
                    let Some((first, sectors)) = free(end, backup, size) else { continue };
                    let last = first + sectors;
                    assert!(first >= end && last <= size && sectors >= SECTORS_MIN, "{end} {backup} {size}");
                    assert!(backup < first || backup >= last, "{end} {backup} {size}: {first} to {last}");
                }
            }
        }
    }
}
