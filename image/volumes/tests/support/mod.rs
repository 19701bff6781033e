//! A fake /dev and /sys, mount namespaces and loop devices.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "each test program uses a part; clippy does not take the helpers of an integration test for tests"
)]

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use secure_comms_protocol::volumes as request;
use tempfile::TempDir;
use volumes::mountinfo::DeviceNumber;
use volumes::mounting::{Patience, Woken};
use volumes::roots::Roots;

/// A folder with a /dev and a /sys.
pub(crate) struct Tree {
    folder: TempDir,
    pub(crate) roots: Roots,
}

impl Tree {
    /// An empty tree, with the mounts of a VM whose root is on `vda`, which the tree has.
    pub(crate) fn new() -> Self {
        let tree = Self::bare();
        tree.disk("vda", 254, 0).partition("vda", "vda1", 254, 1).mapping("dm-0", 253, 0, "root", &["vda1"]);
        tree.mounts("36 1 253:0 / / ro - erofs /dev/dm-0 ro\n");
        tree
    }

    /// An empty tree without mounts.
    pub(crate) fn bare() -> Self {
        let folder = tempfile::tempdir_in(FOLDER.with_borrow(Clone::clone)).unwrap();
        let roots = Roots::below(folder.path());
        fs::create_dir_all(roots.sys.join("dev/block")).unwrap();
        fs::create_dir_all(&roots.dev).unwrap();
        fs::create_dir_all(roots.mountinfo.parent().unwrap()).unwrap();
        let tree = Self { folder, roots };
        tree.mounts("");
        tree
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn mounts(&self, text: &str) -> &Self {
        fs::write(&self.roots.mountinfo, text).unwrap();
        self
    }

    /// A disk.
    pub(crate) fn disk(&self, name: &str, major: u64, minor: u64) -> &Self {
        self.device(name, major, minor, &self.class().join(name))
    }

    /// A partition of a disk.
    pub(crate) fn partition(&self, disk: &str, name: &str, major: u64, minor: u64) -> &Self {
        let directory = self.class().join(disk).join(name);
        self.device(name, major, minor, &directory);
        fs::write(directory.join("partition"), "1\n").unwrap();
        symlink(&directory, self.class().join(name)).unwrap();
        self
    }

    /// A device of the device mapper over others.
    pub(crate) fn mapping(
        &self,
        name: &str,
        major: u64,
        minor: u64,
        mapping: &str,
        slaves: &[&str],
    ) -> &Self {
        let directory = self.class().join(name);
        self.device(name, major, minor, &directory);
        fs::create_dir_all(directory.join("dm")).unwrap();
        fs::write(directory.join("dm/name"), format!("{mapping}\n")).unwrap();
        for slave in slaves {
            fs::create_dir_all(directory.join("slaves").join(slave)).unwrap();
            fs::create_dir_all(self.class().join(slave).join("holders").join(name)).unwrap();
        }
        self
    }

    /// An NVMe disk: its controller's model as sysfs pads it, and its namespace number.
    pub(crate) fn nvme(&self, name: &str, minor: u64, model: &str, namespace: u32) -> &Self {
        self.disk(name, 259, minor).attribute(&format!("class/block/{name}/nsid"), &format!("{namespace}\n"));
        self.attribute(&format!("class/block/{name}/device/model"), &format!("{model:<40}\n"))
    }

    /// A SCSI disk with this address.
    pub(crate) fn scsi(&self, name: &str, minor: u64, address: &str) -> &Self {
        self.disk(name, 8, minor);
        let device = self.roots.sys.join("devices").join(address);
        fs::create_dir_all(&device).unwrap();
        symlink(device, self.class().join(name).join("device")).unwrap();
        self
    }

    /// A link of udev's below /dev to a device.
    pub(crate) fn link(&self, link: &str, name: &str) -> &Self {
        let link = self.roots.dev.join(link);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(self.roots.dev.join(name), link).unwrap();
        self
    }

    /// A file of sysfs.
    pub(crate) fn attribute(&self, path: &str, content: &str) -> &Self {
        let path = self.roots.sys.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    /// A disk that stands for this loop device.
    pub(crate) fn loop_disk(&self, name: &str, device: &Loop) -> &Self {
        self.disk(name, device.number.major, device.number.minor);
        self.attribute(&format!("class/block/{name}/queue/logical_block_size"), "512\n");
        self.attribute(&format!("class/block/{name}/size"), &format!("{}\n", device.bytes / 512))
    }

    fn class(&self) -> PathBuf {
        self.roots.sys.join("class/block")
    }

    fn device(&self, name: &str, major: u64, minor: u64, directory: &Path) -> &Self {
        fs::create_dir_all(directory).unwrap();
        symlink(directory, self.roots.sys.join(format!("dev/block/{major}:{minor}"))).unwrap();
        let node = self.roots.dev.join(name);
        mknod(&node, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(major, minor))
            .expect("needs root");
        self
    }
}

/// A loop device over an empty file; it may have partitions.
pub(crate) struct Loop {
    pub(crate) node: PathBuf,
    pub(crate) number: DeviceNumber,
    pub(crate) bytes: u64,
    file: tempfile::NamedTempFile,
}

impl Loop {
    pub(crate) fn new(bytes: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let output = run("losetup", &["--partscan", "-f", "--show", file.path().to_str().unwrap()]);
        let node = PathBuf::from(output.trim());
        // A test that failed may have left the device so.
        run("blockdev", &["--setrw", output.trim()]);
        let device = fs::metadata(&node).unwrap().rdev();
        let number = DeviceNumber { major: major(device), minor: minor(device) };
        Self { node, number, bytes, file }
    }

    /// Makes it larger.
    pub(crate) fn grow(&mut self, bytes: u64) {
        self.file.as_file().set_len(bytes).unwrap();
        run("losetup", &["--set-capacity", self.node.to_str().unwrap()]);
        self.bytes = bytes;
    }

    /// Whether this text is on the disk.
    pub(crate) fn holds(&self, text: &[u8]) -> bool {
        let content = fs::read(self.file.path()).unwrap();
        content.windows(text.len()).any(|window| window == text)
    }

    /// Whether the device has a signature of this type; empty stands for none.
    pub(crate) fn has(&self, kind: &str) -> bool {
        let output =
            Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE"]).arg(&self.node).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim() == kind
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A device in use is released once its mounts are gone, with the namespace of the test.
        run("losetup", &["-d", self.node.to_str().unwrap()]);
    }
}

/// Runs a program that must succeed; returns its output.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output =
        Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

thread_local! {
    /// Where trees are.
    static FOLDER: RefCell<PathBuf> = RefCell::new(std::env::temp_dir());
}

/// Runs the test in a thread with mounts of its own: nothing that it mounts is seen elsewhere, and all goes with it.
pub(crate) fn in_own_mounts(test: impl FnOnce() + Send) {
    let own_mounts = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("needs root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        // The nodes of a fake /dev can be opened there, whatever the flags of /tmp are.
        FOLDER.set("/run".into());
        test();
    };
    let result = std::thread::scope(|scope| scope.spawn(own_mounts).join());
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Where the mounts of the calling thread are listed: the test's process has others.
pub(crate) fn own_mounts(roots: &Roots) -> Roots {
    Roots { mountinfo: "/proc/thread-self/mountinfo".into(), ..roots.clone() }
}

/// Pauses that take no time, with something that happens in each.
pub(crate) struct Script<'a> {
    woken: RefCell<Box<dyn FnMut(u32) -> Woken + 'a>>,
    pauses: RefCell<u32>,
}

impl<'a> Script<'a> {
    /// `happens` gets the number of the pause, from 1, and says how it ends.
    pub(crate) fn new(happens: impl FnMut(u32) -> Woken + 'a) -> Self {
        Self { woken: RefCell::new(Box::new(happens)), pauses: RefCell::new(0) }
    }

    /// Pauses that nothing ends before their time.
    pub(crate) fn uneventful() -> Self {
        Self::new(|_| Woken::Time)
    }

    pub(crate) fn pauses(&self) -> u32 {
        *self.pauses.borrow()
    }
}

impl Patience for Script<'_> {
    fn pause(&self, _: Duration) -> Woken {
        *self.pauses.borrow_mut() += 1;
        (self.woken.borrow_mut())(self.pauses())
    }
}

/// A volume of a request: ext4 with this LUN.
pub(crate) fn volume(name: &str, lun: u32) -> request::Volume {
    request::Volume { name: name.into(), fs_type: "ext4".into(), lun: lun.to_string(), ..Default::default() }
}
