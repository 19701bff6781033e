//! The GUID partition table (UEFI specification, chapter 5): the UUIDs and the bounds of partitions.
//!
//! Not every kernel shows a partition's UUID in sysfs (6.1 does not), so the table is read here, for all kernels alike.
//! Only the primary table is read, because the kernel ignores the backup by default. The table is untrusted like the
//! whole disk: its checksums find damage, no forgery.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Limit of the size of all entries, in bytes; usual are 128 entries of 128 bytes.
const MAX_ENTRIES_BYTES: u64 = 1 << 20;

/// Sizes in bytes that a disk's logical blocks may have.
const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 512..=65_536;

/// A partition in the table. Its bounds are as they are there, in logical blocks: they may be anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its UUID, in the byte order of the disk.
    pub uuid: [u8; 16],
    /// Its first block.
    pub first_block: u64,
    /// Its last block.
    pub last_block: u64,
}

/// Header of the table: position, size and checksum of the entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    backup_block: u64,
    first_block: u64,
    entry_size: u32,
    bytes: u32,
    crc: u32,
}

/// The table is not valid.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadGpt {
    /// The disk's logical blocks have a size that none has.
    #[error("blocks of {0} bytes")]
    BlockSize(usize),
    /// The disk has no GPT.
    #[error("no GPT (signature)")]
    Signature,
    /// A field of the header has an invalid value; with the field.
    #[error("GPT header: bad {0}")]
    Field(&'static str),
    /// The header is damaged.
    #[error("GPT header: checksum does not match")]
    HeaderChecksum,
    /// The entries are damaged.
    #[error("GPT entries: checksum does not match")]
    EntriesChecksum,
}

/// Reads the primary table of a disk with logical blocks of this size: the header, and the partitions 1, 2, ...; none for
/// an unused entry.
///
/// # Errors
/// The disk can't be read, or the table is not valid (InvalidData, with a [`BadGpt`]).
pub fn read(disk: &File, block_size: usize) -> io::Result<(Header, Vec<Option<Entry>>)> {
    let invalid = |error: BadGpt| io::Error::new(io::ErrorKind::InvalidData, error);
    if !BLOCK_SIZES.contains(&block_size) {
        return Err(invalid(BadGpt::BlockSize(block_size)));
    }
    let mut block = vec![0; block_size];
    let block_size = block_size as u64;
    disk.read_exact_at(&mut block, block_size)?;
    let header = Header::parse(&block).map_err(invalid)?;
    let mut entries = vec![0; header.bytes()];
    disk.read_exact_at(&mut entries, header.first_block().saturating_mul(block_size))?;
    let partitions = header.partitions(&entries).map_err(invalid)?;
    Ok((header, partitions))
}

impl Header {
    /// Reads the header from the disk's second logical block.
    ///
    /// # Errors
    /// The header is not valid.
    pub fn parse(block: &[u8]) -> Result<Self, BadGpt> {
        if field::<8>(block, 0)? != *b"EFI PART" {
            return Err(BadGpt::Signature);
        }
        let u32_at = |at| Ok(u32::from_le_bytes(field(block, at)?));
        let u64_at = |at| Ok(u64::from_le_bytes(field(block, at)?));
        let size = usize::try_from(u32_at(12)?).map_err(|_| BadGpt::Field("size"))?;
        let header = block.get(..size).filter(|_| size >= 92).ok_or(BadGpt::Field("size"))?;
        // The field of the checksum counts as zero.
        let zeroed =
            header.iter().enumerate().map(|(at, byte)| if (16..20).contains(&at) { 0 } else { *byte });
        if crc32(zeroed) != u32_at(16)? {
            return Err(BadGpt::HeaderChecksum);
        }
        if u64_at(24)? != 1 {
            return Err(BadGpt::Field("position of itself"));
        }
        let (first_block, count, entry_size, crc) = (u64_at(72)?, u32_at(80)?, u32_at(84)?, u32_at(88)?);
        if first_block < 2 {
            return Err(BadGpt::Field("position of the entries"));
        }
        if entry_size < 128 || !entry_size.is_power_of_two() {
            return Err(BadGpt::Field("size of an entry"));
        }
        let bytes = u64::from(count) * u64::from(entry_size);
        match u32::try_from(bytes) {
            Ok(bytes) if (1..=MAX_ENTRIES_BYTES).contains(&u64::from(bytes)) => {
                Ok(Self { backup_block: u64_at(32)?, first_block, entry_size, bytes, crc })
            }
            _ => Err(BadGpt::Field("number of entries")),
        }
    }

    /// Logical block of the backup's header, as the table has it: it may be anything.
    #[must_use]
    pub fn backup_block(&self) -> u64 {
        self.backup_block
    }

    /// Logical block in which the entries start.
    #[must_use]
    pub fn first_block(&self) -> u64 {
        self.first_block
    }

    /// Size of all entries, in bytes, at most 1 MiB.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // 1 MiB fits.
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }

    /// The partitions 1, 2, ...; none for an unused entry. `entries` has [`Header::bytes`] bytes.
    ///
    /// # Errors
    /// The number of bytes or the checksum is wrong.
    pub fn partitions(&self, entries: &[u8]) -> Result<Vec<Option<Entry>>, BadGpt> {
        if entries.len() != self.bytes() || crc32(entries.iter().copied()) != self.crc {
            return Err(BadGpt::EntriesChecksum);
        }
        let entry_size = usize::try_from(self.entry_size).map_err(|_| BadGpt::Field("size of an entry"))?;
        entries
            .chunks_exact(entry_size)
            .map(|entry| {
                let used = field::<16>(entry, 0)? != [0; 16];
                let first_block = u64::from_le_bytes(field(entry, 32)?);
                let last_block = u64::from_le_bytes(field(entry, 40)?);
                Ok(used.then_some(Entry { uuid: field(entry, 16)?, first_block, last_block }))
            })
            .collect()
    }
}

/// `N` bytes at the offset `at`.
fn field<const N: usize>(raw: &[u8], at: usize) -> Result<[u8; N], BadGpt> {
    raw.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(BadGpt::Field("length"))
}

/// CRC-32 of IEEE 802.3, bit by bit: fast enough for one table.
fn crc32(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(!0, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header block and 128 entries; partition 3 is the only one.
    fn table(change: impl FnOnce(&mut [u8])) -> (Vec<u8>, Vec<u8>) {
        let mut entries = vec![0; 128 * 128];
        entries[256..272].fill(0xee);
        for (at, byte) in entries[272..288].iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap();
        }
        (entries[288], entries[296]) = (34, 40);
        let mut block = vec![0; 512];
        block[..8].copy_from_slice(b"EFI PART");
        block[12] = 92;
        block[24] = 1;
        block[32] = 99;
        block[72] = 2;
        block[80..84].copy_from_slice(&128u32.to_le_bytes());
        block[84..88].copy_from_slice(&128u32.to_le_bytes());
        block[88..92].copy_from_slice(&crc32(entries.iter().copied()).to_le_bytes());
        change(&mut block);
        let crc = crc32(block[..92].iter().copied());
        block[16..20].copy_from_slice(&crc.to_le_bytes());
        (block, entries)
    }

    #[test]
    fn the_checksum_is_crc_32() {
        assert_eq!(crc32(b"123456789".iter().copied()), 0xcbf4_3926);
    }

    #[test]
    fn a_partition_is_found_at_its_number() {
        let (block, entries) = table(|_| ());
        let header = Header::parse(&block).unwrap();
        let fields = (header.first_block(), header.bytes(), header.backup_block());
        assert_eq!(fields, (2, 128 * 128, 99));
        let partitions = header.partitions(&entries).unwrap();
        assert_eq!(partitions.iter().flatten().count(), 1);
        let uuid = std::array::from_fn(|at| u8::try_from(at).unwrap());
        assert_eq!(partitions[2], Some(Entry { uuid, first_block: 34, last_block: 40 }));
    }

    #[test]
    fn a_disk_is_read_with_blocks_of_its_size() {
        let (header, entries) = table(|_| ());
        for size in [512, 4096] {
            let disk = tempfile::tempfile().unwrap();
            disk.write_all_at(&header, size).unwrap();
            disk.write_all_at(&entries, 2 * size).unwrap();
            let (_, partitions) = read(&disk, usize::try_from(size).unwrap()).unwrap();
            assert_eq!(partitions.iter().flatten().count(), 1, "{size}");
        }
    }

    #[test]
    fn a_disk_without_a_valid_table_is_an_error() {
        let disk = tempfile::tempfile().unwrap();
        assert_eq!(read(&disk, 512).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        for size in [0, 511, 65_537, usize::MAX] {
            assert_eq!(read(&disk, size).unwrap_err().to_string(), format!("blocks of {size} bytes"));
        }
        disk.set_len(1 << 20).unwrap();
        assert_eq!(read(&disk, 512).unwrap_err().to_string(), "no GPT (signature)");
        // Its entries are beyond the disk.
        let (header, _) = table(|block| block[72..80].fill(0xff));
        disk.write_all_at(&header, 512).unwrap();
        assert!(read(&disk, 512).is_err());
    }

    #[test]
    fn damage_is_detected() {
        let (mut block, mut entries) = table(|_| ());
        let header = Header::parse(&block).unwrap();
        entries[300] ^= 1;
        assert_eq!(header.partitions(&entries), Err(BadGpt::EntriesChecksum));
        assert_eq!(header.partitions(&[]), Err(BadGpt::EntriesChecksum));
        block[40] ^= 1;
        assert_eq!(Header::parse(&block), Err(BadGpt::HeaderChecksum));
        assert_eq!(Header::parse(&[]), Err(BadGpt::Field("length")));
        assert_eq!(Header::parse(&[0; 512]), Err(BadGpt::Signature));
    }

    #[test]
    fn absurd_fields_are_refused() {
        for (at, value, name) in [
            (24, 2u32, "position of itself"),
            (72, 1, "position of the entries"),
            (80, 0, "number of entries"),
            (80, u32::MAX, "number of entries"),
            (84, 64, "size of an entry"),
            (84, 129, "size of an entry"),
        ] {
            let (block, _) = table(|block| block[at..at + 4].copy_from_slice(&value.to_le_bytes()));
            assert_eq!(Header::parse(&block), Err(BadGpt::Field(name)));
        }
        let (mut block, _) = table(|_| ());
        block[12..16].copy_from_slice(&513u32.to_le_bytes());
        assert_eq!(Header::parse(&block), Err(BadGpt::Field("size")));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(noise in prop::collection::vec((0..92usize, any::<u8>()), 0..20)) {
            let (block, entries) = table(|block| {
                for (at, byte) in noise {
                    block[at] = byte;
                }
            });
            if let Ok(header) = Header::parse(&block) {
                prop_assert!(header.bytes() <= 1 << 20);
                drop(header.partitions(&entries));
            }
        }
    }
}
