//! The end of all volumes.

use std::fs;
use std::io;
use std::path::Path;
use std::thread::sleep;

use nix::errno::Errno;

use super::{Volumes, is_absent};
use crate::block;
use crate::failure::{RequestError, chain};
use crate::log;
use crate::mountinfo::{self, Mount};
use crate::mounts::{self, Unmounted};
use crate::volume::{DIRECTORY, MAPPING_PREFIX};

impl Volumes {
    /// Unmounts all volumes, the last one first, and closes their mappings.
    ///
    /// # Errors
    /// The first fault; the other volumes are unmounted all the same.
    pub fn unmount_all(&self) -> Result<(), RequestError> {
        let mounts = mountinfo::read(&self.roots).map_err(RequestError::Mounts)?;
        let is_ours = |mount: &&Mount| mount.at.starts_with(DIRECTORY) && mount.at != Path::new(DIRECTORY);
        let ours: Vec<&Mount> = mounts.iter().rev().filter(is_ours).collect();
        let mut result = Ok(());
        // All of them first: one that is in use may take the time that the others have, and the VM is deleted afterwards.
        for mount in &ours {
            if let Err(cause) = mounts::flush(&mount.at) {
                keep_first(&mut result, RequestError::Flush { at: mount.at.clone(), cause });
            }
        }
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
        log::line(format_args!("{}", chain(&error)));
    }
}

/// Removes the volumes' directories; one that a lazy unmount left in use is kept.
fn remove_directories() {
    // Not where a link leads: the directories there are not the volumes'.
    let entries = mounts::is_directory(Path::new(DIRECTORY))
        .and_then(|there| if there { fs::read_dir(DIRECTORY).map(Some) } else { Ok(None) });
    let entries = match entries {
        Ok(entries) => entries.into_iter().flatten(),
        Err(error) => return log::line(format_args!("removing the volumes' directories: {error}")),
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if let Err(error) = fs::remove_dir(&path) {
            log::line(format_args!("removing {}: {error}", path.display()));
        }
    }
}
