//! What is on a disk, by `blkid` of util-linux: a disk that has anything is never formatted.
//!
//! `blkid` knows signatures only. A disk of dm-crypt without a header, of a database, or whose superblock is damaged has none, and
//! is not empty: so a disk counts as empty only if it also reads as zeros wherever data of a whole disk would show. A new disk of a
//! cloud does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::iter;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::libc;
use nix::sys::stat::{major, minor};

use crate::block::Device;
use crate::mountinfo::DeviceNumber;
use crate::program::{self, ProgramError};
use crate::text::one_line;

/// Limit for a look at a disk.
const LIMIT: Duration = Duration::from_secs(30);
/// Exit status of `blkid -p` that says: nothing was found.
const NOTHING: i32 = 2;
/// Exit status of `blkid -p` that says: several were found.
const SEVERAL: i32 = 8;
/// How much of each end of a disk must be zeros, in bytes, before "nothing was found" is believed: headers, partition tables and
/// the metadata of RAID are there.
const ENDS: u64 = 1024 * 1024;
/// How much in between, at each power of two: ext4 has copies of its superblock at some of them.
const SAMPLE: u64 = 64 * 1024;

/// What is on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signature {
    /// Surely nothing: no signature, and zeros.
    Nothing,
    /// A file system or the like, by the name that `blkid` has for it: `ext4`, `crypto_LUKS`.
    Of(String),
    /// A partition table.
    PartitionTable,
}

/// It is not sure what is on the disk.
#[derive(Debug, thiserror::Error)]
pub enum Unsure {
    /// `blkid` did not say.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// There are signatures of several.
    #[error("it has the signatures of several file systems: wipefs(8) removes the wrong ones")]
    Several,
    /// Something that `blkid` does not know.
    #[error(
        "it has no signature, but data at byte {0}, so it is not empty: if they are of no use, \
        `blkdiscard -z` makes it an empty disk"
    )]
    Data(u64),
    /// The disk can't be read.
    #[error("reading it")]
    Read(#[source] io::Error),
}

/// Opens a disk for reading, once it is certain that nothing uses it: the kernel refuses a second exclusive user, be it a
/// mount or a mapping. While the file is open, its device number stays this disk's.
///
/// # Errors
/// It is in use (`ResourceBusy`), is another device by now, or may not be opened.
pub fn open_unused(device: &Device) -> io::Result<File> {
    let open = |flags| {
        let flags = flags | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new().read(true).custom_flags(flags).open(&device.node)
    };
    let file = open(0)?;
    let metadata = file.metadata()?;
    let number = DeviceNumber { major: major(metadata.rdev()), minor: minor(metadata.rdev()) };
    if !metadata.file_type().is_block_device() || number != device.number {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "another device by now"));
    }
    // Closed again: a mount needs to be the exclusive user itself.
    match open(libc::O_EXCL) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "it is busy: mounted where this program does not see it, such as by a container that has not ended, or \
             part of another device",
        )),
        excluded => excluded.map(|_| file),
    }
}

/// Looks at a disk once.
///
/// # Errors
/// It is not sure what is there.
pub fn look(node: &Path, disk: &mut File) -> Result<Signature, Unsure> {
    let blkid = program::find("blkid")?;
    let node = node.to_string_lossy();
    let output = program::run(&blkid, &["-p", "-o", "export", &node], LIMIT)?;
    let failed = |said: &[u8]| Unsure::Program(output.failed(&blkid, said));
    match output.status.code() {
        Some(0) => named(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| failed(&output.stdout)),
        // It says so too if it can't read the disk.
        Some(NOTHING) if output.stderr.is_empty() => match first_data(disk).map_err(Unsure::Read)? {
            Some(at) => Err(Unsure::Data(at)),
            None => Ok(Signature::Nothing),
        },
        Some(SEVERAL) => Err(Unsure::Several),
        _ => Err(failed(&output.stderr)),
    }
}

fn named(export: &str) -> Option<Signature> {
    let value = |key: &str| export.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    if let Some(kind) = value("TYPE") {
        return Some(Signature::Of(one_line(kind)));
    }
    value("PTTYPE").map(|_| Signature::PartitionTable)
}

/// Where the first byte is that is not zero, of those that are looked at.
fn first_data(disk: &mut (impl Read + Seek)) -> io::Result<Option<u64>> {
    let size = disk.seek(SeekFrom::End(0))?;
    let samples =
        iter::successors(Some(ENDS), |start| start.checked_mul(2)).take_while(|start| *start < size);
    let samples = samples.map(|start| (start, SAMPLE));
    let parts = iter::once((0, ENDS)).chain(samples).chain([(size.saturating_sub(ENDS), ENDS)]);
    let mut bytes = Vec::new();
    for (start, length) in parts {
        let wanted = length.min(size - start);
        bytes.clear();
        disk.seek(SeekFrom::Start(start))?;
        if disk.by_ref().take(wanted).read_to_end(&mut bytes)? as u64 != wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
            return Ok(Some(start + at as u64));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn data_count_at_both_ends_and_at_powers_of_two() {
        const SIZE: u64 = 4 * 1024 * 1024 + 513;
        let looked_at = |at: u64| {
            let mut disk = vec![0; usize::try_from(SIZE).unwrap()];
            disk[usize::try_from(at).unwrap()] = 1;
            first_data(&mut Cursor::new(disk)).unwrap() == Some(at)
        };
        for at in [0, ENDS - 1, 2 * ENDS, 2 * ENDS + SAMPLE - 1, 4 * ENDS, SIZE - ENDS, SIZE - 1] {
            assert!(looked_at(at), "{at}");
        }
        for size in [0, 1, 511, 512, ENDS, 2 * ENDS, SIZE] {
            let mut disk = Cursor::new(vec![0; usize::try_from(size).unwrap()]);
            assert_eq!(first_data(&mut disk).unwrap(), None, "{size}");
        }
    }

    #[test]
    fn the_type_counts_before_the_partition_table() {
        let of = |text: &str| named(text);
        assert_eq!(of("DEVNAME=/dev/x\nTYPE=ext4\n"), Some(Signature::Of("ext4".into())));
        assert_eq!(of("DEVNAME=/dev/x\nPTUUID=1\nPTTYPE=gpt\n"), Some(Signature::PartitionTable));
        assert_eq!(of("DEVNAME=/dev/x\nTYPE=iso9660\nPTTYPE=dos\n"), Some(Signature::Of("iso9660".into())));
        assert_eq!(of("DEVNAME=/dev/x\nLABEL=TYPE=ext4\nMINIMUM_IO_SIZE=512\n"), None);
    }
}
