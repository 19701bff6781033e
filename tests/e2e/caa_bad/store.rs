//! The store's disk is full or read-only.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use secure_comms_tests::harness::caa_node::{CaaNode, NodeOptions};
use secure_comms_tests::harness::scene::PATIENCE;

use crate::{BLOCK, Scene};

/// A small file system; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn at(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=512k,mode=0700"))
            .with_context(|| format!("mounting at {}: needs root", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    fn read_only(&self, read_only: bool) -> Result<()> {
        let flags = MsFlags::MS_REMOUNT | if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some("size=512k,mode=0700"))?;
        Ok(())
    }

    /// Fills it, or makes room again.
    fn full(&self, full: bool) -> Result<()> {
        let file = self.0.join("filler");
        if !full {
            return Ok(std::fs::remove_file(file)?);
        }
        let mut filler = std::fs::File::create(file)?;
        while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}: unmount it by hand", self.0.display());
        }
    }
}

/// A pod waits, with the reason in the log, until the store can be written.
async fn a_pod_waits(reason: &str, fault: impl Fn(&Disk, bool) -> Result<()>) -> Result<()> {
    let node = CaaNode::new(NodeOptions { proxy_timeout: PATIENCE, ..NodeOptions::default() }).await?;
    let disk = Disk::at(&node.path("store"))?;
    let scene = Scene::on(node).await?;
    let test = async {
        fault(&disk, true)?;
        let mark = scene.serve.mark();
        let shim = scene.node.shim("waits")?;
        let agent = shim.create_vm().await?;
        let starting = scene.node.start(&shim).await?;
        scene.says(mark, Some(&shim), reason).await?;
        ensure!(!scene.node.stored(&shim.id), "something was stored");
        fault(&disk, false)?;
        starting.started().await?;
        let mut runtime = shim.connect(&agent).await?;
        runtime.exchange(BLOCK).await?;
        shim.end(runtime).await?;
        scene.node.forgets(&shim.id).await
    };
    scene.within(test).await?;
    scene.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_waits_until_a_full_disk_has_room() -> Result<()> {
    a_pod_waits("No space left on device", Disk::full).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_waits_until_a_read_only_store_is_writable() -> Result<()> {
    a_pod_waits("Read-only file system", Disk::read_only).await
}
