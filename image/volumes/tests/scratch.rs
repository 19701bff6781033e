//! The scratch disk, with a loop device in place of dm-crypt's, which only a VM has. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::statvfs::{FsFlags, statvfs};
use support::{Loop, Script, Tree, in_own_mounts, own_mounts, run};
use volumes::failure::chain;
use volumes::mappings::Mappings;
use volumes::scratch::{self, MAPPING, MOUNT_POINT, Outcome, ScratchError};
use zeroize::Zeroizing;

const MARKER: &str = "/run/scratch-space.marker";
const MIB: u64 = 1 << 20;

/// A device mapper whose dm-5 the tree has, and what was asked of it.
#[derive(Default)]
struct Fake {
    created: Mutex<Vec<(String, u64)>>,
    removed: Mutex<Vec<bool>>,
}

impl Mappings for Fake {
    fn table(&self, _: &str) -> io::Result<(String, Zeroizing<String>)> {
        panic!("not for the scratch disk")
    }

    fn create_crypt(&self, name: &str, table: &str, sectors: u64) -> io::Result<u32> {
        assert_eq!(name, MAPPING);
        self.created.lock().unwrap().push((table.to_owned(), sectors));
        Ok(5)
    }

    fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        assert_eq!(name, MAPPING);
        self.removed.lock().unwrap().push(deferred);
        Ok(())
    }
}

/// A tree with a disk whose first partition has the label.
fn labelled() -> (Tree, Loop) {
    let (tree, disk) = (Tree::new(), Loop::new(64 * MIB));
    tree.disk("vdb", 254, 16).partition("vdb", "vdb1", disk.number.major, disk.number.minor);
    tree.attribute("class/block/vdb/vdb1/uevent", "DEVTYPE=partition\nPARTNAME=trusted_store\n");
    tree.attribute("class/block/vdb/vdb1/size", "131079\n");
    (tree, disk)
}

fn make(tree: &Tree, fake: &Fake) -> Result<Outcome, ScratchError> {
    fs::write(MARKER, "").unwrap();
    scratch::run(&own_mounts(&tree.roots), Path::new(MARKER), fake, &Script::uneventful())
}

fn failure(tree: &Tree) -> String {
    chain(&make(tree, &Fake::default()).unwrap_err()).replace(&*tree.roots.dev.to_string_lossy(), "/dev")
}

#[test]
fn without_the_marker_no_disk_is_touched() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        let fake = Fake::default();
        let outcome = scratch::run(&own_mounts(&tree.roots), Path::new(MARKER), &fake, &Script::uneventful());
        assert_eq!(outcome.unwrap(), Outcome::NotWanted);
        assert!(fake.created.lock().unwrap().is_empty());
    });
}

#[test]
fn the_labelled_partition_is_encrypted_and_mounted() {
    in_own_mounts(|| {
        let (tree, disk) = labelled();
        let opened = Loop::new(64 * MIB);
        tree.loop_disk("dm-5", &opened);
        let fake = Fake::default();
        assert_eq!(make(&tree, &fake).unwrap(), Outcome::Mounted);
        let (table, sectors) = fake.created.lock().unwrap()[0].clone();
        assert!(table.ends_with(&format!(" 0 {} 0 1 sector_size:4096", disk.number)), "{table}");
        assert_eq!(sectors, 131_072, "whole sectors of 4096 bytes");
        let flags = statvfs(MOUNT_POINT).unwrap().flags();
        assert!(flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV));
        assert_eq!(fs::read_dir(MOUNT_POINT).unwrap().count(), 0);
        let features = run("tune2fs", &["-l", opened.node.to_str().unwrap()]);
        assert!(!features.contains("has_journal"), "{features}");

        // Once more within the boot: as it is.
        tree.attribute("class/block/dm-5/dm/name", "podvm-scratch\n");
        assert_eq!(make(&tree, &fake).unwrap(), Outcome::WasMounted);
        assert_eq!((fake.created.lock().unwrap().len(), fake.removed.lock().unwrap().len()), (1, 0));

        // The kata agent does this at CreateSandbox, and ignores the error.
        fs::write(format!("{MOUNT_POINT}/layer"), "").unwrap();
        assert!(fs::remove_dir_all("/run/kata-containers").is_err());
        assert_eq!(fs::read_dir(MOUNT_POINT).unwrap().count(), 0);
        assert_eq!(make(&tree, &fake).unwrap(), Outcome::WasMounted);
    });
}

#[test]
fn a_disk_without_partitions_may_have_the_serial_number() {
    in_own_mounts(|| {
        let (tree, disk, opened) = (Tree::new(), Loop::new(64 * MIB), Loop::new(64 * MIB));
        tree.loop_disk("vdb", &disk).attribute("class/block/vdb/serial", "trusted_store\n");
        tree.loop_disk("dm-5", &opened);
        assert_eq!(make(&tree, &Fake::default()).unwrap(), Outcome::Mounted);
    });
}

#[test]
fn without_a_disk_it_fails_and_says_where_images_are() {
    in_own_mounts(|| {
        let tree = Tree::new();
        tree.disk("vdb", 254, 16).partition("vdb", "vdb1", 254, 17);
        // A disk with partitions is not taken by its serial number, nor a partition by another label.
        tree.attribute("class/block/vdb/serial", "trusted_store\n");
        tree.attribute("class/block/vdb/vdb1/uevent", "PARTNAME=trusted_store2\n");
        let text = failure(&tree);
        assert!(text.starts_with("no unused partition with the GPT label trusted_store"), "{text}");
        assert!(text.contains("images stay in memory"), "{text}");
    });
}

#[test]
fn two_labelled_partitions_are_refused() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        tree.disk("vdc", 254, 32).partition("vdc", "vdc1", 254, 33);
        tree.attribute("class/block/vdc/vdc1/uevent", "PARTNAME=trusted_store\n");
        assert_eq!(failure(&tree), "both vdb1 and vdc1 are labelled trusted_store: only one may be");
    });
}

#[test]
fn a_disk_in_use_is_refused() {
    in_own_mounts(|| {
        let (tree, disk) = labelled();
        run("mkfs.ext4", &["-q", disk.node.to_str().unwrap()]);
        run("mount", &[disk.node.to_str().unwrap(), "/mnt"]);
        let text = failure(&tree);
        assert!(text.starts_with("opening /dev/vdb1: ") && text.contains("busy"), "{text}");
        assert!(disk.has("ext4"));
    });
}

#[test]
fn another_mount_in_its_place_is_refused() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        fs::create_dir_all(MOUNT_POINT).unwrap();
        run("mount", &["-t", "tmpfs", "tmpfs", MOUNT_POINT]);
        assert_eq!(failure(&tree), "another file system is mounted at /run/kata-containers/image");
    });
}

#[test]
fn a_failure_leaves_no_mapping_behind() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        // No node of dm-5.
        let fake = Fake::default();
        let error = make(&tree, &fake).unwrap_err();
        assert!(matches!(error, ScratchError::Format(_)), "{error}");
        assert_eq!(*fake.removed.lock().unwrap(), [true]);
        // Nor one of a run that was killed.
        tree.mapping("dm-5", 253, 5, MAPPING, &["vdb1"]);
        let fake = Fake::default();
        assert!(make(&tree, &fake).is_err());
        assert_eq!(*fake.removed.lock().unwrap(), [false, true]);
    });
}

#[test]
fn the_kernels_refusal_is_the_cause() {
    struct Refuses;
    impl Mappings for Refuses {
        fn table(&self, _: &str) -> io::Result<(String, Zeroizing<String>)> {
            panic!("not for the scratch disk")
        }
        fn create_crypt(&self, _: &str, _: &str, _: u64) -> io::Result<u32> {
            Err(Errno::ENOENT.into())
        }
        fn remove(&self, _: &str, _: bool) -> io::Result<()> {
            panic!("nothing was made")
        }
    }
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        fs::write(MARKER, "").unwrap();
        let roots = own_mounts(&tree.roots);
        let error = scratch::run(&roots, Path::new(MARKER), &Refuses, &Script::uneventful()).unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with("encrypting ") && text.contains("No such file"), "{text}");
        assert!(!text.contains("aes-xts"), "{text}");
    });
}
