//! A volume of a request, checked: what these types hold can be part of a path, an option or an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use nix::unistd::Gid;
use secure_comms_protocol::volumes::{self, VOLUMES_MAX};

use crate::text::one_line;

/// Where the volumes are mounted, each in a directory of its name.
pub const DIRECTORY: &str = "/run/cloud-volumes";
/// Longest name, in bytes.
const NAME_MAX: usize = 64;
/// Longest id of a disk, in bytes: Azure's are paths.
const DISK_ID_MAX: usize = 1024;
/// Longest part of a KBS resource path, in bytes.
const KEY_PART_MAX: usize = 128;
/// Highest number of a disk on its controller that a cloud may give: the kernel's limit for SCSI (`max_lun`), as udev prints it.
const LUN_MAX: u32 = 16_383;

/// The request can't be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadVolume {
    /// There are too many.
    #[error("{0} volumes, more than {VOLUMES_MAX}")]
    TooMany(usize),
    /// Two have the same name.
    #[error("volume {0}: two volumes have this name")]
    Twice(VolumeName),
    /// Two are on the same disk.
    #[error("volume {second}: the same lun and disk_id as volume {first}: a disk is one volume's")]
    SameDisk {
        /// One of them.
        first: VolumeName,
        /// The other one.
        second: VolumeName,
    },
    /// A name is not one path component of the characters that are allowed.
    #[error("a volume's name '{0}' is not 1 to {NAME_MAX} of A-Z, a-z, 0-9, '.', '_' and '-'")]
    Name(String),
    /// A field of a volume is wrong.
    #[error("volume {name}: {field} '{value}': {why}")]
    Field {
        /// The volume.
        name: VolumeName,
        /// The field, as the annotation calls it.
        field: &'static str,
        /// What it has, in one line.
        value: String,
        /// What is expected.
        why: &'static str,
    },
}

/// Name of a volume: one path component.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeName(String);

impl VolumeName {
    /// Checks a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        is_word(name, NAME_MAX).then(|| Self(name.to_owned()))
    }

    /// Where the volume is mounted.
    #[must_use]
    pub fn mount_point(&self) -> PathBuf {
        PathBuf::from(DIRECTORY).join(&self.0)
    }

    /// Name of an encrypted volume's device in the device mapper.
    #[must_use]
    pub fn mapping(&self) -> String {
        format!("{MAPPING_PREFIX}{}", self.0)
    }
}

/// What the names of the volumes' devices in the device mapper begin with, as cloud-api-adaptor has it.
pub const MAPPING_PREFIX: &str = "caa-";

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// File system of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// ext3.
    Ext3,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// Reads the name that the kernel and `blkid` have for it.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Ext4, Self::Ext3, Self::Xfs].into_iter().find(|fs| fs.name() == name)
    }

    /// Whether a volume that is to have the other may have this one: an ext3 can have become an ext4.
    #[must_use]
    pub fn is_kin_of(self, other: Self) -> bool {
        (self == Self::Xfs) == (other == Self::Xfs)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Ext3 => "ext3",
            Self::Xfs => "xfs",
        }
    }
}

/// A volume, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// File system that it has, or gets if the disk is empty.
    pub fs: FileSystem,
    /// Number of the disk on its controller.
    pub lun: u32,
    /// The cloud's id of the disk, as it has it; empty if there is none. No part of a path without a look at its characters.
    pub disk_id: String,
    /// Group that is to own it.
    pub group: Option<Gid>,
    /// KBS resource path of the key, if it is encrypted.
    pub key: Option<String>,
}

/// Checks the volumes of a request, all of them before the first is mounted.
///
/// # Errors
/// The first fault.
pub fn check(volumes: &[volumes::Volume]) -> Result<Vec<Volume>, BadVolume> {
    if volumes.len() > VOLUMES_MAX {
        return Err(BadVolume::TooMany(volumes.len()));
    }
    let checked = volumes.iter().map(Volume::check).collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    if let Some(volume) = checked.iter().find(|volume| !names.insert(&volume.name)) {
        return Err(BadVolume::Twice(volume.name.clone()));
    }
    // Otherwise the second one would be waited for, and its disk be found in use.
    let mut disks = BTreeMap::new();
    for volume in &checked {
        if let Some(first) = disks.insert((volume.lun, &volume.disk_id), &volume.name) {
            return Err(BadVolume::SameDisk { first: first.clone(), second: volume.name.clone() });
        }
    }
    Ok(checked)
}

impl Volume {
    fn check(volume: &volumes::Volume) -> Result<Self, BadVolume> {
        let name = VolumeName::parse(&volume.name).ok_or_else(|| BadVolume::Name(one_line(&volume.name)))?;
        let bad = |field, value: &str, why| BadVolume::Field {
            name: name.clone(),
            field,
            value: one_line(value),
            why,
        };
        let fs = FileSystem::parse(&volume.fs_type)
            .ok_or_else(|| bad("fs_type", &volume.fs_type, "not ext4, ext3 or xfs"))?;
        let lun = decimal(&volume.lun)
            .filter(|lun| *lun <= LUN_MAX)
            .ok_or_else(|| bad("lun", &volume.lun, "not a number from 0 to 16383"))?;
        let id = &volume.disk_id;
        if id.len() > DISK_ID_MAX || id.chars().any(char::is_control) {
            return Err(bad("disk_id", id, "too long, or with control characters"));
        }
        let group = match volume.fs_group.as_str() {
            "" => None,
            // The highest stands for "unchanged" in chown(2).
            group => Some(
                decimal(group)
                    .filter(|group| *group != u32::MAX)
                    .map(Gid::from_raw)
                    .ok_or_else(|| bad("fs_group", group, "not the number of a group"))?,
            ),
        };
        let key = match (volume.encrypt_type.as_str(), volume.key_id.as_str()) {
            ("", "") => None,
            // A key says that the volume is believed to be encrypted.
            ("", key) => {
                return Err(bad(
                    "key_id",
                    key,
                    "a key, but no encrypt_type: set it to luks2, or leave the key out",
                ));
            }
            ("luks" | "luks2", key) if is_resource(key) => Some(key.to_owned()),
            ("luks" | "luks2", key) => {
                return Err(bad("key_id", key, "not a KBS resource path, <repository>/<type>/<tag>"));
            }
            (kind, _) => return Err(bad("encrypt_type", kind, "not luks or luks2")),
        };
        Ok(Self { name, fs, lun, disk_id: id.clone(), group, key })
    }
}

/// Whether the text is one path component, of characters that need no quoting anywhere.
fn is_word(text: &str, max: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=max).contains(&text.len()) && text.bytes().all(allowed) && text != "." && text != ".."
}

fn is_resource(path: &str) -> bool {
    path.split('/').count() == 3 && path.split('/').all(|part| is_word(part, KEY_PART_MAX))
}

/// Reads digits only: no sign, no blank.
fn decimal(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn good() -> volumes::Volume {
        volumes::Volume {
            name: "vol-0".into(),
            fs_type: "ext4".into(),
            lun: "0".into(),
            ..Default::default()
        }
    }

    fn fault(change: impl Fn(&mut volumes::Volume)) -> String {
        let mut volume = good();
        change(&mut volume);
        check(&[volume]).unwrap_err().to_string()
    }

    #[test]
    fn a_volume_needs_name_file_system_and_lun_only() {
        let checked = &check(&[good()]).unwrap()[0];
        assert_eq!(checked.name.mount_point(), PathBuf::from("/run/cloud-volumes/vol-0"));
        assert_eq!(
            (checked.fs, checked.lun, checked.group, &checked.key),
            (FileSystem::Ext4, 0, None, &None)
        );
    }

    #[test]
    fn all_fields_are_read() {
        let volume = volumes::Volume {
            lun: "12".into(),
            disk_id: "vol-0abc".into(),
            fs_group: "1000".into(),
            encrypt_type: "luks".into(),
            key_id: "default/key/1".into(),
            fs_type: "xfs".into(),
            ..good()
        };
        let checked = &check(&[volume]).unwrap()[0];
        assert_eq!((checked.fs, checked.lun, checked.disk_id.as_str()), (FileSystem::Xfs, 12, "vol-0abc"));
        assert_eq!(
            (checked.group, checked.key.as_deref()),
            (Some(Gid::from_raw(1000)), Some("default/key/1"))
        );
    }

    #[test]
    fn each_fault_names_volume_field_and_value() {
        assert_eq!(
            fault(|v| v.fs_type = "btrfs".into()),
            "volume vol-0: fs_type 'btrfs': not ext4, ext3 or xfs"
        );
        for lun in ["", "-1", "+1", " 1", "1 ", "0x1", "16384", "99999999999"] {
            assert!(fault(|v| v.lun = lun.into()).starts_with("volume vol-0: lun "), "{lun}");
        }
        for id in ["a\n", "\u{7f}", &"x".repeat(1025)] {
            assert!(fault(|v| v.disk_id = id.into()).starts_with("volume vol-0: disk_id "), "{id}");
        }
        for group in ["-1", "root", "4294967295", "4294967296"] {
            assert!(fault(|v| v.fs_group = group.into()).starts_with("volume vol-0: fs_group "), "{group}");
        }
        assert!(fault(|v| v.encrypt_type = "plain".into()).starts_with("volume vol-0: encrypt_type "));
        assert!(fault(|v| v.key_id = "a/b/c".into()).starts_with("volume vol-0: key_id "));
        for key in ["", "a/b", "a/b/c/d", "a//c", "kbs:///a/b/c", "../b/c", "a/b/c?x", "a/b/c\n"] {
            let text = fault(|v| (v.encrypt_type, v.key_id) = ("luks2".into(), key.into()));
            assert!(text.starts_with("volume vol-0: key_id ") && !text.contains('\n'), "{key}: {text}");
        }
    }

    #[test]
    fn a_disk_comes_once() {
        let on = |name: &str, lun: &str, disk_id: &str| volumes::Volume {
            name: name.into(),
            lun: lun.into(),
            disk_id: disk_id.into(),
            ..good()
        };
        let twice = check(&[on("a", "1", ""), on("b", "2", ""), on("c", "01", "")]).unwrap_err();
        assert_eq!(
            twice.to_string(),
            "volume c: the same lun and disk_id as volume a: a disk is one volume's"
        );
        // Where the id says which disk it is (AWS), the numbers may be the same.
        assert!(check(&[on("a", "1", "vol-1"), on("b", "1", "vol-2"), on("c", "2", "vol-1")]).is_ok());
    }

    #[test]
    fn a_name_comes_once_and_there_are_few() {
        assert_eq!(check(&[good(), good()]).unwrap_err(), BadVolume::Twice(VolumeName("vol-0".into())));
        let many: Vec<_> = (0..=VOLUMES_MAX)
            .map(|n| volumes::Volume { name: format!("vol-{n}"), lun: n.to_string(), ..good() })
            .collect();
        assert_eq!(check(&many).unwrap_err(), BadVolume::TooMany(VOLUMES_MAX + 1));
        assert!(check(&many[1..]).is_ok());
    }

    proptest! {
        #[test]
        fn a_name_stays_in_its_directory(name in "\\PC{0,70}|[./a-c]{0,6}|[A-Za-z0-9._-]{1,64}") {
            let place = VolumeName::parse(&name).map(|name| name.mount_point());
            if let Some(place) = place {
                prop_assert_eq!(place.parent(), Some(std::path::Path::new(DIRECTORY)));
                prop_assert_eq!(place.components().count(), 4);
                prop_assert!(!name.contains(['/', '\0', ' ', '\n']));
            } else {
                let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
                prop_assert!(!plain || name.is_empty() || name.len() > 64 || name == "." || name == "..");
            }
        }

        #[test]
        fn no_request_upsets_it(fields in prop::collection::vec("\\PC{0,20}|[a-z0-9/.-]{0,12}", 7)) {
            let [name, fs_type, lun, disk_id, fs_group, encrypt_type, key_id] = fields.try_into().unwrap();
            let volume = volumes::Volume { name, fs_type, lun, disk_id, fs_group, encrypt_type, key_id };
            if let Err(fault) = check(&[volume]) {
                prop_assert!(!fault.to_string().contains('\n'));
            }
        }
    }
}
