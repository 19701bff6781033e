//! A NoCloud seed: a disk labelled `cidata` with a file `user-data`, a cloud-config with `write_files`.
//!
//! The cloud-config must be JSON, which is also YAML: enough for a test VM, without a YAML parser.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::Deserialize;

use super::{DIRECTORY, File, read_if_there};

const LABEL: &str = "cidata";
const MOUNT_POINT: &str = "/run/cidata";
const HEADER: &str = "#cloud-config\n";

/// Source of the seed, and its files for [`DIRECTORY`].
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

#[derive(Deserialize)]
struct CloudConfig {
    #[serde(default)]
    write_files: Vec<WriteFile>,
}

#[derive(Deserialize)]
struct WriteFile {
    path: String,
    content: String,
}

/// The files for [`DIRECTORY`]; others are ignored.
fn parse(text: &str) -> Result<Vec<File>> {
    let Some(json) = text.strip_prefix(HEADER) else { bail!("user-data does not begin with {HEADER:?}") };
    let config: CloudConfig = serde_json::from_str(json).context("user-data: the cloud-config as JSON")?;
    let ours = config.write_files.into_iter().filter_map(|file| {
        let name = file.path.strip_prefix(DIRECTORY)?.strip_prefix('/')?;
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        plain.then(|| File { name: name.to_owned(), content: file.content.into() })
    });
    Ok(ours.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_right_below_the_directory_are_taken() {
        let text = "#cloud-config\n{\"write_files\": [{\"path\": \"/run/peerpod/apf.json\", \"content\": \"{}\"},\
                    {\"path\": \"/etc/passwd\", \"content\": \"x\"}, {\"path\": \"/run/peerpod/../x\", \"content\": \"x\"},\
                    {\"path\": \"/run/peerpod/\", \"content\": \"x\"}, {\"path\": \"/run/peerpodx\", \"content\": \"x\"}]}";
        let files = parse(text).unwrap();
        assert_eq!(files, [File { name: "apf.json".into(), content: b"{}".into() }]);
    }

    #[test]
    fn what_is_no_cloud_config_is_refused() {
        assert!(parse("{}").unwrap_err().to_string().contains("does not begin with"));
        assert!(format!("{:#}", parse("#cloud-config\nwrite_files: []").unwrap_err()).contains("as JSON"));
        assert_eq!(parse("#cloud-config\n{\"users\": []}").unwrap(), []);
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
