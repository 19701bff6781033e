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
use volumes::mounting::Woken;
use volumes::roots::Roots;
use volumes::scratch::{self, MAPPING, MOUNT_POINT, Outcome, ScratchError};
use volumes::spare::{self, NUMBER, Partitions};
use zeroize::Zeroizing;

const MARKER: &str = "/run/scratch-space.marker";
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

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

/// No disk has free space.
struct NoSpace;

impl Partitions for NoSpace {
    fn add(&self, _: &Path, _: i32, _: u64, _: u64) -> io::Result<()> {
        panic!("there is no free space")
    }
}

fn make(tree: &Tree, fake: &Fake) -> Result<Outcome, ScratchError> {
    fs::write(MARKER, "").unwrap();
    scratch::run(&own_mounts(&tree.roots), Path::new(MARKER), fake, Some(&NoSpace), &Script::uneventful())
}

fn failure(tree: &Tree) -> String {
    chain(&make(tree, &Fake::default()).unwrap_err()).replace(&*tree.roots.dev.to_string_lossy(), "/dev")
}

#[test]
fn without_the_marker_no_disk_is_touched() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        let fake = Fake::default();
        let roots = own_mounts(&tree.roots);
        let outcome = scratch::run(&roots, Path::new(MARKER), &fake, Some(&NoSpace), &Script::uneventful());
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

/// A device mapper with a mapping that stays in use for this number of attempts to remove it.
struct Busy(Mutex<u32>, Fake);

impl Mappings for Busy {
    fn table(&self, name: &str) -> io::Result<(String, Zeroizing<String>)> {
        self.1.table(name)
    }
    fn create_crypt(&self, name: &str, table: &str, sectors: u64) -> io::Result<u32> {
        self.1.create_crypt(name, table, sectors)
    }
    fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        let mut left = self.0.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return Err(Errno::EBUSY.into());
        }
        self.1.remove(name, deferred)
    }
}

#[test]
fn a_mapping_of_an_earlier_run_may_be_in_use_for_a_while() {
    in_own_mounts(|| {
        let (tree, _disk) = labelled();
        let opened = Loop::new(64 * MIB);
        tree.mapping("dm-5", opened.number.major, opened.number.minor, MAPPING, &[]);
        fs::write(MARKER, "").unwrap();
        let roots = own_mounts(&tree.roots);
        let marker = Path::new(MARKER);
        let stays = Busy(Mutex::new(u32::MAX), Fake::default());
        let error = scratch::run(&roots, marker, &stays, Some(&NoSpace), &Script::uneventful()).unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with("removing the mapping podvm-scratch of an earlier run: "), "{text}");
        assert!(text.contains("or restart the VM: ") && text.contains("busy"), "{text}");
        assert!(stays.1.created.lock().unwrap().is_empty());

        let ends = Busy(Mutex::new(3), Fake::default());
        let patience = Script::uneventful();
        assert_eq!(scratch::run(&roots, marker, &ends, Some(&NoSpace), &patience).unwrap(), Outcome::Mounted);
        assert_eq!(patience.pauses(), 3);
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
        let outcome =
            scratch::run(&roots, Path::new(MARKER), &Refuses, Some(&NoSpace), &Script::uneventful());
        let error = outcome.unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with("encrypting ") && text.contains("No such file"), "{text}");
        assert!(!text.contains("aes-xts"), "{text}");
    });
}

/// The partitions of the image's disk in a tree, and what was done to them.
struct Spare<'a> {
    tree: &'a Tree,
    opened: &'a Loop,
    done: Mutex<Vec<String>>,
}

impl Partitions for Spare<'_> {
    fn add(&self, disk: &Path, number: i32, first: u64, sectors: u64) -> io::Result<()> {
        assert!(disk.ends_with("vda") && number == NUMBER);
        self.done.lock().unwrap().push(format!("add {first} {sectors}"));
        self.tree.partition("vda", "vda128", self.opened.number.major, self.opened.number.minor);
        number_128(self.tree, first, sectors);
        Ok(())
    }
}

/// Makes vda128 a partition with these bounds and the number 128.
fn number_128(tree: &Tree, first: u64, sectors: u64) {
    for (attribute, value) in [("partition", 128), ("start", first), ("size", sectors)] {
        tree.attribute(&format!("class/block/vda128/{attribute}"), &format!("{value}\n"));
    }
}

/// Writes a partition table with sfdisk(8); the kernel does not read it.
fn write_table(disk: &Loop, how: &[&str], table: &str) {
    let mut sfdisk = std::process::Command::new("sfdisk");
    sfdisk
        .args(["--quiet", "--force", "--no-reread", "--no-tell-kernel"])
        .args(how)
        .arg(&disk.node)
        .stdin(std::process::Stdio::piped());
    let mut child = sfdisk.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// The table of an image of 120 MiB.
const TABLE: &str = "label: gpt\nstart=2048, size=81920\nstart=83968, size=159744\n";

/// A tree whose root is a partition of a disk of this size, as image/build makes it for 120 MiB.
fn image_on(bytes: u64) -> (Tree, Loop) {
    let (tree, mut disk) = (Tree::bare(), Loop::new(120 * MIB));
    write_table(&disk, &[], TABLE);
    disk.grow(bytes);
    tree.loop_disk("vda", &disk);
    for (name, minor, first, sectors) in [("vda1", 1, 2048, 81_920), ("vda2", 2, 83_968, 159_744)] {
        tree.partition("vda", name, 254, minor);
        tree.attribute(&format!("class/block/{name}/start"), &format!("{first}\n"));
        tree.attribute(&format!("class/block/{name}/size"), &format!("{sectors}\n"));
    }
    tree.mapping("dm-0", 253, 0, "root", &["vda2"]);
    tree.mounts("36 1 253:0 / / ro - erofs /dev/dm-0 ro\n");
    (tree, disk)
}

#[test]
fn free_space_behind_the_image_is_the_scratch_disk() {
    in_own_mounts(|| {
        let (tree, _disk) = image_on(4 * GIB);
        let (under, opened) = (Loop::new(64 * MIB), Loop::new(64 * MIB));
        tree.loop_disk("dm-5", &opened);
        fs::write(MARKER, "").unwrap();
        let space = Spare { tree: &tree, opened: &under, done: Mutex::default() };
        let (fake, marker, patience) = (Fake::default(), Path::new(MARKER), Script::uneventful());
        let made = scratch::run(&tree.roots, marker, &fake, Some(&space), &patience);
        assert_eq!(made.unwrap(), Outcome::Mounted);
        // Behind the backup of the partition table, up to where the end's would be.
        let (first, sectors) = (120 * MIB / 512, (4 * GIB - 121 * MIB) / 512);
        assert_eq!(*space.done.lock().unwrap(), [format!("add {first} {sectors}")]);
        let (table, mapped) = fake.created.lock().unwrap()[0].clone();
        assert!(table.ends_with(&format!(" 0 {} 0 1 sector_size:4096", under.number)), "{table}");
        assert_eq!((mapped, patience.pauses()), (sectors, 0));

        // What a run that was killed has left is taken as it is.
        run("umount", &[MOUNT_POINT]);
        let made = scratch::run(&tree.roots, marker, &fake, Some(&space), &patience);
        assert_eq!(made.unwrap(), Outcome::Mounted);
        assert_eq!(space.done.lock().unwrap().len(), 1);
        assert!(
            fake.created.lock().unwrap()[1].0.ends_with(&format!(" 0 {} 0 1 sector_size:4096", under.number))
        );
    });
}

/// Why there is no scratch disk in the free space of vda.
fn no_space(tree: &Tree) -> String {
    let mounts = volumes::mountinfo::read(&tree.roots).unwrap();
    chain(&spare::find(&tree.roots, &mounts).unwrap_err())
}

#[test]
fn a_partition_128_of_the_table_is_never_taken() {
    in_own_mounts(|| {
        let (tree, disk) = image_on(4 * GIB);
        // Where the scratch disk would be, and known to the kernel or not.
        write_table(&disk, &["--append"], "128: start=262144, size=6291456\n");
        let expected = "the partition table of vda has a partition 128 itself: \
                        the scratch disk's would have this number";
        assert_eq!(no_space(&tree), expected);
        tree.partition("vda", "vda128", 254, 3);
        number_128(&tree, 262_144, 6_291_456);
        assert_eq!(no_space(&tree), expected);

        fs::write(MARKER, "").unwrap();
        let (marker, patience) = (Path::new(MARKER), Script::uneventful());
        let made = scratch::run(&tree.roots, marker, &Fake::default(), Some(&NoSpace), &patience);
        let text = chain(&made.unwrap_err());
        assert!(text.contains("images stay in memory") && text.ends_with(expected), "{text}");
    });
}

#[test]
fn a_partition_128_is_ours_only_within_free_space() {
    in_own_mounts(|| {
        let (tree, _disk) = image_on(4 * GIB);
        let mounts = volumes::mountinfo::read(&tree.roots).unwrap();
        let space = spare::find(&tree.roots, &mounts).unwrap();
        tree.partition("vda", "vda128", 254, 3);
        let (first, sectors) = (space.first, space.sectors);
        for (first, sectors) in [
            (0, sectors),
            (2048, 81_920),
            // Over the root's end, the backup of the table, or the end of the disk.
            (first - 2048, sectors),
            (first - 1, sectors),
            (first, sectors + 4096),
            (first, 0),
            (first, 4096),
            (first, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            number_128(&tree, first, sectors);
            let text = no_space(&tree);
            let is_clear = text
                .starts_with("vda has a partition 128 that is not in its partition table and is not one of ")
                || text == "reading the partitions of vda in sysfs: no bounds of vda128";
            assert!(is_clear, "{first} {sectors}: {text}");
        }
        // An earlier run's, also if the cloud has made the disk larger since.
        for sectors in [sectors, sectors - 2048] {
            number_128(&tree, first, sectors);
            let found = spare::find(&tree.roots, &mounts).unwrap();
            assert_eq!((found.first, found.sectors), (first, sectors));
            assert!(found.partition.unwrap().node.ends_with("vda128"));
        }
    });
}

#[test]
fn a_partition_of_the_table_alone_is_not_free() {
    in_own_mounts(|| {
        let (tree, disk) = image_on(4 * GIB);
        write_table(&disk, &["--append"], "5: start=262144, size=4194304\n");
        let mounts = volumes::mountinfo::read(&tree.roots).unwrap();
        let space = spare::find(&tree.roots, &mounts).unwrap();
        assert_eq!((space.first, space.sectors), (4_456_448, 8_388_608 - 2048 - 4_456_448));
        write_table(&disk, &["--append"], "6: start=4456448, size=2097152\n");
        assert_eq!(
            no_space(&tree),
            "vda has less than 1024 MiB free behind its last partition and its table, which end at 3200 MiB of 4096"
        );
    });
}

#[test]
fn a_partition_of_the_kernel_alone_is_not_free() {
    in_own_mounts(|| {
        let (tree, _disk) = image_on(4 * GIB);
        tree.partition("vda", "vda3", 254, 3);
        tree.attribute("class/block/vda3/start", "262144\n").attribute("class/block/vda3/size", "4194304\n");
        let mounts = volumes::mountinfo::read(&tree.roots).unwrap();
        assert_eq!(spare::find(&tree.roots, &mounts).unwrap().first, 4_456_448);
    });
}

#[test]
fn a_table_that_lies_is_refused() {
    in_own_mounts(|| {
        let (tree, disk) = image_on(4 * GIB);
        write_table(&disk, &["--append"], "5: start=262144, size=4194304\n");
        // The disk became smaller.
        tree.attribute("class/block/vda/size", "4456447\n");
        assert_eq!(
            no_space(&tree),
            "the partition table of vda can't be right: partition 5 ends beyond the disk"
        );
        tree.attribute("class/block/vda/size", "nonsense\n");
        assert_eq!(no_space(&tree), "reading the partitions of vda in sysfs: no size, or none of its blocks");
        tree.attribute("class/block/vda/size", "8388608\n");
        // A byte of its entries, then of its header, is another.
        let write = |at, byte| {
            let file = fs::OpenOptions::new().write(true).open(&disk.node).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[byte], at).unwrap();
        };
        write(2 * 512 + 200, 7);
        assert_eq!(
            no_space(&tree),
            "reading the partition table of vda: GPT entries: checksum does not match"
        );
        write(512 + 40, 7);
        assert_eq!(
            no_space(&tree),
            "reading the partition table of vda: GPT header: checksum does not match"
        );
    });
}

#[test]
fn the_kernels_partition_of_free_space_is_found_again() {
    in_own_mounts(|| {
        for block in ["512", "4096"] {
            let mut disk = Loop::new(120 * MIB);
            run("losetup", &["--sector-size", block, disk.node.to_str().unwrap()]);
            write_table(&disk, &[], "label: gpt\nsize=100MiB\n");
            disk.grow(3 * GIB);
            let text = format!("36 1 {} / / ro - erofs /dev/root ro\n", disk.number);
            let tree = Tree::bare();
            let roots = Roots { mountinfo: tree.mounts(&text).roots.mountinfo.clone(), ..Roots::system() };
            let mounts = volumes::mountinfo::read(&roots).unwrap();
            let space = spare::find(&roots, &mounts).unwrap();
            assert_eq!((space.first, space.sectors), (120 * 2048, (3 * 1024 - 121) * 2048), "{block}");
            assert_eq!(space.partition, None);
            spare::Kernel.add(&disk.node, NUMBER, space.first, space.sectors).unwrap();
            // In use or not.
            let made = spare::find(&roots, &mounts).unwrap();
            let partition = made.partition.unwrap();
            let _held = fs::File::open(&partition.node).unwrap();
            assert_eq!((made.first, made.sectors), (space.first, space.sectors));
            assert_eq!(partition.sectors(&roots), Some(space.sectors));
            assert_eq!(spare::find(&roots, &mounts).unwrap().partition, Some(partition));
        }
    });
}

#[test]
fn a_late_labelled_disk_is_waited_for_if_it_alone_counts() {
    in_own_mounts(|| {
        let (tree, _disk) = image_on(4 * GIB);
        let (own, opened) = (Loop::new(64 * MIB), Loop::new(64 * MIB));
        tree.loop_disk("dm-5", &opened);
        fs::write(MARKER, "").unwrap();
        let (fake, marker, patience) = (Fake::default(), Path::new(MARKER), Script::uneventful());
        let text = chain(&scratch::run(&tree.roots, marker, &fake, None, &patience).unwrap_err());
        assert!(
            text.contains("(--labelled-only): images stay in memory") && patience.pauses() == 59,
            "{text}"
        );

        let late = Script::new(|pause| {
            if pause == 50 {
                tree.loop_disk("vdb", &own).attribute("class/block/vdb/serial", "trusted_store\n");
            }
            Woken::Time
        });
        assert_eq!(scratch::run(&tree.roots, marker, &fake, None, &late).unwrap(), Outcome::Mounted);
        let (table, _) = fake.created.lock().unwrap()[0].clone();
        assert!(table.ends_with(&format!(" 0 {} 0 1 sector_size:4096", own.number)), "{table}");
    });
}

#[test]
fn a_labelled_disk_counts_before_free_space() {
    in_own_mounts(|| {
        let (tree, _disk) = image_on(4 * GIB);
        let (own, opened) = (Loop::new(64 * MIB), Loop::new(64 * MIB));
        tree.loop_disk("vdb", &own).attribute("class/block/vdb/serial", "trusted_store\n");
        tree.loop_disk("dm-5", &opened);
        fs::write(MARKER, "").unwrap();
        let made = scratch::run(
            &tree.roots,
            Path::new(MARKER),
            &Fake::default(),
            Some(&NoSpace),
            &Script::uneventful(),
        );
        assert_eq!(made.unwrap(), Outcome::Mounted);
    });
}

#[test]
fn too_little_free_space_is_left_alone() {
    in_own_mounts(|| {
        // As large as the image, and rounded up to a whole GiB.
        for bytes in [120 * MIB, GIB] {
            let (tree, _disk) = image_on(bytes);
            fs::write(MARKER, "").unwrap();
            let patience = Script::uneventful();
            let made =
                scratch::run(&tree.roots, Path::new(MARKER), &Fake::default(), Some(&NoSpace), &patience);
            let text = chain(&made.unwrap_err());
            assert!(
                text.contains("no free space behind the image on its own disk: images stay in"),
                "{text}"
            );
            let mib = bytes / MIB;
            let cause = "vda has less than 1024 MiB free behind its last partition and its table, which end at 119 MiB of";
            assert!(text.ends_with(&format!(": {cause} {mib}")), "{text}");
        }
    });
}

#[test]
fn a_disk_without_a_gpt_has_no_free_space() {
    in_own_mounts(|| {
        let (tree, disk) = image_on(4 * GIB);
        let mounts = volumes::mountinfo::read(&tree.roots).unwrap();
        assert_eq!(spare::find(&tree.roots, &mounts).unwrap().partition, None);
        run("wipefs", &["--all", "--quiet", disk.node.to_str().unwrap()]);
        assert_eq!(no_space(&tree), "reading the partition table of vda: no GPT (signature)");
    });
}

#[test]
fn the_kernel_makes_a_partition() {
    in_own_mounts(|| {
        let disk = Loop::new(64 * MIB);
        let name = disk.node.file_name().unwrap().to_str().unwrap().to_owned();
        let sysfs = Path::new("/sys/class/block").join(format!("{name}p{NUMBER}"));
        let kernel = spare::Kernel;
        kernel.add(&disk.node, NUMBER, 2048, 4096).unwrap();
        let read = |attribute| fs::read_to_string(sysfs.join(attribute)).unwrap().trim().to_owned();
        assert_eq!(["start", "size", "partition"].map(read), ["2048", "4096", "128"]);
        let overlaps = kernel.add(&disk.node, NUMBER - 1, 4096, 4096).unwrap_err();
        assert_eq!(overlaps.raw_os_error(), Some(Errno::EBUSY as i32));
        let twice = kernel.add(&disk.node, NUMBER, 8192, 4096).unwrap_err();
        assert_eq!(twice.raw_os_error(), Some(Errno::EBUSY as i32));
        assert!(kernel.add(&disk.node, NUMBER - 1, 64 * MIB / 512 - 8, 16).is_err(), "beyond the disk");
        assert!(!disk.holds(&[0xff]), "something was written");
    });
}
