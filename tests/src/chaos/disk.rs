//! A small disk for one process, which can be full or read-only.

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Enough for the keys of a pod, in bytes.
const OPTIONS: &str = "size=128k,mode=0700";
const BALLAST: &str = "ballast";
/// Retries while a file on the disk is being written: until then it can't become read-only.
const BUSY_TRIES: usize = 500;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// A tmpfs; unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounts it on a new directory.
    ///
    /// # Errors
    /// If this process is not root.
    pub fn mount(path: PathBuf) -> Result<Self> {
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(OPTIONS))
            .with_context(|| format!("mounting a tmpfs on {}; this needs root", path.display()))?;
        Ok(Self { path })
    }

    /// The directory it is mounted on.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills the disk.
    ///
    /// # Errors
    /// If writing fails for another reason than a full disk.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = std::fs::File::create(self.path.join(BALLAST))?;
        loop {
            match ballast.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("filling a disk"),
            }
        }
    }

    /// Removes what [`Disk::fill`] wrote.
    ///
    /// # Errors
    /// If the disk was not filled.
    pub fn empty(&self) -> Result<()> {
        std::fs::remove_file(self.path.join(BALLAST)).context("making room on a disk")
    }

    /// Removes every file, except what fills the disk.
    ///
    /// # Errors
    /// If a file can't be removed.
    pub fn wipe(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            // The file that fills the disk stays.
            if path.file_name().is_some_and(|name| name != BALLAST) {
                if path.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
            }
        }
        Ok(())
    }

    /// Makes the disk writable or read-only.
    ///
    /// # Errors
    /// If a file on it is open for writing all the time.
    pub async fn writable(&self, yes: bool) -> Result<()> {
        let flags = MsFlags::MS_REMOUNT | if yes { MsFlags::empty() } else { MsFlags::MS_RDONLY };
        for _ in 0..BUSY_TRIES {
            match mount(None::<&str>, &self.path, None::<&str>, flags, None::<&str>) {
                Err(nix::errno::Errno::EBUSY) => tokio::time::sleep(BUSY_PAUSE).await,
                done => return done.context("remounting a disk"),
            }
        }
        anyhow::bail!("{}: busy", self.path.display())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The directory can't be removed while it is mounted; the test reports that.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_is_full_or_read_only_as_asked_and_gone_when_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::mount(directory.path().join("disk")).unwrap();
        let file = disk.path().join("file");
        disk.fill().unwrap();
        assert_eq!(std::fs::write(&file, [1; 8192]).unwrap_err().kind(), ErrorKind::StorageFull);
        disk.empty().unwrap();
        disk.writable(false).await.unwrap();
        assert_eq!(std::fs::write(&file, [1]).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        disk.writable(true).await.unwrap();
        std::fs::write(&file, [1; 8192]).unwrap();
        disk.wipe().unwrap();
        assert!(!file.exists());
        let path = disk.path().to_owned();
        drop(disk);
        std::fs::remove_dir(path).unwrap();
    }
}
