//! The kernel's table of a verity device (Documentation/admin-guide/device-mapper/verity.rst).

use crate::root_hash::RootHash;
use crate::superblock::Superblock;

/// Text of the table. Devices are given as "major:minor", which needs no device node.
///
/// The table has no option about corruption, so a bad block is an I/O error. That alone would let an attacker make
/// chosen files unreadable, and a program may be less strict if a file is missing. Therefore `block_watcher` powers
/// the machine off at the first bad block. `panic_on_corruption` and `restart_on_corruption` act within the kernel,
/// but then the machine boots from the same disk again and again, or hangs with `panic=0`. None of them covers a host
/// that answers reads with errors; kernels from 6.13 on have `panic_on_error` for that. `check_at_most_once` is left
/// out too: a block is checked at every read, because the disk belongs to the host.
pub fn verity(superblock: &Superblock, root_hash: &RootHash, data: &str, hash: &str) -> String {
    let salt = match superblock.salt() {
        [] => "-".into(),
        salt => salt.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
    };
    let (data_block, hash_block, blocks) =
        (superblock.data_block(), superblock.hash_block(), superblock.data_blocks());
    // Version, devices, block sizes, data blocks, first block of hashes (after the superblock), algorithm.
    format!("1 {data} {hash} {data_block} {hash_block} {blocks} 1 sha256 {root_hash} {salt}")
}

#[cfg(test)]
mod tests {
    use super::verity;
    use crate::root_hash::RootHash;
    use crate::superblock::{Superblock, tests::raw};

    #[test]
    fn the_table_is_as_the_kernel_documents() {
        let root = "5a".repeat(32);
        let hash = RootHash::parse(&root).unwrap();
        let table =
            |salt: &[u8]| verity(&Superblock::parse(&raw(777, salt)).unwrap(), &hash, "254:2", "254:3");
        assert_eq!(table(&[1, 0xfe]), format!("1 254:2 254:3 4096 4096 777 1 sha256 {root} 01fe"));
        assert_eq!(table(&[]), format!("1 254:2 254:3 4096 4096 777 1 sha256 {root} -"));
        assert!(table(&[9; 256]).len() < 1024);
    }
}
