//! The superblock at the start of a dm-verity hash partition, as veritysetup and systemd-repart write it
//! (cryptsetup, `lib/verity/verity.c`). It is untrusted: dm-verity checks everything against the root hash.

/// Size of a superblock, in bytes.
pub const SIZE: usize = 512;
/// Block sizes that the kernel accepts for data and hashes, in bytes: from a sector to a page. veritysetup writes 4096,
/// systemd-repart the disk's sector size.
const BLOCK_SIZES: [u32; 4] = [512, 1024, 2048, 4096];
/// Size of a SHA-256 hash, in bytes.
const HASH: u64 = 32;
/// Longest salt of a superblock, in bytes.
const MAX_SALT: usize = 256;
/// Limit of the number of data blocks, up to 4 PiB, so that no sum below overflows.
const MAX_DATA_BLOCKS: u64 = 1 << 40;

/// Parameters with which the kernel checks the data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    data_block: u32,
    hash_block: u32,
    data_blocks: u64,
    salt: Vec<u8>,
}

/// The superblock is not accepted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadSuperblock {
    /// The partition has no superblock.
    #[error("no verity superblock (signature)")]
    Signature,
    /// The version is not 1.
    #[error("superblock version {0}, not 1")]
    Version(u32),
    /// The hash type is not 1 (0 is the layout of Chrome OS).
    #[error("hash type {0}, not 1")]
    HashType(u32),
    /// The hash algorithm is not SHA-256.
    #[error("hash algorithm is not sha256")]
    Algorithm,
    /// A block size that the kernel does not accept.
    #[error("blocks of {data} (data) and {hash} (hashes) bytes, not of 512, 1024, 2048 or 4096")]
    BlockSize {
        /// Size of a data block, in bytes.
        data: u32,
        /// Size of a hash block, in bytes.
        hash: u32,
    },
    /// No data blocks, or too many.
    #[error("{0} data blocks")]
    DataBlocks(u64),
    /// The salt is longer than its field.
    #[error("salt of {0} bytes, more than {MAX_SALT}")]
    Salt(u16),
}
crate::failure::causes!(BadSuperblock);

impl Superblock {
    /// Reads a superblock and checks every field.
    ///
    /// # Errors
    /// The first field that is not accepted.
    pub fn parse(raw: &[u8; SIZE]) -> Result<Self, BadSuperblock> {
        if field::<8>(raw, 0) != *b"verity\0\0" {
            return Err(BadSuperblock::Signature);
        }
        let u32_at = |at| u32::from_le_bytes(field(raw, at));
        match (u32_at(8), u32_at(12)) {
            (1, 1) => {}
            (1, hash_type) => return Err(BadSuperblock::HashType(hash_type)),
            (version, _) => return Err(BadSuperblock::Version(version)),
        }
        let mut sha256 = [0; 32];
        for (to, byte) in sha256.iter_mut().zip(b"sha256") {
            *to = *byte;
        }
        if field::<32>(raw, 32) != sha256 {
            return Err(BadSuperblock::Algorithm);
        }
        let (data, hash) = (u32_at(64), u32_at(68));
        if !BLOCK_SIZES.contains(&data) || !BLOCK_SIZES.contains(&hash) {
            return Err(BadSuperblock::BlockSize { data, hash });
        }
        let data_blocks = u64::from_le_bytes(field(raw, 72));
        if !(1..=MAX_DATA_BLOCKS).contains(&data_blocks) {
            return Err(BadSuperblock::DataBlocks(data_blocks));
        }
        let salt_size = u16::from_le_bytes(field(raw, 80));
        if usize::from(salt_size) > MAX_SALT {
            return Err(BadSuperblock::Salt(salt_size));
        }
        let salt = field::<MAX_SALT>(raw, 88).into_iter().take(usize::from(salt_size)).collect();
        Ok(Self { data_block: data, hash_block: hash, data_blocks, salt })
    }

    /// Size of a data block, in bytes.
    pub fn data_block(&self) -> u32 {
        self.data_block
    }

    /// Size of a hash block, in bytes.
    pub fn hash_block(&self) -> u32 {
        self.hash_block
    }

    /// Number of data blocks.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Salt of every hash.
    pub fn salt(&self) -> &[u8] {
        &self.salt
    }

    /// Smallest size of the data partition, in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.data_blocks * u64::from(self.data_block)
    }

    /// Smallest size of the hash partition, in bytes: the superblock's block and every level of the tree.
    pub fn hash_bytes(&self) -> u64 {
        let block = u64::from(self.hash_block);
        let (mut blocks, mut level) = (1, self.data_blocks);
        loop {
            level = level.div_ceil(block / HASH);
            blocks += level;
            if level <= 1 {
                return blocks * block;
            }
        }
    }
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
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn raw(data_blocks: u64, salt: &[u8]) -> [u8; SIZE] {
        let mut raw = [0; SIZE];
        raw[..8].copy_from_slice(b"verity\0\0");
        (raw[8], raw[12]) = (1, 1);
        raw[32..38].copy_from_slice(b"sha256");
        raw[64..68].copy_from_slice(&4096u32.to_le_bytes());
        raw[68..72].copy_from_slice(&4096u32.to_le_bytes());
        raw[72..80].copy_from_slice(&data_blocks.to_le_bytes());
        raw[80..82].copy_from_slice(&u16::try_from(salt.len()).unwrap().to_le_bytes());
        raw[88..88 + salt.len()].copy_from_slice(salt);
        raw
    }

    #[test]
    fn a_good_superblock_is_accepted() {
        let sb = Superblock::parse(&raw(1000, &[7; 32])).unwrap();
        assert_eq!((sb.data_blocks(), sb.salt()), (1000, &[7; 32][..]));
        assert_eq!(sb.data_bytes(), 4_096_000);
    }

    #[test]
    fn the_size_of_a_tree_is_the_sum_of_its_levels() {
        for (data, hash) in
            [(1, 2), (128, 2), (129, 1 + 2 + 1), (128 * 128, 1 + 128 + 1), (128 * 128 + 1, 1 + 129 + 2 + 1)]
        {
            assert_eq!(Superblock::parse(&raw(data, b"")).unwrap().hash_bytes(), hash * 4096, "{data}");
        }
    }

    #[test]
    fn blocks_may_be_sectors() {
        let mut raw = raw(1000, b"");
        raw[64..68].copy_from_slice(&512u32.to_le_bytes());
        raw[68..72].copy_from_slice(&512u32.to_le_bytes());
        let sb = Superblock::parse(&raw).unwrap();
        assert_eq!((sb.data_bytes(), sb.hash_bytes()), (512_000, (1 + 63 + 4 + 1) * 512));
    }

    #[test]
    fn every_field_is_checked() {
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = raw(10, b"salt");
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            Superblock::parse(&bad).unwrap_err()
        };
        assert_eq!(with(0, b"V"), BadSuperblock::Signature);
        assert_eq!(with(8, &[2]), BadSuperblock::Version(2));
        assert_eq!(with(12, &[0]), BadSuperblock::HashType(0));
        assert_eq!(with(32, b"sha1\0\0"), BadSuperblock::Algorithm);
        assert_eq!(with(38, b"-ni"), BadSuperblock::Algorithm);
        assert_eq!(with(64, &8192u32.to_le_bytes()), BadSuperblock::BlockSize { data: 8192, hash: 4096 });
        assert_eq!(with(68, &0u32.to_le_bytes()), BadSuperblock::BlockSize { data: 4096, hash: 0 });
        assert_eq!(with(72, &[0; 8]), BadSuperblock::DataBlocks(0));
        assert_eq!(with(72, &[0xff; 8]), BadSuperblock::DataBlocks(u64::MAX));
        assert_eq!(with(80, &257u16.to_le_bytes()), BadSuperblock::Salt(257));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(noise in prop::collection::vec((0..SIZE, any::<u8>()), 0..40)) {
            let mut raw = raw(99, b"salt");
            for (at, byte) in noise {
                raw[at] = byte;
            }
            if let Ok(sb) = Superblock::parse(&raw) {
                prop_assert!(sb.hash_bytes() >= 1024 && sb.data_bytes() >= 512 && sb.salt().len() <= MAX_SALT);
            }
        }
    }
}
