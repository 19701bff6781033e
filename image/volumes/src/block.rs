//! Block devices as sysfs shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::mountinfo::{DeviceNumber, Mount};
use crate::roots::Roots;

/// How deep devices may lie on each other: a mount's device, dm-crypt, dm-integrity, a partition, and some to spare.
const DEPTH: u32 = 8;

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name in the kernel, such as `vdb`.
    pub name: String,
    /// Its number.
    pub number: DeviceNumber,
    /// Its node, no link.
    pub node: PathBuf,
}

impl Device {
    /// The block device that a path below /dev leads to, over any links.
    ///
    /// # Errors
    /// There is none (NotFound), or what is there is no block device of /dev that the kernel knows (InvalidInput).
    pub fn at(roots: &Roots, path: &Path) -> io::Result<Self> {
        let bad = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let node = path.canonicalize()?;
        if !node.starts_with(roots.dev.canonicalize()?) {
            return Err(bad("a link that leads out of /dev"));
        }
        // Nothing can become a link after canonicalize() but by root's hand; what is no block device ends here.
        let metadata = fs::symlink_metadata(&node)?;
        if !metadata.file_type().is_block_device() {
            return Err(bad("not a block device"));
        }
        let number = DeviceNumber { major: major(metadata.rdev()), minor: minor(metadata.rdev()) };
        let name = name_of(roots, number).ok_or_else(|| bad("not known to the kernel"))?;
        Ok(Self { name, number, node })
    }

    /// The block device of this name.
    ///
    /// # Errors
    /// As of [`Self::at`].
    pub fn named(roots: &Roots, name: &str) -> io::Result<Self> {
        // In sysfs, '!' stands for '/'.
        Self::at(roots, &roots.dev.join(name.replace('!', "/")))
    }

    /// Its directory in sysfs.
    fn sysfs(&self, roots: &Roots) -> PathBuf {
        class(roots).join(&self.name)
    }

    /// Whether it is a part of a disk.
    #[must_use]
    pub fn is_partition(&self, roots: &Roots) -> bool {
        self.sysfs(roots).join("partition").exists()
    }

    /// Its partitions.
    ///
    /// # Errors
    /// sysfs can't be read.
    pub fn partitions(&self, roots: &Roots) -> io::Result<Vec<String>> {
        let directory = self.sysfs(roots);
        let mut names = list(&directory)?;
        names.retain(|name| directory.join(name).join("partition").exists());
        Ok(names)
    }

    /// Which devices lie on it: dm-crypt, dm-verity, RAID.
    ///
    /// # Errors
    /// sysfs can't be read.
    pub fn holders(&self, roots: &Roots) -> io::Result<Vec<String>> {
        list(&self.sysfs(roots).join("holders"))
    }

    /// Whether the kernel lets nothing be written to it.
    #[must_use]
    pub fn is_read_only(&self, roots: &Roots) -> bool {
        attribute(&self.sysfs(roots).join("ro")).as_deref() == Some("1")
    }

    /// Its size, in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self, roots: &Roots) -> Option<u64> {
        attribute(&self.sysfs(roots).join("size"))?.parse().ok()
    }

    /// Size of its logical blocks, the unit of its partition table, in bytes.
    #[must_use]
    pub fn block_size(&self, roots: &Roots) -> Option<usize> {
        attribute(&self.sysfs(roots).join("queue/logical_block_size"))?.parse().ok()
    }

    /// The serial number that the host has given it (virtio, NVMe).
    #[must_use]
    pub fn serial(&self, roots: &Roots) -> Option<String> {
        let directory = self.sysfs(roots);
        attribute(&directory.join("serial")).or_else(|| attribute(&directory.join("device/serial")))
    }

    /// Label of the partition in the GPT, as the kernel read it.
    #[must_use]
    pub fn partition_label(&self, roots: &Roots) -> Option<String> {
        let uevent = attribute(&self.sysfs(roots).join("uevent"))?;
        uevent.lines().find_map(|line| line.strip_prefix("PARTNAME=")).map(str::to_owned)
    }

    /// Its namespace number and the model of its controller, if it is an NVMe disk.
    #[must_use]
    pub fn nvme(&self, roots: &Roots) -> Option<(u32, String)> {
        let directory = self.sysfs(roots);
        let namespace = attribute(&directory.join("nsid"))?.parse().ok()?;
        Some((namespace, attribute(&directory.join("device/model"))?))
    }

    /// First sector of a partition, of 512 bytes each.
    #[must_use]
    pub fn first_sector(&self, roots: &Roots) -> Option<u64> {
        attribute(&self.sysfs(roots).join("start"))?.parse().ok()
    }

    /// Number of a partition in its table.
    #[must_use]
    pub fn partition_number(&self, roots: &Roots) -> Option<i32> {
        attribute(&self.sysfs(roots).join("partition"))?.parse().ok()
    }

    /// Its SCSI address: host, channel, target and LUN.
    #[must_use]
    pub fn scsi_address(&self, roots: &Roots) -> Option<[u32; 4]> {
        let link = fs::read_link(self.sysfs(roots).join("device")).ok()?;
        let parts: Option<Vec<u32>> =
            link.file_name()?.to_str()?.split(':').map(|part| part.parse().ok()).collect();
        parts?.try_into().ok()
    }
}

/// Names of all block devices, partitions included, sorted.
///
/// # Errors
/// sysfs can't be read.
pub fn names(roots: &Roots) -> io::Result<Vec<String>> {
    list(&class(roots))
}

/// Name that the device mapper has for the device; none if it is none of the device mapper.
#[must_use]
pub fn mapping_of(roots: &Roots, number: DeviceNumber) -> Option<String> {
    mapping_named(roots, &name_of(roots, number)?)
}

/// Name that the device mapper has for the device of this name in the kernel.
#[must_use]
pub fn mapping_named(roots: &Roots, name: &str) -> Option<String> {
    attribute(&class(roots).join(name).join("dm/name"))
}

/// The whole disks on which a device lies, itself if it is one.
#[must_use]
pub fn disks_under(roots: &Roots, number: DeviceNumber) -> BTreeSet<String> {
    let mut disks = BTreeSet::new();
    if let Some(name) = name_of(roots, number) {
        collect_disks(roots, &name, DEPTH, &mut disks);
    }
    disks
}

/// The whole disks of all mounts, and where each is mounted first.
#[must_use]
pub fn disks_of_mounts<'a>(roots: &Roots, mounts: &'a [Mount]) -> BTreeMap<String, &'a Path> {
    let (mut numbers, mut disks) = (BTreeSet::new(), BTreeMap::new());
    for mount in mounts.iter().filter(|mount| numbers.insert(mount.device)) {
        for disk in disks_under(roots, mount.device) {
            disks.entry(disk).or_insert(mount.at.as_path());
        }
    }
    disks
}

fn collect_disks(roots: &Roots, name: &str, depth: u32, disks: &mut BTreeSet<String>) {
    let directory = class(roots).join(name);
    let below = list(&directory.join("slaves")).unwrap_or_default();
    if let Some(deeper) = depth.checked_sub(1).filter(|_| !below.is_empty()) {
        below.iter().for_each(|name| collect_disks(roots, name, deeper, disks));
    } else if directory.join("partition").exists() {
        // A partition's directory is in that of its disk.
        let disk = directory.canonicalize().ok().and_then(|path| last(path.parent()?));
        disks.extend(disk);
    } else {
        disks.insert(name.to_owned());
    }
}

/// The directory with a link for each block device.
fn class(roots: &Roots) -> PathBuf {
    roots.sys.join("class/block")
}

fn name_of(roots: &Roots, number: DeviceNumber) -> Option<String> {
    last(&fs::read_link(roots.sys.join(format!("dev/block/{number}"))).ok()?)
}

fn last(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

/// Content of a sysfs file without the newline; none if there is none.
fn attribute(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Names in a directory, sorted; none if it is not there.
pub(crate) fn list(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}
