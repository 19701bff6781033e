//! Which disk is a volume's: by the names that each cloud's disks have, then by the SCSI address.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::block::{self, Device};
use crate::mountinfo::{self, Mount};
use crate::roots::Roots;
use crate::text::one_line;
use crate::volume::Volume;

/// Chassis asset tag of a VM in Azure.
const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77";
/// Model of Azure's NVMe controller for remote disks (azure-vm-utils' 80-azure-disk.rules): the OS disk is namespace 1.
/// The VM's own disks, which it also may have, are on controllers of other models.
const AZURE_NVME: &str = "MSFT NVMe Accelerator v1.0";
/// Namespace of LUN 0 on that controller.
const AZURE_NVME_LUN_0: u32 = 2;
/// What udev's names of EBS volumes begin with.
const EBS: &str = "nvme-Amazon_Elastic_Block_Store_";
/// Label of the disk with the user data (NoCloud), in both spellings that cloud-init reads.
const USER_DATA_LABELS: [&str; 2] = ["cidata", "CIDATA"];

/// What a search found.
#[derive(Debug, Default)]
pub struct Search {
    /// The volume's disk.
    pub found: Option<Found>,
    /// Disks that have the volume's name or number but can't be it, and why.
    pub refused: Vec<String>,
}

/// A volume's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is unused.
    Unused(Device),
    /// It is mounted at the volume's mount point.
    Mounted(Device),
}

/// What may be the disk.
struct Candidate {
    path: PathBuf,
    rule: Rule,
}

/// What holds for a candidate besides what holds for all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    None,
    /// Not on SCSI host 0, where Azure has its own disks.
    NotHost0,
    /// No partitions: on host 0, the disk may be the cloud's.
    NoPartitions,
}

/// Looks for the volume's disk once.
///
/// # Errors
/// sysfs or the mounts can't be read.
pub fn find(roots: &Roots, volume: &Volume) -> io::Result<Search> {
    let mounts = mountinfo::read(roots)?;
    let used = block::disks_of_mounts(roots, &mounts);
    let mut search = Search::default();
    let mut seen = BTreeSet::new();
    for Candidate { path, rule } in candidates(roots, volume)? {
        let device = match Device::at(roots, &path) {
            Ok(device) if seen.insert(device.number) => device,
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                search.refused.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        if is_mounted(roots, volume, &mounts, &device) {
            search.found = Some(Found::Mounted(device));
            break;
        }
        match why_not(roots, &device, rule, &used)? {
            Some(why) => search.refused.push(format!("{} {why}", device.node.display())),
            None => {
                search.found = Some(Found::Unused(device));
                break;
            }
        }
    }
    Ok(search)
}

/// Whether the volume's mount point has this disk: itself, or for an encrypted one the volume's mapping over it.
#[must_use]
pub fn is_mounted(roots: &Roots, volume: &Volume, mounts: &[Mount], device: &Device) -> bool {
    let Some(mount) = mountinfo::at(mounts, &volume.name.mount_point()) else { return false };
    if volume.key.is_none() {
        return mount.device == device.number;
    }
    block::mapping_of(roots, mount.device) == Some(volume.name.mapping())
        && block::disks_under(roots, mount.device).contains(&device.name)
}

/// Why the disk can't be a volume's; none if it can.
fn why_not(
    roots: &Roots,
    disk: &Device,
    rule: Rule,
    used: &BTreeMap<String, &Path>,
) -> io::Result<Option<String>> {
    let partitions = disk.partitions(roots)?;
    let mut holders = disk.holders(roots)?;
    for partition in &partitions {
        holders.extend(Device::named(roots, partition)?.holders(roots)?);
    }
    let host0 = disk.scsi_address(roots).is_some_and(|[host, ..]| host == 0);
    Ok(if disk.is_partition(roots) {
        Some("is a partition".to_owned())
    } else if let Some(at) = used.get(&disk.name) {
        let at = one_line(&at.to_string_lossy());
        Some(format!("is in use: it, or a partition of it, is mounted at {at}"))
    } else if let Some(holder) = holders.first() {
        Some(format!("is in use by {holder}"))
    } else if is_user_data(roots, disk, &partitions) {
        Some("has the user data (its label is cidata)".to_owned())
    } else if rule == Rule::NotHost0 && host0 {
        Some("is on SCSI host 0".to_owned())
    } else if rule == Rule::NoPartitions && !partitions.is_empty() {
        Some("is on SCSI host 0 and has partitions".to_owned())
    } else {
        None
    })
}

fn is_user_data(roots: &Roots, disk: &Device, partitions: &[String]) -> bool {
    USER_DATA_LABELS.iter().any(|label| {
        let labelled = Device::at(roots, &roots.dev.join("disk/by-label").join(label));
        labelled.is_ok_and(|labelled| labelled.name == disk.name || partitions.contains(&labelled.name))
    })
}

fn candidates(roots: &Roots, volume: &Volume) -> io::Result<Vec<Candidate>> {
    let mut all = azure(roots, volume)?;
    all.extend(aws(roots, volume)?);
    all.extend(libvirt(roots, volume)?);
    all.extend(scsi(roots, volume)?);
    Ok(all)
}

fn azure(roots: &Roots, volume: &Volume) -> io::Result<Vec<Candidate>> {
    let links = roots.dev.join("disk/azure");
    let tag = fs::read_to_string(roots.sys.join("class/dmi/id/chassis_asset_tag")).unwrap_or_default();
    if tag.trim() != AZURE_TAG && !links.exists() {
        return Ok(Vec::new());
    }
    let lun = volume.lun;
    let by_path = roots.dev.join("disk/by-path");
    let vmbus = block::list(&by_path)?
        .into_iter()
        .filter(|name| name.contains("vmbus") && name.ends_with(&format!("-lun-{lun}")));
    let direct = [format!("data/by-lun/{lun}"), format!("scsi1/lun{lun}")];
    let direct = direct.into_iter().map(|name| Candidate { path: links.join(name), rule: Rule::None });
    let nvme = azure_nvme(roots, lun)?.into_iter().map(|path| Candidate { path, rule: Rule::None });
    let vmbus = vmbus.map(|name| Candidate { path: by_path.join(name), rule: Rule::NotHost0 });
    Ok(direct.chain(nvme).chain(vmbus).collect())
}

/// Azure's NVMe disks with this LUN, without the links of azure-vm-utils: by sysfs.
fn azure_nvme(roots: &Roots, lun: u32) -> io::Result<Vec<PathBuf>> {
    let Some(namespace) = lun.checked_add(AZURE_NVME_LUN_0) else { return Ok(Vec::new()) };
    let devices = block::names(roots)?.into_iter().filter_map(|name| Device::named(roots, &name).ok());
    let is_it =
        |device: &Device| device.nvme(roots).is_some_and(|nvme| nvme == (namespace, AZURE_NVME.into()));
    Ok(devices.filter(is_it).map(|device| device.node).collect())
}

fn aws(roots: &Roots, volume: &Volume) -> io::Result<Vec<Candidate>> {
    let by_id = roots.dev.join("disk/by-id");
    let id = volume.disk_id.replace('-', "");
    let is_plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if id.is_empty() || !is_plain || !block::list(&by_id)?.iter().any(|name| name.starts_with(EBS)) {
        return Ok(Vec::new());
    }
    Ok(vec![Candidate { path: by_id.join(format!("{EBS}{id}")), rule: Rule::None }])
}

/// libvirt's disks: the root is vda, and LUN 0 is vdb.
fn libvirt(roots: &Roots, volume: &Volume) -> io::Result<Vec<Candidate>> {
    let is_virtio = |name: &String| name.len() == 3 && name.starts_with("vd");
    let letter = u8::try_from(volume.lun).ok().and_then(|lun| b'b'.checked_add(lun));
    let Some(letter) = letter.filter(u8::is_ascii_lowercase) else { return Ok(Vec::new()) };
    if !block::list(&roots.dev)?.iter().any(is_virtio) {
        return Ok(Vec::new());
    }
    Ok(vec![Candidate { path: roots.dev.join(format!("vd{}", char::from(letter))), rule: Rule::None }])
}

/// Disks with this LUN on any SCSI host: host 0 last, as a cloud's own disks tend to be there.
fn scsi(roots: &Roots, volume: &Volume) -> io::Result<Vec<Candidate>> {
    let mut found = Vec::new();
    for name in block::names(roots)? {
        let Ok(device) = Device::named(roots, &name) else { continue };
        if let Some(address) = device.scsi_address(roots).filter(|[.., lun]| *lun == volume.lun) {
            let host0 = address.first() == Some(&0);
            let rule = if host0 { Rule::NoPartitions } else { Rule::None };
            found.push((host0, address, Candidate { path: device.node, rule }));
        }
    }
    found.sort_by_key(|(host0, address, _)| (*host0, *address));
    Ok(found.into_iter().map(|(_, _, candidate)| candidate).collect())
}
