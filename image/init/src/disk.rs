//! The disk with the root, found by the UUIDs of its partitions on any bus.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure};
use crate::gpt;
use crate::root_hash::{RootHash, Uuid};
use crate::superblock::{self, Superblock};
use crate::uevents::Uevents;

/// Timeout for the disk to appear: it takes a few seconds on an emulated machine under load, and less than one in a
/// cloud.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Directory of the whole disks in sysfs.
const DISKS: &str = "/sys/block";

/// The two partitions of a root.
pub struct RootDisk {
    /// Partition with the file system.
    pub data: Partition,
    /// Partition with the hash tree.
    pub hash: Partition,
}

/// A partition, as the kernel found it.
pub struct Partition {
    /// Name in /dev and /sys/class/block.
    pub name: String,
    /// Device number as "major:minor".
    pub device: String,
    /// Size in bytes according to the kernel, not to the partition table.
    pub bytes: u64,
}

/// Waits for the disk. `events` must have been opened before the drivers were loaded.
///
/// # Errors
/// The disk did not appear within [`DEADLINE`].
pub fn wait(root_hash: &RootHash, events: &Uevents) -> Result<RootDisk, Failure> {
    let (data, hash) = (root_hash.data_partition(), root_hash.hash_partition());
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut seen = Vec::new();
        if let Some(disk) = scan(&data, &hash, &mut seen)? {
            return Ok(disk);
        }
        if !events.wait_until(deadline)? {
            let seen = if seen.is_empty() { "no disk at all".into() } else { seen.join(", ") };
            return Err(Failure::new(
                format!(
                    "waiting {} s for the root partition {data} and its hashes {hash}",
                    DEADLINE.as_secs()
                ),
                format_args!("{seen}; is it another image's root hash, or a driver missing?"),
            ));
        }
    }
}

/// Checks every disk; adds each rejected disk and the reason to `seen`.
fn scan(data: &Uuid, hash: &Uuid, seen: &mut Vec<String>) -> Result<Option<RootDisk>, Failure> {
    let mut disks: Vec<String> = fs::read_dir(DISKS)
        .and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        })
        .context(|| format!("reading {DISKS}"))?;
    disks.sort();
    // Loop devices and drives without a medium have no size.
    disks.retain(|disk| {
        fs::read_to_string(Path::new(DISKS).join(disk).join("size")).is_ok_and(|size| size.trim() != "0")
    });
    for disk in disks {
        match partitions(&disk) {
            // The disk is empty, the kernel still reads it, or the kernel rejects its table (a truncated disk).
            Ok(found) if found.is_empty() => {
                seen.push(format!("{disk} has no partitions that the kernel takes"))
            }
            Ok(mut found) => {
                let mut take =
                    |uuid| found.iter().position(|(u, _)| u == uuid).map(|at| found.swap_remove(at).1);
                match (take(data), take(hash)) {
                    // The kernel lists a partition before it can be opened, and sends an event when it can.
                    (Some(data), Some(hash)) => match open(&data.name).and_then(|_| open(&hash.name)) {
                        Ok(_) => return Ok(Some(RootDisk { data, hash })),
                        Err(error) => seen.push(format!("opening {} and {}: {error}", data.name, hash.name)),
                    },
                    (None, None) => seen.push(format!("{disk} has other partitions")),
                    (Some(_), None) => seen.push(format!("{disk} has no partition with the hashes")),
                    (None, Some(_)) => seen.push(format!("{disk} has no root partition")),
                }
            }
            // The disk may be gone or bad; another may be good.
            Err(failure) => seen.push(failure.to_string()),
        }
    }
    Ok(None)
}

/// Partitions of a disk according to the kernel, with the UUIDs of the disk's table.
fn partitions(disk: &str) -> Result<Vec<(Uuid, Partition)>, Failure> {
    let sysfs = Path::new(DISKS).join(disk);
    let mut numbered = Vec::new();
    let listing = || format!("listing the partitions of {disk}");
    for entry in fs::read_dir(&sysfs).context(listing)? {
        let dir = entry.context(listing)?.path();
        if let Ok(number) = fs::read_to_string(dir.join("partition")) {
            numbered.push((parse::<usize>(&number).context(listing)?, dir));
        }
    }
    if numbered.is_empty() {
        return Ok(Vec::new());
    }
    let uuids = read_gpt(disk, &sysfs)?;
    let mut found = Vec::new();
    for (number, dir) in numbered {
        let uuid = number.checked_sub(1).and_then(|at| uuids.get(at).copied().flatten());
        if let (Some(uuid), Some(name)) = (uuid, dir.file_name()) {
            let read = |file| fs::read_to_string(dir.join(file));
            let device = read("dev").context(listing)?.trim().to_owned();
            let sectors: u64 = read("size").and_then(|size| parse(&size)).context(listing)?;
            let name = name.to_string_lossy().into_owned();
            // sysfs counts units of 512 bytes for every block size.
            found.push((uuid, Partition { name, device, bytes: sectors.saturating_mul(512) }));
        }
    }
    Ok(found)
}

fn read_gpt(disk: &str, sysfs: &Path) -> Result<Vec<Option<Uuid>>, Failure> {
    let reading = || format!("reading the partition table of {disk}");
    let block_size = fs::read_to_string(sysfs.join("queue/logical_block_size"))
        .and_then(|size| parse(&size))
        .context(reading)?;
    let device = open(disk).context(reading)?;
    let (_, partitions) = gpt::read(&device, block_size).context(reading)?;
    Ok(partitions.into_iter().map(|entry| entry.map(|entry| Uuid::from_gpt(entry.uuid))).collect())
}

/// Superblock at the start of the hash partition.
///
/// # Errors
/// It can't be read or is malformed, or a partition is smaller than it requires.
pub fn superblock(disk: &RootDisk) -> Result<Superblock, Failure> {
    let RootDisk { data, hash } = disk;
    let reading = || format!("reading the verity superblock of {}", hash.name);
    let mut raw = [0; superblock::SIZE];
    open(&hash.name).and_then(|device| device.read_exact_at(&mut raw, 0)).context(reading)?;
    let superblock = Superblock::parse(&raw).context(reading)?;
    for (partition, needed) in [(data, superblock.data_bytes()), (hash, superblock.hash_bytes())] {
        if partition.bytes < needed {
            return Err(Failure::new(
                format!("checking the size of {}", partition.name),
                format_args!(
                    "{} bytes, {needed} are needed: the disk is truncated or not this image",
                    partition.bytes
                ),
            ));
        }
    }
    Ok(superblock)
}

/// Opens a block device by its name in sysfs, where '!' stands for '/'.
fn open(name: &str) -> io::Result<File> {
    File::open(Path::new("/dev").join(name.replace('!', "/")))
}

fn parse<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> io::Result<T> {
    text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
