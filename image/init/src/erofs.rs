//! The size of the root's file system, by its own superblock.
//!
//! How many blocks dm-verity covers is for the host to say: the number is in the hash partition, and no part of the root
//! hash. A host that names too few makes the last files unreadable, by errors that are no verification failure, so that
//! `block_watcher` sees none. The file system's own superblock is among the verified blocks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::failure::{Context, Failure};

/// Offset of the superblock on the device, in bytes (the kernel's `fs/erofs/erofs_fs.h`).
const OFFSET: u64 = 1024;
/// Size of a superblock, in bytes.
const SIZE: usize = 128;
/// At the start of a superblock, as on the disk.
const MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
/// Block sizes that erofs has, as powers of two: from a sector to 64 KiB.
const BLOCK_BITS: std::ops::RangeInclusive<u8> = 9..=16;
/// Feature of newer images: the number of blocks has 16 more bits.
const MANY_BLOCKS: u32 = 0x80;

/// The superblock is not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadErofs {
    /// The device has no erofs.
    #[error("no erofs (signature)")]
    Signature,
    /// No block size of erofs.
    #[error("blocks of 2^{0} bytes")]
    BlockSize(u8),
}
crate::failure::causes!(BadErofs);

/// Checks that dm-verity covers the whole file system on `device`: its first `covered` bytes.
///
/// # Errors
/// It does not, or the superblock can't be read.
pub fn check_covered(device: &Path, covered: u64) -> Result<(), Failure> {
    let reading = || "reading the root's superblock";
    let mut raw = [0; SIZE];
    File::open(device).and_then(|device| device.read_exact_at(&mut raw, OFFSET)).context(reading)?;
    let bytes = size(&raw).context(reading)?;
    if covered < bytes {
        return Err(Failure::new(
            "checking what dm-verity covers",
            format_args!(
                "{covered} bytes of a root of {bytes}: the number of data blocks in the verity superblock was changed"
            ),
        ));
    }
    Ok(())
}

/// Size of a file system in bytes.
fn size(raw: &[u8; SIZE]) -> Result<u64, BadErofs> {
    if field::<4>(raw, 0) != MAGIC {
        return Err(BadErofs::Signature);
    }
    let [bits] = field(raw, 12);
    if !BLOCK_BITS.contains(&bits) {
        return Err(BadErofs::BlockSize(bits));
    }
    let low = u64::from(u32::from_le_bytes(field(raw, 36)));
    let has_high = u32::from_le_bytes(field(raw, 80)) & MANY_BLOCKS != 0;
    let high = if has_high { u64::from(u16::from_le_bytes(field(raw, 14))) } else { 0 };
    // Less than 2^48 blocks, of 2^16 bytes at most: no overflow.
    Ok((high << 32 | low) << bits)
}

/// `N` bytes at the offset `at`.
fn field<const N: usize>(raw: &[u8; SIZE], at: usize) -> [u8; N] {
    let mut field = [0; N];
    for (to, byte) in field.iter_mut().zip(raw.iter().skip(at)) {
        *to = *byte;
    }
    field
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn raw(bits: u8, blocks: u32) -> [u8; SIZE] {
        let mut raw = [0; SIZE];
        raw[..4].copy_from_slice(&MAGIC);
        raw[12] = bits;
        // The number of the root's inode, unless there are many blocks.
        raw[14..16].copy_from_slice(&[36, 0]);
        raw[36..40].copy_from_slice(&blocks.to_le_bytes());
        raw
    }

    #[test]
    fn the_size_is_read() {
        assert_eq!(size(&raw(12, 1000)), Ok(4_096_000));
        assert_eq!(size(&raw(9, u32::MAX)), Ok((1 << 32) * 512 - 512));
        let mut many = raw(12, 1);
        many[80] = 0x80;
        assert_eq!(size(&many), Ok(((36 << 32) + 1) * 4096));
        many[12] = 16;
        many[14..16].fill(0xff);
        many[36..40].fill(0xff);
        assert_eq!(size(&many), Ok(u64::MAX - 0xffff));
    }

    #[test]
    fn what_is_no_erofs_is_refused() {
        assert_eq!(size(&[0; SIZE]), Err(BadErofs::Signature));
        for bits in [0, 8, 17, 255] {
            assert_eq!(size(&raw(bits, 1)), Err(BadErofs::BlockSize(bits)));
        }
    }

    #[test]
    fn a_root_that_is_covered_in_part_is_refused() {
        let mut device = tempfile::NamedTempFile::new().unwrap();
        device.write_all(&[0; 1024]).unwrap();
        device.write_all(&raw(12, 3)).unwrap();
        for covered in [3 * 4096, 4 * 4096] {
            check_covered(device.path(), covered).unwrap();
        }
        for covered in [0, 1, 2 * 4096, 3 * 4096 - 512] {
            let error = check_covered(device.path(), covered).unwrap_err().to_string();
            assert!(error.contains(&format!("{covered} bytes of a root of 12288: ")), "{error}");
        }
        // The device ends before the superblock does.
        device.as_file().set_len(1100).unwrap();
        let error = check_covered(device.path(), 4096).unwrap_err().to_string();
        assert!(error.contains("reading the root's superblock"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(noise in prop::collection::vec((0..SIZE, any::<u8>()), 0..40)) {
            let mut raw = raw(12, 99);
            for (at, byte) in noise {
                raw[at] = byte;
            }
            prop_assert_eq!(size(&raw).is_ok(), raw[..4] == MAGIC && BLOCK_BITS.contains(&raw[12]));
        }
    }
}
