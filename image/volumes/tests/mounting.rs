//! Volumes on loop devices, each test with mounts of its own. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use prost::Message;
use secure_comms_protocol::volumes::FailureKind;
use support::{Loop, Script, Tree, in_own_mounts, own_mounts, run, volume};
use volumes::cdh::{Request, Response, SecureMount, Status, frame};
use volumes::mappings::Mappings;
use volumes::mountinfo;
use volumes::mounting::{Settings, Volumes, Woken};
use volumes::mounts::BusyLimit;
use zeroize::Zeroizing;

const MIB: u64 = 1 << 20;
/// Where the volume of most tests is mounted.
const AT: &str = "/run/cloud-volumes/vol-0";
const DATA_HUB: &str = "/run/cdh.sock";
const AES: &str = "aes-xts-plain64 :64:logon:cryptsetup:u-d0 0 7:0 32768";

/// Devices of a device mapper that is not there: what was asked of it, and the table that it has.
#[derive(Clone, Default)]
struct Fake {
    asked: Arc<Mutex<Vec<String>>>,
    tables: Arc<Mutex<BTreeMap<String, String>>>,
    busy: Arc<Mutex<u32>>,
}

impl Mappings for Fake {
    fn table(&self, name: &str) -> io::Result<(String, Zeroizing<String>)> {
        let tables = self.tables.lock().unwrap();
        let table = tables.get(name).ok_or(Errno::ENXIO)?;
        Ok(("crypt".into(), Zeroizing::new(table.clone())))
    }

    fn create_crypt(&self, _: &str, _: &str, _: u64) -> io::Result<u32> {
        panic!("not for volumes")
    }

    fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        let mut busy = self.busy.lock().unwrap();
        if !deferred && *busy > 0 {
            *busy -= 1;
            return Err(Errno::EBUSY.into());
        }
        self.tables.lock().unwrap().remove(name).ok_or(Errno::ENXIO)?;
        self.asked.lock().unwrap().push(format!("{name}{}", if deferred { ", deferred" } else { "" }));
        Ok(())
    }
}

fn settings() -> Settings {
    Settings {
        busy: BusyLimit { attempts: 3, pause: Duration::from_millis(1) },
        data_hub: DATA_HUB.into(),
        ..Settings::default()
    }
}

fn volumes_of(tree: &Tree, settings: Settings, mappings: Fake) -> Volumes {
    Volumes::new(own_mounts(&tree.roots), settings, Box::new(mappings))
}

/// A tree whose vdb is a loop device of this size.
fn tree(bytes: u64) -> (Tree, Loop) {
    let (tree, device) = (Tree::new(), Loop::new(bytes));
    tree.loop_disk("vdb", &device);
    (tree, device)
}

fn mounts_at(path: &str) -> usize {
    let roots = own_mounts(&volumes::roots::Roots::system());
    mountinfo::read(&roots).unwrap().iter().filter(|mount| mount.at == Path::new(path)).count()
}

fn failure(volumes: &Volumes, wanted: &[secure_comms_protocol::volumes::Volume]) -> (FailureKind, String) {
    let failure = volumes.mount(wanted, &Script::uneventful()).unwrap_err().to_failure();
    (failure.kind, failure.message)
}

#[test]
fn an_empty_disk_is_formatted_once_and_keeps_its_data() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::uneventful();
        assert_eq!(volumes.mount(&[volume("vol-0", 0)], &patience).unwrap(), [AT]);
        assert_eq!(patience.pauses(), 0, "waited for a disk that was there");
        let flags = statvfs(AT).unwrap().flags();
        assert!(
            flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV) && !flags.contains(FsFlags::ST_RDONLY)
        );
        fs::write(format!("{AT}/data"), "kept").unwrap();

        // Once more: as it is.
        assert_eq!(volumes.mount(&[volume("vol-0", 0)], &patience).unwrap(), [AT]);
        assert_eq!(mounts_at(AT), 1);
        volumes.unmount_all().unwrap();
        assert_eq!(mounts_at(AT), 0);
        assert!(!Path::new(AT).exists() && device.has("ext4"));

        // A restart of the service, or another VM.
        let volumes = volumes_of(&tree, settings(), Fake::default());
        volumes.mount(&[volume("vol-0", 0)], &patience).unwrap();
        assert_eq!(fs::read_to_string(format!("{AT}/data")).unwrap(), "kept");
    });
}

#[test]
fn a_disk_that_arrives_late_is_waited_for() {
    in_own_mounts(|| {
        let (tree, device) = (Tree::new(), Loop::new(16 * MIB));
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::new(|pause| {
            if pause == 14 {
                tree.loop_disk("vdb", &device);
            }
            Woken::Time
        });
        volumes.mount(&[volume("vol-0", 0)], &patience).unwrap();
        assert_eq!(patience.pauses(), 14);
    });
}

#[test]
fn without_a_disk_it_says_what_it_looked_for() {
    in_own_mounts(|| {
        let tree = Tree::new();
        tree.link("disk/azure/data/by-lun/7", "vda");
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::uneventful();
        let mut wanted = volume("vol-0", 7);
        wanted.disk_id = "vol-0abc".into();
        let failure = volumes.mount(&[wanted], &patience).unwrap_err().to_failure();
        assert_eq!((failure.kind, patience.pauses()), (FailureKind::NoDisk, 14));
        let text = failure.message.replace(&*tree.roots.dev.to_string_lossy(), "/dev");
        assert_eq!(
            text,
            "volume vol-0: no disk with LUN 7 or id vol-0abc within 28 s (/dev/vda is in use: it, or a partition of it, \
             is mounted at /); check that the cloud has attached it"
        );
    });
}

#[test]
fn an_agent_that_leaves_ends_the_wait() {
    in_own_mounts(|| {
        let tree = Tree::new();
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::new(|pause| if pause == 3 { Woken::GivenUp } else { Woken::Time });
        assert!(volumes.mount(&[volume("vol-0", 0)], &patience).is_err());
        assert_eq!(patience.pauses(), 3);
    });
}

#[test]
fn an_agent_that_leaves_gets_no_further_volume() {
    in_own_mounts(|| {
        let (tree, _device) = tree(16 * MIB);
        let other = Loop::new(16 * MIB);
        tree.loop_disk("vdc", &other);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::new(|pause| if pause == 1 { Woken::GivenUp } else { Woken::Time });
        assert!(volumes.mount(&[volume("vol-0", 0), volume("vol-1", 1)], &patience).is_err());
        assert_eq!((mounts_at(AT), mounts_at("/run/cloud-volumes/vol-1")), (1, 0));
        volumes.unmount_all().unwrap();
    });
}

#[test]
fn events_without_end_do_not_lengthen_the_wait() {
    in_own_mounts(|| {
        let tree = Tree::new();
        let short = Settings { attempts: 2, delay: Duration::from_millis(20), ..settings() };
        let volumes = volumes_of(&tree, short, Fake::default());
        let (kind, _) = {
            let failure = volumes
                .mount(&[volume("vol-0", 0)], &Script::new(|_| Woken::Event))
                .unwrap_err()
                .to_failure();
            (failure.kind, failure.message)
        };
        assert_eq!(kind, FailureKind::NoDisk);
    });
}

#[test]
fn what_is_on_a_disk_is_never_overwritten() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let node = device.node.to_str().unwrap();
        let refused = |what: &str| {
            let (kind, text) = failure(&volumes, &[volume("vol-0", 0)]);
            assert_eq!(kind, FailureKind::Refused, "{text}");
            assert!(
                text.contains(&format!("/vdb has {what}, not ext4: it is neither mounted nor formatted")),
                "{text}"
            );
            assert_eq!(mounts_at(AT), 0);
        };
        run("mkfs.ext2", &["-q", node]);
        refused("ext2");
        assert!(device.has("ext2"));
        run("wipefs", &["-a", node]);
        run("mkswap", &[node]);
        refused("swap");
        run("wipefs", &["-a", node]);
        let mut disk = OpenOptions::new().write(true).open(node).unwrap();
        disk.write_all(&[b"LUKS\xba\xbe".as_slice(), &2u16.to_be_bytes(), &[0; 500]].concat()).unwrap();
        refused("crypto_LUKS");
        run("wipefs", &["-a", node]);
        disk.seek(SeekFrom::Start(510)).unwrap();
        disk.write_all(&[0x55, 0xaa]).unwrap();
        disk.seek(SeekFrom::Start(446)).unwrap();
        disk.write_all(&[0, 0, 2, 0, 0x83, 0, 9, 0, 1, 0, 0, 0, 100, 0, 0, 0]).unwrap();
        drop(disk);
        refused("a partition table");
    });
}

#[test]
fn data_without_a_signature_are_never_overwritten() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let node = device.node.to_str().unwrap();
        let write = |at: u64, bytes: &[u8]| {
            let mut disk = OpenOptions::new().write(true).open(node).unwrap();
            disk.seek(SeekFrom::Start(at)).unwrap();
            disk.write_all(bytes).unwrap();
        };
        let refused = |at: u64| {
            // At once: no pause.
            let patience = Script::uneventful();
            assert!(volumes.mount(&[volume("vol-0", 0)], &patience).is_err() && patience.pauses() == 0);
            for wanted in [volume("vol-0", 0), encrypted("vol-0")] {
                let (kind, text) = failure(&volumes, &[wanted]);
                assert_eq!(kind, FailureKind::Refused, "{text}");
                assert!(
                    text.contains(&format!("no signature, but data at byte {at}, so it is not empty")),
                    "{text}"
                );
            }
        };
        // As dm-crypt without a header, or a database, could begin and end.
        for at in [512, 64 * MIB - 1] {
            write(at, b"x");
            refused(at);
            assert!(device.has(""));
            write(at, &[0]);
        }
        // A file system whose superblock is gone still has its data.
        run("mkfs.ext4", &["-q", "-b", "1024", node]);
        write(0, &[0; 1 << 16]);
        assert!(device.has(""));
        let (kind, text) = failure(&volumes, &[volume("vol-0", 0)]);
        assert!(kind == FailureKind::Refused && text.contains("so it is not empty"), "{text}");
    });
}

#[test]
fn an_odd_disk_is_mounted_or_refused_with_its_reason() {
    const GPT: &str = "echo label: gpt | sfdisk -q NODE";
    const UNKNOWN: &str = "mkfs.ext4 -q NODE; debugfs -w -R 'ssv feature_incompat 0x80000242' NODE";
    const DIRTY: &str = "mkfs.ext4 -q NODE; debugfs -w -R 'feature needs_recovery' NODE";
    in_own_mounts(|| {
        for (bytes, script, is_read_only, expected) in [
            (MIB / 2, "true", false, ""),
            (20 * MIB + 3 * 512, "true", false, ""),
            (16 * MIB, GPT, false, "/vdb has a partition table"),
            // What is left of it at the end.
            (16 * MIB, &format!("{GPT}; dd if=/dev/zero of=NODE count=34"), false, "data at byte 16776704"),
            (16 * MIB, "mkfs.ext4 -q NODE; debugfs -w -R 'ssv state 2' NODE", false, ""),
            (16 * MIB, DIRTY, false, ""),
            (16 * MIB, UNKNOWN, false, ": its ext4 is damaged, or has a feature that this kernel lacks"),
            (16 * MIB, DIRTY, true, "it is read-only, and its file system was not unmounted"),
        ] {
            let (tree, device) = tree(bytes);
            let node = device.node.to_str().unwrap();
            run("sh", &["-ec", &script.replace("NODE", node)]);
            if is_read_only {
                tree.attribute("class/block/vdb/ro", "1\n");
                run("blockdev", &["--setro", node]);
            }
            let volumes = volumes_of(&tree, settings(), Fake::default());
            let mounted = volumes.mount(&[volume("vol-0", 0)], &Script::uneventful());
            run("blockdev", &["--setrw", node]);
            let text = mounted.map_or_else(|error| error.to_failure().message, |_| String::new());
            assert!(text.contains(expected) && text.is_empty() == expected.is_empty(), "{script}: {text}");
            volumes.unmount_all().unwrap();
        }
    });
}

#[test]
fn a_mount_point_that_is_a_link_is_refused() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        run("mkfs.ext4", &["-q", device.node.to_str().unwrap()]);
        fs::create_dir_all("/run/elsewhere/empty").unwrap();
        let volumes = volumes_of(&tree, settings(), Fake::default());
        fs::create_dir("/run/cloud-volumes").unwrap();
        for link in [AT, "/run/cloud-volumes"] {
            std::os::unix::fs::symlink("/run/elsewhere", link).unwrap();
            let (_, text) = failure(&volumes, &[volume("vol-0", 0)]);
            assert!(text.ends_with(&format!("{link} is a link, not a directory")), "{text}");
            assert_eq!(mounts_at("/run/elsewhere") + mounts_at("/run/elsewhere/vol-0"), 0);
            // Nothing is made or removed where it leads.
            volumes.unmount_all().unwrap();
            let there = fs::read_dir("/run/elsewhere").unwrap().map(|entry| entry.unwrap().file_name());
            assert_eq!(there.collect::<Vec<_>>(), ["empty"]);
            fs::remove_file(link).unwrap();
            if link == AT {
                fs::remove_dir("/run/cloud-volumes").unwrap();
            }
        }
        fs::create_dir("/run/cloud-volumes").unwrap();
        fs::write(AT, "").unwrap();
        let (_, text) = failure(&volumes, &[volume("vol-0", 0)]);
        assert!(text.ends_with("vol-0 is a file, not a directory"), "{text}");
    });
}

#[test]
fn a_disk_with_two_signatures_is_looked_at_three_times() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let node = device.node.to_str().unwrap();
        run("mkfs.ext4", &["-q", node]);
        let mut disk = OpenOptions::new().write(true).open(node).unwrap();
        disk.write_all(b"hsqs").unwrap();
        disk.seek(SeekFrom::Start(28)).unwrap();
        disk.write_all(&[4, 0]).unwrap();
        drop(disk);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::uneventful();
        let failure = volumes.mount(&[volume("vol-0", 0)], &patience).unwrap_err().to_failure();
        assert_eq!((failure.kind, patience.pauses()), (FailureKind::Refused, 2), "{}", failure.message);
        assert!(failure.message.contains("not sure what is on"), "{}", failure.message);
        assert_eq!(mounts_at(AT), 0);
    });
}

#[test]
fn ext3_is_made_and_may_have_become_ext4() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let mut wanted = volume("vol-0", 0);
        wanted.fs_type = "ext3".into();
        volumes.mount(&[wanted], &Script::uneventful()).unwrap();
        assert!(device.has("ext3"));
        volumes.unmount_all().unwrap();
        volumes.mount(&[volume("vol-0", 0)], &Script::uneventful()).unwrap();
    });
}

#[test]
fn without_mkfs_an_empty_disk_is_refused_at_once() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        fs::copy("/usr/sbin/blkid", "/run/blkid").unwrap();
        mount(Some("tmpfs"), "/usr/sbin", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::copy("/run/blkid", "/usr/sbin/blkid").unwrap();
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let mut wanted = volume("vol-0", 0);
        wanted.fs_type = "xfs".into();
        let (kind, text) = failure(&volumes, &[wanted]);
        assert_eq!(kind, FailureKind::Refused);
        assert!(text.ends_with("/usr/sbin/mkfs.xfs is not in this image"), "{text}");
        umount2("/usr/sbin", MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_group_owns_its_volume() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let mut wanted = volume("vol-0", 0);
        wanted.fs_group = "1234".into();
        volumes.mount(&[wanted], &Script::uneventful()).unwrap();
        let root = fs::metadata(AT).unwrap();
        assert_eq!((root.gid(), root.uid(), root.permissions().mode() & 0o7777), (1234, 0, 0o2775));
        // Nothing but root looks into the directory of all volumes.
        assert_eq!(fs::metadata("/run/cloud-volumes").unwrap().permissions().mode() & 0o7777, 0o700);
    });
}

#[test]
fn a_read_only_disk_is_mounted_read_only_or_refused() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let node = device.node.to_str().unwrap().to_owned();
        tree.attribute("class/block/vdb/ro", "1\n");
        run("blockdev", &["--setro", &node]);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let (kind, text) = failure(&volumes, &[volume("vol-0", 0)]);
        assert_eq!(kind, FailureKind::Refused);
        assert!(text.ends_with("is empty and read-only"), "{text}");
        run("blockdev", &["--setrw", &node]);
        run("mkfs.ext4", &["-q", &node]);
        run("blockdev", &["--setro", &node]);
        let mut wanted = volume("vol-0", 0);
        wanted.fs_group = "1234".into();
        volumes.mount(&[wanted], &Script::uneventful()).unwrap();
        assert!(statvfs(AT).unwrap().flags().contains(FsFlags::ST_RDONLY));
        volumes.unmount_all().unwrap();
        run("blockdev", &["--setrw", &node]);
    });
}

#[test]
fn a_disk_serves_one_volume() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let twice = [volume("vol-0", 0), volume("vol-1", 0)];
        let (kind, text) = failure(&volumes, &twice);
        assert!(kind == FailureKind::Invalid && text.contains("the same lun"), "{text}");
        assert_eq!(mounts_at(AT), 0);

        volumes.mount(&twice[..1], &Script::uneventful()).unwrap();
        let (kind, text) = failure(&volumes, &twice[1..]);
        assert_eq!(kind, FailureKind::NoDisk);
        assert!(text.starts_with("volume vol-1: no disk with LUN 0 within 28 s ("), "{text}");
        assert!(
            text.contains(&format!("is in use: it, or a partition of it, is mounted at {AT})")),
            "{text}"
        );
        // What was mounted before the fault stays.
        assert_eq!(mounts_at(AT), 1);
    });
}

#[test]
fn a_disk_in_use_elsewhere_is_refused() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        run("mkfs.ext4", &["-q", device.node.to_str().unwrap()]);
        // In a mount namespace that the service does not see.
        let mounted = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                mount(Some(&device.node), "/mnt", Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
                mounted.wait();
                mounted.wait();
            });
            mounted.wait();
            let volumes = volumes_of(&tree, settings(), Fake::default());
            let result = volumes.mount(&[volume("vol-0", 0)], &Script::uneventful());
            // Before anything can fail here, as the other thread waits for it.
            mounted.wait();
            let failure = result.unwrap_err().to_failure();
            let (kind, text) = (failure.kind, failure.message);
            assert_eq!(kind, FailureKind::Refused);
            assert!(text.contains("opening") && text.contains("busy"), "{text}");
        });
    });
}

#[test]
fn another_disk_in_a_volumes_place_is_refused_at_once() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        fs::create_dir_all(AT).unwrap();
        mount(Some("tmpfs"), AT, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let patience = Script::uneventful();
        let mut wanted = volume("vol-0", 1);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let failure = volumes.mount(&[wanted.clone()], &patience).unwrap_err().to_failure();
        assert_eq!((failure.kind, patience.pauses()), (FailureKind::Refused, 0));
        assert_eq!(failure.message, format!("volume vol-0: another disk is mounted at {AT}"));
        // Its own disk, unused, is no reason to mount over it.
        wanted.lun = "0".into();
        let failure = volumes.mount(&[wanted], &patience).unwrap_err().to_failure();
        assert_eq!(failure.kind, FailureKind::Refused, "{}", failure.message);
        assert_eq!(mounts_at(AT), 1);
    });
}

#[test]
fn all_volumes_are_checked_before_the_first_is_mounted() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let (kind, _) = failure(&volumes, &[volume("vol-0", 0), volume("../vol-1", 1)]);
        assert_eq!(kind, FailureKind::Invalid);
        let strict = volumes_of(&tree, Settings { require_encryption: true, ..settings() }, Fake::default());
        let (kind, text) = failure(&strict, &[encrypted("vol-1"), volume("vol-0", 1)]);
        assert_eq!(kind, FailureKind::Refused);
        assert!(
            text.starts_with("volume vol-0: it is not encrypted, and this image refuses such volumes"),
            "{text}"
        );
        assert!(!Path::new("/run/cloud-volumes").exists() && device.has(""));
    });
}

#[test]
fn volumes_are_unmounted_in_reverse_also_below_each_other() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        let other = Loop::new(64 * MIB);
        tree.loop_disk("vdc", &other);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        volumes.mount(&[volume("vol-0", 0), volume("vol-1", 1)], &Script::uneventful()).unwrap();
        // Only the reverse order closes this one.
        fs::create_dir(format!("{AT}/below")).unwrap();
        let below = format!("{AT}/below");
        mount(Some("/run/cloud-volumes/vol-1"), &*below, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .unwrap();
        volumes.unmount_all().unwrap();
        for path in [AT, "/run/cloud-volumes/vol-1", &below] {
            assert_eq!(mounts_at(path), 0, "{path}");
        }
        assert_eq!(fs::read_dir("/run/cloud-volumes").unwrap().count(), 0);
        volumes.unmount_all().unwrap();
    });
}

#[test]
fn a_volume_in_use_is_detached_as_the_last_resort() {
    in_own_mounts(|| {
        let (tree, device) = tree(16 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        volumes.mount(&[volume("vol-0", 0)], &Script::uneventful()).unwrap();
        let mut user = File::create(format!("{AT}/in-use")).unwrap();
        user.write_all(b"written before the end").unwrap();
        assert!(
            !device.holds(b"written before the end"),
            "nothing is shown if it is on the disk in any case"
        );
        volumes.unmount_all().unwrap();
        assert_eq!(mounts_at(AT), 0);
        assert!(device.holds(b"written before the end"), "the VM may be deleted now");
        user.write_all(b"still there").unwrap();
    });
}

fn encrypted(name: &str) -> secure_comms_protocol::volumes::Volume {
    let (encrypt_type, key_id) = ("luks".into(), "default/key/1".into());
    secure_comms_protocol::volumes::Volume { encrypt_type, key_id, ..volume(name, 0) }
}

/// A confidential data hub for one call.
fn data_hub(answer: impl FnOnce(&SecureMount) -> Response + Send + 'static) -> JoinHandle<SecureMount> {
    let listener = UnixListener::bind(DATA_HUB).unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut header = [0; 10];
        client.read_exact(&mut header).unwrap();
        assert_eq!(header[4..], [0, 0, 0, 1, 1, 0]);
        let mut request = vec![0; u32::from_be_bytes(*header.first_chunk().unwrap()) as usize];
        client.read_exact(&mut request).unwrap();
        let request = Request::decode(&*request).unwrap();
        assert_eq!((&*request.service, &*request.method), ("api.SecureMountService", "SecureMount"));
        assert!(request.timeout_nano > 0);
        let mount = SecureMount::decode(&*request.payload).unwrap();
        client.write_all(&frame(2, &answer(&mount).encode_to_vec())).unwrap();
        fs::remove_file(DATA_HUB).unwrap();
        mount
    })
}

/// What a data hub makes of `vdb`: a mapping, which another loop device stands for, with this table.
fn mapped(tree: &Tree, mappings: &Fake, opened: &Loop, table: &str) {
    tree.mapping("dm-1", opened.number.major, opened.number.minor, "caa-vol-0", &["vdb"]);
    mappings.tables.lock().unwrap().insert("caa-vol-0".into(), table.into());
}

fn mount_ext4(opened: &Path) {
    run("mkfs.ext4", &["-q", opened.to_str().unwrap()]);
    mount(Some(opened), AT, Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
}

#[test]
fn an_encrypted_volume_is_mounted_by_the_data_hub() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let opened = Loop::new(32 * MIB);
        let mappings = Fake::default();
        let volumes =
            volumes_of(&tree, Settings { require_encryption: true, ..settings() }, mappings.clone());
        mappings.tables.lock().unwrap().insert("caa-vol-0".into(), AES.into());
        let node = opened.node.clone();
        let hub = data_hub(move |_| {
            mount_ext4(&node);
            Response::default()
        });
        // The mapping comes with the call; a tree can't follow that, and its disk would be in use before.
        let mut wanted = encrypted("vol-0");
        wanted.fs_group = "77".into();
        let first = volumes.mount(&[wanted.clone()], &Script::uneventful()).unwrap_err().to_failure();
        assert_eq!(first.kind, FailureKind::Refused);
        assert!(
            first.message.contains("the confidential data hub says that it is mounted, but"),
            "{}",
            first.message
        );
        let request = hub.join().unwrap();
        let options: Vec<_> = request.options.iter().map(|(name, value)| (&**name, &**value)).collect();
        let disk = tree.roots.dev.join("vdb");
        assert_eq!(
            options,
            [
                ("devicePath", disk.to_str().unwrap()),
                ("encryptionType", "luks2"),
                ("filesystemType", "ext4"),
                ("key", "kbs:///default/key/1"),
                ("mapperName", "caa-vol-0"),
                ("sourceType", "empty"),
                ("targetType", "fileSystem"),
            ]
        );
        assert_eq!(
            (&*request.volume_type, &*request.mount_point, request.flags.len()),
            ("block-device", AT, 0)
        );
        assert!(device.has(""), "formatted here");

        mapped(&tree, &mappings, &opened, AES);
        assert_eq!(volumes.mount(&[wanted], &Script::uneventful()).unwrap(), [AT]);
        assert!(statvfs(AT).unwrap().flags().contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV));
        assert_eq!(fs::metadata(AT).unwrap().gid(), 77);
        *mappings.busy.lock().unwrap() = 2;
        volumes.unmount_all().unwrap();
        assert_eq!((mounts_at(AT), &**mappings.asked.lock().unwrap()), (0, &["caa-vol-0".to_owned()][..]));
    });
}

#[test]
fn a_mapping_in_use_is_closed_later() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        let (opened, mappings) = (Loop::new(32 * MIB), Fake::default());
        mapped(&tree, &mappings, &opened, AES);
        *mappings.busy.lock().unwrap() = 100;
        volumes_of(&tree, settings(), mappings.clone()).unmount_all().unwrap();
        assert_eq!(**mappings.asked.lock().unwrap(), ["caa-vol-0, deferred".to_owned()]);
    });
}

#[test]
fn a_mapping_that_encrypts_nothing_is_closed() {
    in_own_mounts(|| {
        let (tree, _device) = tree(64 * MIB);
        let (opened, mappings) = (Loop::new(32 * MIB), Fake::default());
        mapped(&tree, &mappings, &opened, "cipher_null-ecb - 0 7:0 0");
        fs::create_dir_all(AT).unwrap();
        mount_ext4(&opened.node);
        let volumes = volumes_of(&tree, settings(), mappings.clone());
        let (kind, text) = failure(&volumes, &[encrypted("vol-0")]);
        assert_eq!(kind, FailureKind::Refused);
        assert!(
            text.ends_with("the mapping caa-vol-0 is crypt cipher_null-ecb, which protects nothing"),
            "{text}"
        );
        assert_eq!((mounts_at(AT), mappings.asked.lock().unwrap().len()), (0, 1));
    });
}

#[test]
fn without_a_data_hub_an_encrypted_volume_is_refused_at_once() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let volumes = volumes_of(&tree, settings(), Fake::default());
        let patience = Script::uneventful();
        let failure = volumes.mount(&[encrypted("vol-0")], &patience).unwrap_err().to_failure();
        assert_eq!((failure.kind, patience.pauses()), (FailureKind::Refused, 0));
        let text = failure.message;
        assert!(text.starts_with("volume vol-0: no confidential data hub at /run/cdh.sock"), "{text}");
        assert!(device.has(""));
    });
}

#[test]
fn the_data_hubs_refusal_is_passed_on_and_its_mapping_closed() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        let mappings = Fake::default();
        mappings.tables.lock().unwrap().insert("caa-vol-0".into(), AES.into());
        let mut disk = OpenOptions::new().write(true).open(&device.node).unwrap();
        disk.write_all(&[b"LUKS\xba\xbe".as_slice(), &2u16.to_be_bytes(), &[0; 500]].concat()).unwrap();
        drop(disk);
        let hub = data_hub(|_| {
            let status = Status { code: 13, message: "no key\nat the KBS".into() };
            Response { status: Some(status), payload: Vec::new() }
        });
        let (kind, text) = failure(&volumes_of(&tree, settings(), mappings.clone()), &[encrypted("vol-0")]);
        assert_eq!(kind, FailureKind::Internal);
        assert_eq!(text, "volume vol-0: the confidential data hub failed (code 13): no key at the KBS");
        assert_eq!(hub.join().unwrap().options["sourceType"], "encrypted");
        assert_eq!(**mappings.asked.lock().unwrap(), ["caa-vol-0, deferred".to_owned()]);
    });
}

#[test]
fn a_file_system_is_never_handed_to_the_data_hub_as_empty() {
    in_own_mounts(|| {
        let (tree, device) = tree(64 * MIB);
        run("mkfs.ext4", &["-q", device.node.to_str().unwrap()]);
        let (kind, text) = failure(&volumes_of(&tree, settings(), Fake::default()), &[encrypted("vol-0")]);
        assert_eq!(kind, FailureKind::Refused);
        assert!(text.contains("has ext4, not LUKS"), "{text}");
    });
}
