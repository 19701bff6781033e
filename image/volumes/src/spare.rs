//! Free space on the disk of the image: a cloud that makes this disk larger than the image leaves it unpartitioned.
//!
//! It gets a partition in the kernel only, by BLKPG: the table on the disk stays as it is, and so does PCR 5, which the
//! firmware extends by it. What is in the partition is of no use after the boot anyway.
//!
//! The cloud can write the table. Free is what is behind every partition, by the table and by the kernel; a table that
//! contradicts itself or the disk's size is refused, whatever it may mean.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use podvm_device_mapper::{gpt, partitions};

use crate::block::{self, Device};
use crate::layout::{self, Contradiction, Layout, SECTOR, SECTORS_MIN, length};
use crate::mountinfo::{self, Mount};
use crate::roots::Roots;

/// Number of the partition: the last one in a GPT of the usual size, so none of the image's.
pub const NUMBER: i32 = 128;

/// The kernel's partitions; a test has others.
pub trait Partitions {
    /// Makes a partition of these sectors, of 512 bytes each, and its node.
    ///
    /// # Errors
    /// There is one with this number, or in these sectors, or the kernel refuses.
    fn add(&self, disk: &Path, number: i32, first: u64, sectors: u64) -> io::Result<()>;
}

/// Those of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl Partitions for Kernel {
    fn add(&self, disk: &Path, number: i32, first: u64, sectors: u64) -> io::Result<()> {
        partitions::add(&File::open(disk)?, number, first, sectors)
    }
}

/// Sectors of a disk that no partition has, but for one of an earlier run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// The disk.
    pub disk: Device,
    /// The first of them.
    pub first: u64,
    /// Their number.
    pub sectors: u64,
    /// The partition that an earlier run has made of them.
    pub partition: Option<Device>,
}

/// Why the image's own disk has no free space for a scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum NoSpace {
    /// The root is in memory, or on several disks.
    #[error("the root is not on one disk")]
    NoDisk,
    /// sysfs can't be read, or does not have what it should.
    #[error("reading the partitions of {disk} in sysfs")]
    Sysfs {
        /// The disk.
        disk: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The table can't be read or is not valid.
    #[error("reading the partition table of {disk}")]
    Table {
        /// The disk.
        disk: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The table can't be right.
    #[error("the partition table of {disk} can't be right: {why}")]
    Contradiction {
        /// The disk.
        disk: String,
        /// What is wrong.
        why: Contradiction,
    },
    /// The number is taken in the table.
    #[error(
        "the partition table of {0} has a partition {NUMBER} itself: the scratch disk's would have this number"
    )]
    NumberInTable(String),
    /// The kernel has a partition with this number that no earlier run has made.
    #[error(
        "{0} has a partition {NUMBER} that is not in its partition table and is not one of an earlier run: restart the VM"
    )]
    NumberTaken(String),
    /// There is too little.
    #[error("{disk} has less than {} MiB free behind its last partition and its table, which end at {} MiB of {}",
        SECTORS_MIN / 2048, end / 2048, size / 2048)]
    TooLittle {
        /// The disk.
        disk: String,
        /// Where its last partition or its table ends, in sectors.
        end: u64,
        /// Its size in sectors.
        size: u64,
    },
}

/// The free space on the root's disk. Only a partition with [`NUMBER`] that the table does not have, and that is within
/// the free space, is taken for one of an earlier run.
///
/// # Errors
/// There is none, or too little, or it is not sure what is free.
pub fn find(roots: &Roots, mounts: &[Mount]) -> Result<Space, NoSpace> {
    let disk = disk_of_root(roots, mounts).ok_or(NoSpace::NoDisk)?;
    let name = disk.name.clone();
    let layout = layout_of(roots, &disk)?;
    let kernel =
        KernelPartitions::read(roots, &disk).map_err(|cause| NoSpace::Sysfs { disk: name.clone(), cause })?;
    let end = layout.end.max(kernel.end);
    let parts = layout::free(end, &layout.backup, layout.tail);
    let size = layout.size;
    let largest = parts.iter().max_by_key(|part| length(part)).filter(|part| length(part) >= SECTORS_MIN);
    let space = largest.ok_or(NoSpace::TooLittle { disk: name.clone(), end, size })?;
    let (first, sectors) = (space.start, length(space));
    let Some((partition, bounds)) = kernel.numbered else {
        return Ok(Space { disk, first, sectors, partition: None });
    };
    // Smaller than the space if the cloud has made the disk larger since.
    let is_ours = length(&bounds) >= SECTORS_MIN
        && parts.iter().any(|part| part.start <= bounds.start && bounds.end <= part.end);
    if !is_ours {
        return Err(NoSpace::NumberTaken(name));
    }
    Ok(Space { disk, first: bounds.start, sectors: length(&bounds), partition: Some(partition) })
}

fn disk_of_root(roots: &Roots, mounts: &[Mount]) -> Option<Device> {
    let root = mountinfo::at(mounts, Path::new("/"))?;
    let disks = block::disks_under(roots, root.device);
    let name = disks.first().filter(|_| disks.len() == 1)?;
    // The root of a VM without a disk, in memory, has no block device.
    Device::named(roots, name).ok()
}

/// What the kernel says about a disk's partitions, in sectors.
struct KernelPartitions {
    /// The one with [`NUMBER`].
    numbered: Option<(Device, Range<u64>)>,
    /// Where the last of the others ends.
    end: u64,
}

impl KernelPartitions {
    fn read(roots: &Roots, disk: &Device) -> io::Result<Self> {
        let mut kernel = Self { numbered: None, end: 0 };
        for name in disk.partitions(roots)? {
            let partition = Device::named(roots, &name)?;
            let bounds = partition.first_sector(roots).zip(partition.sectors(roots));
            let bounds = bounds.and_then(|(first, sectors)| Some(first..first.checked_add(sectors)?));
            let bounds = bounds
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no bounds of {name}")))?;
            if partition.partition_number(roots) == Some(NUMBER) {
                kernel.numbered = Some((partition, bounds));
            } else {
                kernel.end = kernel.end.max(bounds.end);
            }
        }
        Ok(kernel)
    }
}

fn layout_of(roots: &Roots, disk: &Device) -> Result<Layout, NoSpace> {
    let sysfs = || {
        let cause = io::Error::new(io::ErrorKind::InvalidData, "no size, or none of its blocks");
        NoSpace::Sysfs { disk: disk.name.clone(), cause }
    };
    let size = disk.sectors(roots).ok_or_else(sysfs)?;
    let block_size = disk.block_size(roots).ok_or_else(sysfs)?;
    let (header, entries) = File::open(&disk.node)
        .and_then(|file| gpt::read(&file, block_size))
        .map_err(|cause| NoSpace::Table { disk: disk.name.clone(), cause })?;
    if usize::try_from(NUMBER - 1).is_ok_and(|at| entries.get(at).is_some_and(Option::is_some)) {
        return Err(NoSpace::NumberInTable(disk.name.clone()));
    }
    let scale = block_size as u64 / SECTOR;
    Layout::of(&header, &entries, scale, size)
        .map_err(|why| NoSpace::Contradiction { disk: disk.name.clone(), why })
}
