//! The steps of a PID 1 in a bare initramfs, in the order of a boot.
//!
//! The first block parses without I/O; the second acts. The disk is untrusted until dm-verity has checked it against
//! the root hash. Only the root hash is trusted: it comes with the (measured or signed) kernel command line.

pub mod cmdline;
pub mod root_hash;

pub use podvm_device_mapper::gpt;

pub mod superblock;
pub mod table;

pub mod mounts;

pub mod console;

pub mod uevents;

pub mod modules;

pub mod disk;

pub mod dm;

pub mod erofs;

pub mod block_watcher;

pub mod failure;
pub mod power;
