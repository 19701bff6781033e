//! The annotation that describes a container's cloud volumes: JSON in, volumes out. cloud-api-adaptor writes it on the worker
//! node.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use secure_comms_protocol::volumes::{VOLUMES_MAX, Volume};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;

/// The annotation.
pub const CLOUD_VOLUMES: &str = "io.confidentialcontainers.org.cloud_volumes";
/// Where `podvm-volumes` mounts the volumes, each in a directory of its name.
pub const MOUNT_BASE: &str = "/run/cloud-volumes";
/// The longest annotation, in bytes. 32 volumes take some 6 KiB.
const TEXT_MAX: usize = 32 * 1024;
/// The longest name and the longest id, in bytes.
const NAME_MAX: usize = 64;
/// The longest other value, in bytes.
const VALUE_MAX: usize = 1024;
/// The file system of a volume that names none.
const DEFAULT_FS_TYPE: &str = "ext4";

/// A volume, and the mount of the container that it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudVolume {
    /// What `podvm-volumes` is asked for.
    pub volume: Volume,
    /// Destination of the mount, absolute.
    pub mount_point: PathBuf,
}

impl CloudVolume {
    /// Where the volume is mounted in the VM.
    pub fn path(&self) -> PathBuf {
        path_of(&self.volume)
    }
}

/// Where `podvm-volumes` mounts this volume.
pub(super) fn path_of(volume: &Volume) -> PathBuf {
    Path::new(MOUNT_BASE).join(&volume.name)
}

/// Why an annotation is refused, with all of its volumes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVolumes {
    /// It is longer than it may be.
    #[error("it has {0} bytes, at most {TEXT_MAX} are allowed")]
    TooLong(usize),
    /// It is no JSON, or not of this form.
    #[error("it {what} at line {line}, column {column}")]
    Json {
        /// What is wrong.
        what: &'static str,
        /// Line of the fault.
        line: usize,
        /// Column of the fault.
        column: usize,
    },
    /// It has too many volumes.
    #[error("it has more than {VOLUMES_MAX} volumes")]
    TooMany,
    /// One of its volumes can't be right.
    #[error("the volume '{name}' {fault}")]
    Volume {
        /// Its name, of which only the beginning and only harmless characters are left.
        name: String,
        /// What is wrong.
        fault: Fault,
    },
}

impl From<serde_json::Error> for InvalidVolumes {
    // Not the error's own text, which may hold all of the annotation.
    fn from(error: serde_json::Error) -> Self {
        let what = match error.classify() {
            Category::Data => "has a value of another type, or a field twice,",
            Category::Eof => "ends within its JSON",
            Category::Syntax | Category::Io => "is no JSON",
        };
        Self::Json { what, line: error.line(), column: error.column() }
    }
}

/// What is wrong with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Its name is no plain one, which could lead elsewhere in the VM.
    #[error(
        "has another name than 1 to {NAME_MAX} letters, digits, '.', '_' and '-', without '.' or '-' in front"
    )]
    Name,
    /// There are two of its name. Decoders differ in which of them counts.
    #[error("comes twice")]
    Repeated,
    /// It has no mount point, or one that is not absolute.
    #[error("has no absolute mount_point without '..' and control characters")]
    MountPoint,
    /// Another volume has its mount point.
    #[error("has the mount_point of another volume")]
    SameMountPoint,
    /// It has no number.
    #[error("has no lun, a decimal number")]
    Lun,
    /// It is to have a file system that is not supported.
    #[error("has another fs_type than ext4, ext3 and xfs")]
    FsType,
    /// Its group is no number.
    #[error("has an fs_group that is no decimal number")]
    FsGroup,
    /// Its encryption is unknown.
    #[error("has another encrypt_type than luks and luks2")]
    EncryptType,
    /// It is encrypted, and there is no name of a key.
    #[error("is encrypted and has no key_id")]
    NoKey,
    /// Its disk id or key id is too long or has characters that no id has.
    #[error("has a disk_id or key_id with a control character, or of more than {VALUE_MAX} bytes")]
    Id,
}

/// A volume as it is written.
#[derive(Debug, Default)]
struct Entry {
    mount_point: Option<String>,
    fs_type: Option<String>,
    lun: Option<String>,
    disk_id: Option<String>,
    fs_group: Option<String>,
    encrypt_type: Option<String>,
    key_id: Option<String>,
}

impl Entry {
    fn field(&mut self, name: &str) -> Option<&mut Option<String>> {
        Some(match name {
            "mount_point" => &mut self.mount_point,
            "fs_type" => &mut self.fs_type,
            "lun" => &mut self.lun,
            "disk_id" => &mut self.disk_id,
            "fs_group" => &mut self.fs_group,
            "encrypt_type" => &mut self.encrypt_type,
            "key_id" => &mut self.key_id,
            _ => return None,
        })
    }
}

// Not derived: that would take a list of values for an object.
impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a volume")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let mut entry = Entry::default();
        while let Some(name) = map.next_key::<String>()? {
            match entry.field(&name) {
                Some(field @ None) => *field = Some(map.next_value()?),
                Some(Some(_)) => return Err(A::Error::custom("a field twice")),
                // That of a later version.
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(entry)
    }
}

/// All volumes in the order of the text, also those of the same name; one more than there may be at most.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of volumes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut all = Vec::new();
        while let Some(entry) = map.next_entry()? {
            if all.len() <= VOLUMES_MAX {
                all.push(entry);
            }
        }
        Ok(Entries(all))
    }
}

/// Reads the annotation. The volumes are in the order of their names, as upstream mounts them. An empty annotation has none.
///
/// # Errors
/// Any fault of any volume: a container must not start without one of its volumes.
pub fn parse(text: &[u8]) -> Result<Vec<CloudVolume>, InvalidVolumes> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    if text.len() > TEXT_MAX {
        return Err(InvalidVolumes::TooLong(text.len()));
    }
    let Entries(mut entries) = serde_json::from_slice(text)?;
    if entries.len() > VOLUMES_MAX {
        return Err(InvalidVolumes::TooMany);
    }
    entries.sort_by(|one, other| one.0.cmp(&other.0));
    let mut volumes: Vec<CloudVolume> = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let fault = |fault| InvalidVolumes::Volume { name: harmless(&name), fault };
        if volumes.last().is_some_and(|before| before.volume.name == name) {
            return Err(fault(Fault::Repeated));
        }
        let volume = entry.checked(&name).map_err(fault)?;
        if volumes.iter().any(|before| before.mount_point == volume.mount_point) {
            return Err(fault(Fault::SameMountPoint));
        }
        volumes.push(volume);
    }
    Ok(volumes)
}

impl Entry {
    fn checked(self, name: &str) -> Result<CloudVolume, Fault> {
        let [mount_point, mut fs_type, lun, disk_id, fs_group, encrypt_type, key_id] = [
            self.mount_point,
            self.fs_type,
            self.lun,
            self.disk_id,
            self.fs_group,
            self.encrypt_type,
            self.key_id,
        ]
        .map(Option::unwrap_or_default);
        if !is_name(name) {
            return Err(Fault::Name);
        }
        let mount_point =
            is_mount_point(&mount_point).then(|| mount_point.into()).ok_or(Fault::MountPoint)?;
        if !is_decimal(&lun) {
            return Err(Fault::Lun);
        }
        if fs_type.is_empty() {
            fs_type.push_str(DEFAULT_FS_TYPE);
        }
        if !matches!(&*fs_type, "ext4" | "ext3" | "xfs") {
            return Err(Fault::FsType);
        }
        if !fs_group.is_empty() && !is_decimal(&fs_group) {
            return Err(Fault::FsGroup);
        }
        if !matches!(&*encrypt_type, "" | "luks" | "luks2") {
            return Err(Fault::EncryptType);
        }
        if !encrypt_type.is_empty() && key_id.is_empty() {
            return Err(Fault::NoKey);
        }
        if ![&disk_id, &key_id].into_iter().all(|id| is_value(id)) {
            return Err(Fault::Id);
        }
        let name = name.to_owned();
        let volume = Volume { name, fs_type, lun, disk_id, fs_group, encrypt_type, key_id };
        Ok(CloudVolume { volume, mount_point })
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-'])
}

fn is_mount_point(path: &str) -> bool {
    is_value(path)
        && Path::new(path).is_absolute()
        && !Path::new(path).components().any(|part| part == Component::ParentDir)
}

fn is_value(text: &str) -> bool {
    text.len() <= VALUE_MAX && !text.chars().any(char::is_control)
}

/// Without a sign, which `parse` alone takes.
fn is_decimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u32>().is_ok()
}

/// The beginning of a text for the log, in one line.
fn harmless(text: &str) -> String {
    text.chars().take(NAME_MAX).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
#[path = "cloud_volumes_tests.rs"]
mod tests;
