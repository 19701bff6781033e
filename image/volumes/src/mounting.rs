//! Requests, carried out: what is mounted already counts, so a request can be repeated, also after a restart.

mod encrypted;
mod unmounting;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use secure_comms_protocol::volumes;

use crate::block::Device;
use crate::cdh;
use crate::discover::{self, Found};
use crate::failure::{RequestError, VolumeError};
use crate::format;
use crate::log;
use crate::mappings::Mappings;
use crate::mountinfo;
use crate::mounts::{self, BusyLimit};
use crate::roots::Roots;
use crate::signature::{self, Signature, Unsure};
use crate::volume::{self, FileSystem, Volume};

/// How often a disk is looked at before it counts as unclear.
const LOOKS: u32 = 3;

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
            // The one before may have taken minutes.
            if !paths.is_empty() && patience.pause(Duration::ZERO) == Woken::GivenUp {
                return Err(RequestError::GivenUp);
            }
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
                "volume {}: not encrypted: the cloud chose this disk, and reads and writes what is on it; set \
                 encrypt_type and key_id",
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
                // Data do not become zeros by another look.
                Err(cause) if looks == LOOKS || matches!(cause, Unsure::Data(_)) => {
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
}

fn content(disk: &Device, there: &str, wanted: &'static str) -> VolumeError {
    VolumeError::Content { node: disk.node.clone(), there: there.to_owned(), wanted }
}

/// Whether a mapping is not there, or no device mapper that could have one.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(code) if code == Errno::ENXIO as i32 || code == Errno::ENOENT as i32)
}
