//! What a PID 1 in a bare initramfs needs; the modules are in the order in which a boot passes through them.
//!
//! Everything up to `table` is parsing without I/O. Whatever is on the disk is untrusted until dm-verity has checked it
//! against the root hash, which alone is trusted: it comes with the (measured or signed) kernel command line.

pub mod cmdline;
pub mod gpt;
pub mod root_hash;
pub mod superblock;
pub mod table;

pub mod block_watcher;
pub mod console;
pub mod disk;
pub mod dm;
pub mod failure;
pub mod modules;
pub mod mounts;
pub mod power;
pub mod uevents;
