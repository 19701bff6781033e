//! Partitions that the kernel knows and the disk's table does not name (`BLKPG` of <linux/blkpg.h>).

use std::fs::File;
use std::io;

use crate::ioctl;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Makes a partition of these sectors, of 512 bytes each. Nothing is written to the disk.
///
/// # Errors
/// There is one with this number or in these sectors (EBUSY), they are not on the disk or the disk can have no partitions
/// (EINVAL), or the caller has no CAP_SYS_ADMIN (EACCES).
pub fn add(disk: &File, number: i32, first: u64, sectors: u64) -> io::Result<()> {
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR).and_then(|bytes| i64::try_from(bytes).ok());
    let (Some(start), Some(length)) = (bytes(first), bytes(sectors)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok(ioctl::add_partition(disk, start, length, number)?)
}
