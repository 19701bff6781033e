//! Which disk is a volume's, in the trees of each cloud.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;

use support::{Tree, volume};
use volumes::discover::{Found, Search, find};
use volumes::volume::check;

const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77\n";

fn search(tree: &Tree, lun: u32, disk_id: &str) -> Search {
    let mut wanted = volume("vol-0", lun);
    wanted.disk_id = disk_id.into();
    find(&tree.roots, &check(&[wanted]).unwrap()[0]).unwrap()
}

/// The name of the disk, or why there is none.
fn found(tree: &Tree, lun: u32, disk_id: &str) -> Result<String, String> {
    let search = search(tree, lun, disk_id);
    match search.found {
        Some(Found::Unused(device)) => Ok(device.name),
        Some(Found::Mounted(device)) => Ok(format!("{} (mounted)", device.name)),
        None => Err(search.refused.join("; ").replace(&*tree.roots.dev.to_string_lossy(), "/dev")),
    }
}

#[test]
fn azure_disks_are_found_by_their_links() {
    for link in ["disk/azure/data/by-lun/3", "disk/azure/scsi1/lun3"] {
        let tree = Tree::new();
        tree.scsi("sda", 0, "0:0:0:0").scsi("sdc", 32, "1:0:0:9").link(link, "sdc");
        assert_eq!(found(&tree, 3, ""), Ok("sdc".into()), "{link}");
        assert_eq!(found(&tree, 4, ""), Err(String::new()), "{link}");
    }
}

#[test]
fn azure_nvme_disks_are_found_by_their_namespace() {
    const REMOTE: &str = "MSFT NVMe Accelerator v1.0";
    let tree = Tree::new();
    tree.attribute("class/dmi/id/chassis_asset_tag", AZURE_TAG);
    tree.nvme("nvme0n1", 0, REMOTE, 1).nvme("nvme0n2", 1, REMOTE, 2).nvme("nvme0n15", 2, REMOTE, 15);
    // The VM's own disks, which no LUN names, and the model of another controller.
    tree.nvme("nvme1n1", 3, "Microsoft NVMe Direct Disk v2", 5).nvme(
        "nvme2n1",
        4,
        "MSFT NVMe Accelerator",
        6,
    );
    assert_eq!(found(&tree, 0, ""), Ok("nvme0n2".into()));
    assert_eq!(found(&tree, 13, ""), Ok("nvme0n15".into()));
    for lun in [1, 2, 3, 4, 5, 12, 14, 15, 16_383] {
        assert_eq!(found(&tree, lun, ""), Err(String::new()), "{lun}");
    }
    // A link of azure-vm-utils counts first.
    tree.link("disk/azure/data/by-lun/0", "nvme0n15");
    assert_eq!(found(&tree, 0, ""), Ok("nvme0n15".into()));
    // A disk with that model outside Azure.
    let tree = Tree::new();
    tree.nvme("nvme0n2", 1, REMOTE, 2);
    assert_eq!(found(&tree, 0, ""), Err(String::new()));
}

#[test]
fn an_azure_nvme_disk_in_use_is_no_volume() {
    let tree = Tree::new();
    tree.attribute("class/dmi/id/chassis_asset_tag", AZURE_TAG);
    tree.nvme("nvme0n2", 1, "MSFT NVMe Accelerator v1.0", 2).partition("nvme0n2", "nvme0n2p1", 259, 9);
    tree.mounts("40 1 259:9 / /mnt rw - ext4 /dev/x rw\n");
    let why = "/dev/nvme0n2 is in use: it, or a partition of it, is mounted at /mnt";
    assert_eq!(found(&tree, 0, ""), Err(why.into()));
}

#[test]
fn azure_disks_are_found_by_path_but_not_on_host_0() {
    let path = "disk/by-path/acpi-VMBUS:00-vmbus-f8b3781a1e824818a1c363d806ec15bb-lun-0";
    let tree = Tree::new();
    tree.attribute("class/dmi/id/chassis_asset_tag", AZURE_TAG);
    tree.scsi("sdb", 16, "0:0:0:7").scsi("sdc", 32, "1:0:0:8").link(path, "sdb");
    assert_eq!(found(&tree, 0, ""), Err("/dev/sdb is on SCSI host 0".into()));
    tree.link("disk/by-path/acpi-VMBUS:00-vmbus-f8b3781b1e824818a1c363d806ec15bb-lun-0", "sdc");
    assert_eq!(found(&tree, 0, ""), Ok("sdc".into()));
    // LUNs that only end alike.
    assert_eq!(found(&tree, 10, ""), Err(String::new()));
    let tree = Tree::new();
    tree.attribute("class/dmi/id/chassis_asset_tag", AZURE_TAG).scsi("sdc", 32, "1:0:0:8");
    tree.link("disk/by-path/acpi-VMBUS:00-vmbus-f8b3781b1e824818a1c363d806ec15bb-lun-10", "sdc");
    assert_eq!(found(&tree, 0, ""), Err(String::new()));
    assert_eq!(found(&tree, 10, ""), Ok("sdc".into()));
}

#[test]
fn elsewhere_a_vmbus_path_counts_for_nothing() {
    let tree = Tree::new();
    tree.disk("sdx", 8, 1).link("disk/by-path/acpi-VMBUS:00-vmbus-x-lun-0", "sdx");
    assert!(found(&tree, 0, "").is_err());
}

#[test]
fn aws_disks_are_found_by_id_without_hyphens() {
    let tree = Tree::new();
    let link = |id: &str| format!("disk/by-id/nvme-Amazon_Elastic_Block_Store_{id}");
    tree.disk("nvme1n1", 259, 1).link(&link("vol0aa"), "nvme1n1");
    tree.disk("nvme2n1", 259, 2).link(&link("vol0bb"), "nvme2n1");
    assert_eq!(found(&tree, 0, "vol-0bb"), Ok("nvme2n1".into()));
    assert_eq!(found(&tree, 1, "vol-0aa"), Ok("nvme1n1".into()));
    assert!(found(&tree, 0, "vol-0cc").is_err());
    assert!(found(&tree, 0, "").is_err());
    // An id that would lead elsewhere.
    tree.link("disk/by-id/nvme-Amazon_Elastic_Block_Store_x/y", "nvme1n1");
    for id in ["x/y", "x/../vol0aa", "/subscriptions/0/disks/d"] {
        assert_eq!(found(&tree, 0, id), Err(String::new()), "{id}");
    }
}

#[test]
fn libvirt_disks_are_found_by_letter() {
    let tree = Tree::new();
    tree.disk("vdb", 254, 16).disk("vdc", 254, 32).disk("vdz", 254, 400);
    assert_eq!(found(&tree, 0, ""), Ok("vdb".into()));
    assert_eq!(found(&tree, 1, ""), Ok("vdc".into()));
    assert_eq!(found(&tree, 24, ""), Ok("vdz".into()));
    for lun in [2, 25, 26, 254, 255, 256, 257, 16_383] {
        assert_eq!(found(&tree, lun, ""), Err(String::new()), "{lun}");
    }
}

#[test]
fn any_cloud_has_its_scsi_address_host_0_last() {
    let tree = Tree::new();
    tree.scsi("sda", 0, "0:0:1:5").scsi("sdb", 16, "2:0:0:5").scsi("sdc", 32, "10:0:0:5");
    assert_eq!(found(&tree, 5, ""), Ok("sdb".into()));
    let tree = Tree::new();
    tree.scsi("sda", 0, "0:0:1:5").scsi("sdc", 32, "1:0:0:6");
    assert_eq!(found(&tree, 5, ""), Ok("sda".into()));
    tree.partition("sda", "sda1", 8, 1);
    assert_eq!(found(&tree, 5, ""), Err("/dev/sda is on SCSI host 0 and has partitions".into()));
}

#[test]
fn a_partitioned_disk_elsewhere_is_left_to_its_signature() {
    let tree = Tree::new();
    tree.scsi("sdb", 16, "1:0:0:0").partition("sdb", "sdb1", 8, 17);
    assert_eq!(found(&tree, 0, ""), Ok("sdb".into()));
}

#[test]
fn the_root_disk_is_never_a_volume() {
    let tree = Tree::new();
    tree.link("disk/azure/data/by-lun/0", "vda");
    assert_eq!(
        found(&tree, 0, ""),
        Err("/dev/vda is in use: it, or a partition of it, is mounted at /".into())
    );
    // Also where the mount can't be seen.
    tree.mounts("");
    assert_eq!(found(&tree, 0, ""), Err("/dev/vda is in use by dm-0".into()));
}

#[test]
fn a_mounted_disk_is_never_a_volume() {
    let tree = Tree::new();
    tree.disk("vdb", 254, 16).partition("vdb", "vdb1", 254, 17);
    for number in ["254:16", "254:17"] {
        tree.mounts(&format!("40 1 {number} / /mnt rw - ext4 /dev/x rw\n"));
        assert_eq!(
            found(&tree, 0, ""),
            Err("/dev/vdb is in use: it, or a partition of it, is mounted at /mnt".into())
        );
    }
    tree.mounts("40 1 254:18 / /mnt rw - ext4 /dev/x rw\n");
    assert_eq!(found(&tree, 0, ""), Ok("vdb".into()));
}

#[test]
fn the_user_data_disk_is_never_a_volume() {
    for label in ["cidata", "CIDATA"] {
        let tree = Tree::new();
        tree.disk("vdb", 254, 16)
            .partition("vdb", "vdb1", 254, 17)
            .link(&format!("disk/by-label/{label}"), "vdb");
        assert_eq!(found(&tree, 0, ""), Err("/dev/vdb has the user data (its label is cidata)".into()));
        fs::remove_file(tree.roots.dev.join("disk/by-label").join(label)).unwrap();
        tree.link(&format!("disk/by-label/{label}"), "vdb1");
        assert!(found(&tree, 0, "").unwrap_err().contains("user data"));
    }
}

#[test]
fn a_partition_is_no_volume() {
    let tree = Tree::new();
    tree.disk("vdb", 254, 16).partition("vdb", "vdb1", 254, 17).link("disk/azure/data/by-lun/4", "vdb1");
    assert_eq!(found(&tree, 4, ""), Err("/dev/vdb1 is a partition".into()));
}

#[test]
fn a_path_must_lead_to_a_block_device_of_dev() {
    let tree = Tree::new();
    let by_lun = tree.roots.dev.join("disk/azure/data/by-lun");
    fs::create_dir_all(&by_lun).unwrap();
    fs::write(tree.path().join("file"), "").unwrap();
    symlink(tree.path().join("file"), by_lun.join("0")).unwrap();
    fs::write(by_lun.join("1"), "").unwrap();
    symlink(tree.roots.dev.join("gone"), by_lun.join("2")).unwrap();
    assert!(found(&tree, 0, "").unwrap_err().ends_with("by-lun/0: a link that leads out of /dev"));
    assert!(found(&tree, 1, "").unwrap_err().ends_with("by-lun/1: not a block device"));
    assert_eq!(found(&tree, 2, ""), Err(String::new()));
}

#[test]
fn a_refused_name_leaves_the_others() {
    let tree = Tree::new();
    tree.link("disk/azure/data/by-lun/0", "vda").scsi("sdc", 32, "1:0:0:0");
    assert_eq!(found(&tree, 0, ""), Ok("sdc".into()));
}

#[test]
fn a_volume_that_is_mounted_is_recognised_by_its_disk() {
    let tree = Tree::new();
    tree.disk("vdb", 254, 16);
    let bind = "41 1 254:16 /sub /run/kata-containers/c rw - ext4 /dev/vdb rw\n";
    tree.mounts(&format!("40 1 254:16 / /run/cloud-volumes/vol-0 rw - ext4 /dev/vdb rw\n{bind}"));
    assert_eq!(found(&tree, 0, ""), Ok("vdb (mounted)".into()));
    // Of another volume, or another disk.
    tree.mounts("40 1 254:16 / /run/cloud-volumes/vol-1 rw - ext4 /dev/vdb rw\n");
    assert!(found(&tree, 0, "").is_err());
    // An encrypted one is mounted by its mapping, and by no other.
    let mut wanted = volume("vol-0", 0);
    (wanted.encrypt_type, wanted.key_id) = ("luks2".into(), "a/b/c".into());
    let wanted = &check(&[wanted]).unwrap()[0];
    tree.mounts("40 1 254:16 / /run/cloud-volumes/vol-0 rw - ext4 /dev/vdb rw\n");
    assert!(find(&tree.roots, wanted).unwrap().found.is_none(), "mounted without encryption");
    tree.mapping("dm-1", 253, 1, "caa-vol-0", &["vdb"]);
    tree.mounts("40 1 253:1 / /run/cloud-volumes/vol-0 rw - ext4 /dev/dm-1 rw\n");
    assert!(
        matches!(find(&tree.roots, wanted).unwrap().found, Some(Found::Mounted(disk)) if disk.name == "vdb")
    );
    assert!(found(&tree, 0, "").is_err(), "mounted with encryption, and none is asked for");
}
