//! What of a disk is free, by its partition table: numbers only.

use std::ops::Range;

use podvm_device_mapper::gpt::{Entry, Header};

/// Least size in sectors, 1 GiB. Less is what is left when a cloud rounds the image up to whole GiB: memory holds more.
pub const SECTORS_MIN: u64 = 1 << 21;
/// Bounds are multiples of this number of sectors, 1 MiB.
const UNIT: u64 = 1 << 11;
/// Bytes of a sector, the unit of sysfs and of all numbers here. The table's unit is the disk's logical block.
pub const SECTOR: u64 = 512;

/// What can't be right in a partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// A partition ends before it starts.
    #[error("partition {0} ends before it starts")]
    Backwards(usize),
    /// A partition is not on the disk.
    #[error("partition {0} ends beyond the disk")]
    Beyond(usize),
    /// Two partitions have blocks in common.
    #[error("partitions {0} and {1} overlap")]
    Overlap(usize, usize),
}

/// What the disk's table says, in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the last partition and the table itself end.
    pub end: u64,
    /// The backup of the table; it may be anywhere.
    pub backup: Range<u64>,
    /// Where the backup starts if it is at the end of the disk: firmware would write it there.
    pub tail: u64,
    /// Size of the disk.
    pub size: u64,
}

impl Layout {
    /// Reads the table. `scale` is the number of sectors in a logical block.
    ///
    /// # Errors
    /// The table can't be right.
    pub fn of(
        header: &Header,
        entries: &[Option<Entry>],
        scale: u64,
        size: u64,
    ) -> Result<Self, Contradiction> {
        let table = (header.bytes() as u64).div_ceil(SECTOR * scale).saturating_mul(scale);
        let mut end = header.first_block().saturating_mul(scale).saturating_add(table);
        let mut taken = Vec::new();
        for (entry, number) in entries.iter().zip(1..) {
            let Some(Entry { first_block, last_block, .. }) = *entry else { continue };
            if last_block < first_block {
                return Err(Contradiction::Backwards(number));
            }
            let behind = last_block.checked_add(1).and_then(|block| block.checked_mul(scale));
            let behind = behind.filter(|end| *end <= size).ok_or(Contradiction::Beyond(number))?;
            end = end.max(behind);
            taken.push((first_block, last_block, number));
        }
        taken.sort_unstable();
        for (before, after) in taken.iter().zip(taken.iter().skip(1)) {
            if before.1 >= after.0 {
                return Err(Contradiction::Overlap(before.2.min(after.2), before.2.max(after.2)));
            }
        }
        // A header of one block, with its entries before it.
        let behind = header.backup_block().saturating_add(1).saturating_mul(scale);
        let length = table.saturating_add(scale);
        let backup = behind.saturating_sub(length)..behind;
        Ok(Self { end, backup, tail: size.saturating_sub(length), size })
    }
}

/// Number of sectors.
#[must_use]
pub fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// What is free behind the last partition. The backup of the table splits it, unless it was moved to the end of the disk:
/// firmware would write it again.
#[must_use]
pub fn free(end: u64, backup: &Range<u64>, tail: u64) -> [Range<u64>; 2] {
    [end..backup.start.min(tail), end.max(backup.end)..tail].map(|part| {
        let end = part.end / UNIT * UNIT;
        part.start.checked_next_multiple_of(UNIT).map_or(0..0, |start| start..end)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 21;

    /// A header with these fields and 128 entries of 128 bytes; its checksum is right.
    fn header(first_block: u64, backup_block: u64) -> Header {
        let crc32 = |bytes: &[u8]| {
            !bytes.iter().fold(!0u32, |crc, byte| {
                (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                    crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
                })
            })
        };
        let mut block = [0; 512];
        block[..8].copy_from_slice(b"EFI PART");
        (block[12], block[24], block[80], block[84]) = (92, 1, 128, 128);
        block[32..40].copy_from_slice(&backup_block.to_le_bytes());
        block[72..80].copy_from_slice(&first_block.to_le_bytes());
        let crc = crc32(&block[..92]);
        block[16..20].copy_from_slice(&crc.to_le_bytes());
        Header::parse(&block).unwrap()
    }

    fn entry(first_block: u64, last_block: u64) -> Option<Entry> {
        Some(Entry { uuid: [0; 16], first_block, last_block })
    }

    fn largest(layout: &Layout) -> Option<Range<u64>> {
        let parts = free(layout.end, &layout.backup, layout.tail);
        parts.into_iter().max_by_key(length).filter(|part| length(part) >= SECTORS_MIN)
    }

    /// The free space of a disk with one partition that ends at `end`, in blocks of 512 bytes.
    fn space(end: u64, backup: u64, size: u64) -> Option<Range<u64>> {
        largest(&Layout::of(&header(2, backup), &[entry(2048, end - 1)], 1, size).unwrap())
    }

    #[test]
    fn an_image_as_large_as_its_disk_leaves_nothing() {
        assert_eq!(space(240_000, 245_759, 245_760), None);
        // Whole GiB, as Google Cloud takes images, with the backup moved to the end or not.
        assert_eq!(space(240_000, GIB - 1, GIB), None);
        assert_eq!(space(240_000, 245_759, GIB), None);
    }

    #[test]
    fn what_the_cloud_added_is_free() {
        assert_eq!(space(240_000, 245_759, 30 * GIB), Some(245_760..30 * GIB - UNIT));
        // The backup was moved to the end.
        assert_eq!(space(240_000, 30 * GIB - 1, 30 * GIB), Some(241_664..30 * GIB - UNIT));
        // It is in the middle of what is free, or the table says so: the larger part.
        assert_eq!(space(240_000, 2 * GIB, 30 * GIB), Some(2 * GIB + UNIT..30 * GIB - UNIT));
        assert_eq!(space(240_000, 20 * GIB, 30 * GIB), Some(241_664..20 * GIB - UNIT));
    }

    #[test]
    fn blocks_of_4096_bytes_count_as_eight_sectors() {
        let layout = Layout::of(&header(2, 30_719), &[entry(256, 29_999)], 8, 30 * GIB).unwrap();
        assert_eq!((layout.end, layout.backup.clone()), (240_000, 245_760 - 40..245_760));
        assert_eq!(largest(&layout), Some(245_760..30 * GIB - UNIT));
    }

    #[test]
    fn the_entries_of_the_table_are_not_free() {
        let layout = Layout::of(&header(20 * GIB, 245_759), &[entry(2048, 239_999)], 1, 30 * GIB).unwrap();
        assert_eq!(layout.end, 20 * GIB + 32);
    }

    #[test]
    fn a_table_that_contradicts_itself_is_refused() {
        let refused =
            |entries: &[Option<Entry>]| Layout::of(&header(2, 245_759), entries, 1, 30 * GIB).unwrap_err();
        assert_eq!(refused(&[None, entry(2048, 2047)]), Contradiction::Backwards(2));
        assert_eq!(refused(&[entry(2048, 30 * GIB)]), Contradiction::Beyond(1));
        assert_eq!(refused(&[entry(2048, u64::MAX)]), Contradiction::Beyond(1));
        let three = [entry(9000, 9999), entry(2048, 4095), entry(4095, 8999)];
        assert_eq!(refused(&three), Contradiction::Overlap(2, 3));
        // One within another that is not next to it in the table.
        assert_eq!(refused(&[entry(2048, 9999), None, entry(4096, 4096)]), Contradiction::Overlap(1, 3));
        assert!(Layout::of(&header(2, 245_759), &[entry(2048, 4095), entry(4096, 9999)], 1, GIB).is_ok());
    }

    /// A number of sectors or blocks: around the bounds that matter, or any.
    fn number() -> impl Strategy<Value = u64> {
        let near = prop::sample::select(vec![
            0,
            34,
            2048,
            245_760,
            2 * GIB,
            5 * GIB,
            30 * GIB,
            u64::MAX / 8,
            u64::MAX,
        ]);
        prop_oneof![
            (near, -3i64..4).prop_map(|(at, by)| at.saturating_add_signed(by)),
            any::<u64>(),
            0..30 * GIB
        ]
    }

    proptest! {
        #[test]
        fn nothing_in_use_is_ever_within(
            bounds in prop::collection::vec(prop::option::of((number(), number())), 0..6),
            place in (number().prop_filter("as parsed", |block| *block >= 2), number()),
            scale in prop::sample::select(vec![1u64, 8, 128]),
            size in number(),
        ) {
            let entries: Vec<_> = bounds.iter().map(|bounds| bounds.and_then(|(first, last)| entry(first, last))).collect();
            let Ok(layout) = Layout::of(&header(place.0, place.1), &entries, scale, size) else { return Ok(()) };
            let Some(space) = largest(&layout) else { return Ok(()) };
            prop_assert!(space.end <= size && length(&space) >= SECTORS_MIN);
            let apart = |first: u128, last: u128| {
                let scale = u128::from(scale);
                (last + 1) * scale <= u128::from(space.start) || first * scale >= u128::from(space.end)
            };
            for (first, last) in bounds.into_iter().flatten() {
                prop_assert!(apart(first.into(), last.into()), "{first} to {last}: {space:?}");
            }
            let table = (128 * 128 / SECTOR).div_ceil(scale);
            for (first, last) in [(place.0, place.0.saturating_add(table - 1)), (place.1.saturating_sub(table), place.1)] {
                prop_assert!(apart(first.into(), last.into()), "table at {first} to {last}: {space:?}");
            }
        }
    }
}
