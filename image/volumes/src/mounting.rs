//! Requests, carried out: what is mounted already counts, so a request can be repeated, also after a restart.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use secure_comms_protocol::volumes;

use crate::block::{self, Device};
use crate::cdh::{self, SecureMount};
use crate::discover::{self, Found};
use crate::failure::{RequestError, VolumeError};
use crate::format;
use crate::log;
use crate::mappings::Mappings;
use crate::mountinfo;
use crate::mounts::{self, BusyLimit, Unmounted};
use crate::roots::Roots;
use crate::signature::{self, Signature};
use crate::volume::{self, DIRECTORY, FileSystem, MAPPING_PREFIX, Volume};

/// How often a disk is looked at before it counts as unclear.
const LOOKS: u32 = 3;
/// What `blkid` calls a disk that is encrypted with LUKS.
const LUKS: &str = "crypto_LUKS";

/// What can be set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How often a disk is looked for; at least once.
    pub attempts: u32,
    /// Pause between two of these attempts.
    pub delay: Duration,
    /// Pause between two looks at a disk.
    pub look_pause: Duration,
    /// How long an unmount waits for the last user.
    pub busy: BusyLimit,
    /// Whether a volume without encryption is refused.
    pub require_encryption: bool,
    /// Socket of the confidential data hub.
    pub data_hub: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            attempts: 15,
            delay: Duration::from_secs(2),
            look_pause: Duration::from_secs(1),
            busy: BusyLimit { attempts: 50, pause: Duration::from_millis(100) },
            require_encryption: false,
            data_hub: cdh::SOCKET.into(),
        }
    }
}

/// Why a pause ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The time is over.
    Time,
    /// A device came or changed.
    Event,
    /// The agent has given the request up.
    GivenUp,
}

/// Pauses in a request.
pub trait Patience {
    /// Waits that long at most.
    fn pause(&self, at_most: Duration) -> Woken;
}

/// The volumes of this VM.
pub struct Volumes {
    roots: Roots,
    settings: Settings,
    mappings: Box<dyn Mappings>,
}

/// A volume is not mounted, or the request is over.
enum Stop {
    GivenUp,
    Volume(VolumeError),
}

impl<E: Into<VolumeError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Volume(error.into())
    }
}

impl Volumes {
    /// The volumes of a VM with these roots.
    #[must_use]
    pub fn new(roots: Roots, settings: Settings, mappings: Box<dyn Mappings>) -> Self {
        Self { roots, settings, mappings }
    }

    /// Mounts the volumes in their order; returns where.
    ///
    /// # Errors
    /// The first fault. All volumes are checked before the first is mounted; what is mounted then stays mounted.
    pub fn mount(
        &self,
        request: &[volumes::Volume],
        patience: &dyn Patience,
    ) -> Result<Vec<String>, RequestError> {
        let volumes = volume::check(request)?;
        let failed = |volume: &Volume, cause| RequestError::Volume { name: volume.name.clone(), cause };
        let plain = volumes.iter().find(|volume| volume.key.is_none());
        if let Some(volume) = plain.filter(|_| self.settings.require_encryption) {
            return Err(failed(volume, VolumeError::NotEncrypted));
        }
        let mut paths = Vec::new();
        for volume in &volumes {
            self.mount_one(volume, patience).map_err(|stop| match stop {
                Stop::GivenUp => RequestError::GivenUp,
                Stop::Volume(cause) => failed(volume, cause),
            })?;
            paths.push(volume.name.mount_point().to_string_lossy().into_owned());
        }
        Ok(paths)
    }

    fn mount_one(&self, volume: &Volume, patience: &dyn Patience) -> Result<(), Stop> {
        let (disk, mounted) = match self.wait_for_disk(volume, patience)? {
            Found::Unused(disk) => (disk, false),
            Found::Mounted(disk) => (disk, true),
        };
        let read_only = disk.is_read_only(&self.roots);
        match (&volume.key, mounted) {
            (Some(key), false) => self.mount_encrypted(volume, key, &disk, patience)?,
            (None, false) => self.mount_plain(volume, &disk, patience)?,
            (_, true) => {}
        }
        if volume.key.is_some() {
            self.check_encrypted(volume, &disk, read_only)?;
        }
        let at = volume.name.mount_point();
        if let Some(group) = volume.group.filter(|_| !read_only) {
            mounts::give_to_group(&at, group).map_err(VolumeError::Group)?;
        }
        let state = if mounted { "was mounted already" } else { "is mounted" };
        let node = disk.node.display();
        log::line(format_args!("volume {}: {node} {state} at {}", volume.name, at.display()));
        if volume.key.is_none() {
            log::line(format_args!(
                "volume {}: not encrypted: the cloud chose this disk, and reads and writes what is on it; set encrypt_type and key_id",
                volume.name
            ));
        }
        Ok(())
    }

    fn wait_for_disk(&self, volume: &Volume, patience: &dyn Patience) -> Result<Found, Stop> {
        let started = Instant::now();
        // Events may come without end; time limits the wait then.
        let limit = self.settings.delay.saturating_mul(self.settings.attempts);
        let at = volume.name.mount_point();
        let (mut attempts, mut waiting) = (0, false);
        loop {
            let search = discover::find(&self.roots, volume).map_err(VolumeError::Search)?;
            match search.found {
                Some(Found::Unused(_)) | None if self.is_occupied(&at)? => {
                    return Err(VolumeError::OtherMounted(at).into());
                }
                Some(found) => return Ok(found),
                None => {}
            }
            attempts += 1;
            if attempts >= self.settings.attempts || started.elapsed() > limit {
                let (lun, disk_id) = (volume.lun, volume.disk_id.clone());
                let waited = self.settings.delay.saturating_mul(self.settings.attempts.saturating_sub(1));
                return Err(VolumeError::NoDisk { lun, disk_id, waited, refused: search.refused }.into());
            }
            if !std::mem::replace(&mut waiting, true) {
                log::line(format_args!(
                    "volume {}: waiting for its disk, with LUN {}",
                    volume.name, volume.lun
                ));
            }
            match patience.pause(self.settings.delay) {
                Woken::Time => {}
                Woken::Event => attempts -= 1,
                Woken::GivenUp => return Err(Stop::GivenUp),
            }
        }
    }

    fn is_occupied(&self, at: &Path) -> Result<bool, VolumeError> {
        let mounts = mountinfo::read(&self.roots).map_err(VolumeError::Search)?;
        Ok(mountinfo::at(&mounts, at).is_some())
    }

    /// What is on the disk, by several looks if need be, and the open disk.
    fn look(&self, disk: &Device, patience: &dyn Patience) -> Result<(Signature, fs::File), Stop> {
        let node = &disk.node;
        let mut file =
            signature::open_unused(disk).map_err(|cause| VolumeError::Open { node: node.clone(), cause })?;
        let mut looks = 0;
        loop {
            looks += 1;
            match signature::look(node, &mut file) {
                Ok(signature) => return Ok((signature, file)),
                Err(cause) if looks == LOOKS => {
                    return Err(VolumeError::Unsure { node: node.clone(), cause }.into());
                }
                Err(_) if patience.pause(self.settings.look_pause) == Woken::GivenUp => {
                    return Err(Stop::GivenUp);
                }
                Err(_) => {}
            }
        }
    }

    fn mount_plain(&self, volume: &Volume, disk: &Device, patience: &dyn Patience) -> Result<(), Stop> {
        let node = &disk.node;
        let read_only = disk.is_read_only(&self.roots);
        // Held until it is mounted, so that its number can't become another disk's.
        let (signature, _held) = self.look(disk, patience)?;
        let fs = match signature {
            Signature::Nothing if read_only => return Err(VolumeError::EmptyReadOnly(node.clone()).into()),
            Signature::Nothing => {
                log::line(format_args!(
                    "volume {}: {} is empty: making {}",
                    volume.name,
                    node.display(),
                    volume.fs.name()
                ));
                format::make(volume.fs, node).map_err(|cause| VolumeError::Format {
                    fs: volume.fs,
                    node: node.clone(),
                    cause,
                })?;
                volume.fs
            }
            Signature::Of(kind) => {
                let there = FileSystem::parse(&kind).filter(|there| there.is_kin_of(volume.fs));
                there.ok_or_else(|| content(disk, &kind, volume.fs.name()))?
            }
            Signature::PartitionTable => {
                return Err(content(disk, "a partition table", volume.fs.name()).into());
            }
        };
        let at = volume.name.mount_point();
        mounts::make_directory(&at)
            .and_then(|()| mounts::attach(node, fs, &at, read_only))
            .map_err(|cause| VolumeError::Mount { at, cause }.into())
    }

    fn mount_encrypted(
        &self,
        volume: &Volume,
        key: &str,
        disk: &Device,
        patience: &dyn Patience,
    ) -> Result<(), Stop> {
        let (signature, _held) = self.look(disk, patience)?;
        let source = match signature {
            Signature::Nothing if disk.is_read_only(&self.roots) => {
                return Err(VolumeError::EmptyReadOnly(disk.node.clone()).into());
            }
            Signature::Nothing => "empty",
            Signature::Of(kind) if kind == LUKS => "encrypted",
            Signature::Of(kind) => return Err(content(disk, &kind, "LUKS").into()),
            Signature::PartitionTable => return Err(content(disk, "a partition table", "LUKS").into()),
        };
        let at = volume.name.mount_point();
        mounts::make_directory(&at).map_err(|cause| VolumeError::Mount { at: at.clone(), cause })?;
        let request = secure_mount_request(volume, key, disk, source);
        cdh::secure_mount(&self.settings.data_hub, &request).map_err(|error| {
            self.remove_mapping_left_behind(volume);
            error.into()
        })
    }

    /// Checks what the data hub has done: that the volume's mount is there, over this disk, and that the kernel encrypts.
    fn check_encrypted(&self, volume: &Volume, disk: &Device, read_only: bool) -> Result<(), Stop> {
        let at = volume.name.mount_point();
        let mounts = mountinfo::read(&self.roots).map_err(VolumeError::Search)?;
        if !discover::is_mounted(&self.roots, volume, &mounts, disk) {
            let why = format!(
                "{} has no mount of {} over {} here: its unit must share the VM's mounts",
                at.display(),
                volume.name.mapping(),
                disk.node.display()
            );
            return Err(VolumeError::NotAsAsked(why).into());
        }
        let table = self.mappings.table(&volume.name.mapping());
        let why = match table {
            Ok((kind, table)) if kind == "crypt" && is_real_cipher(&table) => None,
            Ok((kind, table)) => {
                let cipher = table.split(' ').next().unwrap_or_default();
                Some(format!(
                    "the mapping {} is {kind} {cipher}, which protects nothing",
                    volume.name.mapping()
                ))
            }
            Err(error) => Some(format!("the mapping {} can't be checked: {error}", volume.name.mapping())),
        };
        if let Some(why) = why {
            let closed = mounts::detach(&at, self.settings.busy);
            self.remove_mapping_left_behind(volume);
            closed.map_err(|cause| VolumeError::Mount { at, cause })?;
            return Err(VolumeError::NotAsAsked(why).into());
        }
        mounts::restrict(&at, read_only).map_err(|cause| VolumeError::Mount { at, cause }.into())
    }

    /// Removes the mapping of a volume that is not mounted, so that the next attempt can make it.
    fn remove_mapping_left_behind(&self, volume: &Volume) {
        let mapping = volume.name.mapping();
        match self.mappings.remove(&mapping, true) {
            Ok(()) => {
                log::line(format_args!("volume {}: closed {mapping}, which was left behind", volume.name))
            }
            // None was made, or there is no device mapper to make one.
            Err(error) if is_absent(&error) => {}
            Err(error) => log::line(format_args!("volume {}: closing {mapping}: {error}", volume.name)),
        }
    }

    /// Unmounts all volumes, the last one first, and closes their mappings.
    ///
    /// # Errors
    /// The first fault; the other volumes are unmounted all the same.
    pub fn unmount_all(&self) -> Result<(), RequestError> {
        let mounts = mountinfo::read(&self.roots).map_err(RequestError::Mounts)?;
        let ours = mounts
            .iter()
            .rev()
            .filter(|mount| mount.at.starts_with(DIRECTORY) && mount.at != Path::new(DIRECTORY));
        let mut result = Ok(());
        for mount in ours {
            let at = mount.at.clone();
            match mounts::detach(&at, self.settings.busy) {
                Ok(Unmounted::Fully) => log::line(format_args!("{} is unmounted", at.display())),
                Ok(Unmounted::Lazily) => log::line(format_args!(
                    "{} is still in use: detached, and closed once its last user ends",
                    at.display()
                )),
                Err(cause) => keep_first(&mut result, RequestError::Unmount { at, cause }),
            }
        }
        for name in block::names(&self.roots).map_err(RequestError::Mounts)? {
            let mapping =
                block::mapping_named(&self.roots, &name).filter(|name| name.starts_with(MAPPING_PREFIX));
            if let Some(mapping) = mapping
                && let Err(cause) = self.close(&mapping)
            {
                keep_first(&mut result, RequestError::Unmount { at: mapping.into(), cause });
            }
        }
        remove_directories();
        result
    }

    fn close(&self, mapping: &str) -> io::Result<()> {
        let is_busy = |error: &io::Error| error.raw_os_error() == Some(Errno::EBUSY as i32);
        for _ in 0..self.settings.busy.attempts {
            match self.mappings.remove(mapping, false) {
                Err(error) if is_busy(&error) => sleep(self.settings.busy.pause),
                Err(error) if is_absent(&error) => return Ok(()),
                result => return result,
            }
        }
        log::line(format_args!("{mapping} is still in use: it is closed once its last user ends"));
        self.mappings.remove(mapping, true)
    }
}

fn keep_first(result: &mut Result<(), RequestError>, error: RequestError) {
    if result.is_ok() {
        *result = Err(error);
    } else {
        log::line(format_args!("{}", crate::failure::chain(&error)));
    }
}

/// Removes the volumes' directories; one that a lazy unmount left in use is kept.
fn remove_directories() {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if let Err(error) = fs::remove_dir(&path) {
            log::line(format_args!("removing {}: {error}", path.display()));
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(code) if code == Errno::ENXIO as i32 || code == Errno::ENOENT as i32)
}

fn content(disk: &Device, there: &str, wanted: &'static str) -> VolumeError {
    VolumeError::Content { node: disk.node.clone(), there: there.to_owned(), wanted }
}

/// Whether a table of dm-crypt encrypts: LUKS2 allows a header, which is the disk's word, to ask for the null cipher.
fn is_real_cipher(table: &str) -> bool {
    let cipher = table.split(' ').next().unwrap_or_default();
    let known = cipher.starts_with("aes-xts-") || cipher.starts_with("capi:") && cipher.contains("xts(aes)");
    known && !cipher.contains("null")
}

fn secure_mount_request(volume: &Volume, key: &str, disk: &Device, source: &str) -> SecureMount {
    let options = [
        ("devicePath", disk.node.to_string_lossy().into_owned()),
        ("sourceType", source.to_owned()),
        ("targetType", "fileSystem".to_owned()),
        ("encryptionType", "luks2".to_owned()),
        ("filesystemType", volume.fs.name().to_owned()),
        ("key", format!("kbs:///{key}")),
        ("mapperName", volume.name.mapping()),
    ];
    SecureMount {
        volume_type: "block-device".to_owned(),
        options: options
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect::<BTreeMap<_, _>>(),
        flags: Vec::new(),
        mount_point: volume.name.mount_point().to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::is_real_cipher;

    #[test]
    fn the_null_cipher_is_no_encryption() {
        for table in [
            "aes-xts-plain64 :64:logon:cryptsetup:u-d0 0 254:16 32768",
            "capi:authenc(hmac(sha256),xts(aes))-random k 0",
        ] {
            assert!(is_real_cipher(table), "{table}");
        }
        for table in [
            "",
            "cipher_null-ecb - 0 254:16 0",
            "null 0",
            "capi:ecb(cipher_null)-null k",
            "aes-ecb k",
            "aes-xts-null k",
        ] {
            assert!(!is_real_cipher(table), "{table}");
        }
    }
}
