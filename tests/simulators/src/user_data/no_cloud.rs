//! A NoCloud seed: a disk labelled `cidata` with a file `user-data`, a cloud-config as the image's own program reads it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{File, read_if_there};

const LABEL: &str = "cidata";
const MOUNT_POINT: &str = "/run/cidata";

/// Source of the seed, and its files.
pub(super) fn find() -> Result<Option<(String, Vec<File>)>> {
    let Some((device, fs_type)) = seed()? else { return Ok(None) };
    let place = format!("NoCloud seed on {}", device.display());
    let text = user_data(&device, fs_type).with_context(|| place.clone())?;
    let files = parse(&text).with_context(|| place.clone())?;
    Ok(Some((place, files)))
}

/// The block device with the label, and its file system.
fn seed() -> Result<Option<(PathBuf, &'static str)>> {
    let devices = fs::read_dir("/sys/class/block").context("listing /sys/class/block")?;
    for name in devices.flatten().map(|entry| entry.file_name()) {
        let device = Path::new("/dev").join(name);
        // A drive without a medium can't be opened.
        let Ok(file) = fs::File::open(&device) else { continue };
        let (mut boot_sector, mut volume) = ([0; 512], [0; 72]);
        let fat = file.read_exact_at(&mut boot_sector, 0).is_ok() && is_fat(&boot_sector);
        if fat || file.read_exact_at(&mut volume, ISO_VOLUME).is_ok() && is_iso(&volume) {
            return Ok(Some((device, if fat { "vfat" } else { "iso9660" })));
        }
    }
    Ok(None)
}

/// Offset of the primary volume descriptor in an ISO 9660 image (ECMA-119 8.4), in bytes.
const ISO_VOLUME: u64 = 16 * 2048;

fn is_iso(volume: &[u8]) -> bool {
    volume.get(1..6) == Some(b"CD001") && volume.get(40..72).is_some_and(is_label)
}

/// The label of FAT12 and FAT16 is at 43, that of FAT32 at 71.
fn is_fat(boot_sector: &[u8]) -> bool {
    let labelled = |at: usize| boot_sector.get(at..at + 11).is_some_and(is_label);
    boot_sector.get(510..) == Some(&[0x55, 0xaa]) && (labelled(43) || labelled(71))
}

fn is_label(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.trim_end().eq_ignore_ascii_case(LABEL))
}

fn user_data(device: &Path, fs_type: &str) -> Result<String> {
    fs::create_dir_all(MOUNT_POINT).with_context(|| format!("making {MOUNT_POINT}"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some(device), MOUNT_POINT, Some(fs_type), flags, None::<&str>)
        .with_context(|| format!("mounting {} ({fs_type}) on {MOUNT_POINT}", device.display()))?;
    let text = read_if_there(&Path::new(MOUNT_POINT).join("user-data"));
    umount2(MOUNT_POINT, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {MOUNT_POINT}"))?;
    String::from_utf8(text?.context("it has no file user-data")?).context("user-data")
}

/// The files that user data may bring.
fn parse(text: &str) -> Result<Vec<File>> {
    let user_data = user_data::cloud_config::parse(text.as_bytes())?;
    let files = user_data.files.into_iter();
    Ok(files.map(|(name, content)| File { name: name.as_str().to_owned(), content }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_user_data_are_taken() {
        let item = |path: &str| format!("  - path: {path}\n    content: |\n      {{}}\n");
        let text = ["/run/peerpod/apf.json", "/etc/passwd"].map(item).concat();
        let files = parse(&format!("#cloud-config\n\nwrite_files:\n{text}")).unwrap();
        assert_eq!(files, [File { name: "apf.json".into(), content: b"{}\n".into() }]);
    }

    #[test]
    fn a_label_is_found_in_either_superblock() {
        let mut volume = [b' '; 72];
        volume[1..6].copy_from_slice(b"CD001");
        assert!(!is_iso(&volume));
        volume[40..46].copy_from_slice(b"cidata");
        assert!(is_iso(&volume));
        let mut boot_sector = [b' '; 512];
        boot_sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert!(!is_fat(&boot_sector));
        boot_sector[71..77].copy_from_slice(b"CIDATA");
        assert!(is_fat(&boot_sector));
    }
}
