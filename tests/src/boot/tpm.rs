//! A TPM 2.0 in software, for one machine.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::harness::process::Child;
use crate::harness::scene::PATIENCE;

/// Starts a TPM with its state in `directory`, and adds it to the machine of `command`.
pub(super) async fn start(directory: &Path, command: &mut Command) -> Result<Child> {
    let socket = directory.join("tpm.sock");
    let mut swtpm = Command::new("swtpm");
    swtpm
        .args(["socket", "--tpm2", "--tpmstate"])
        .arg(format!("dir={}", directory.display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,path={}", socket.display()));
    let mut swtpm = Child::spawn("swtpm", swtpm).context("is swtpm installed?")?;
    let start = Instant::now();
    while !socket.exists() {
        // swtpm prints nothing once it listens.
        if let Ok(status) = swtpm.wait_exit(Duration::from_millis(20)).await {
            anyhow::bail!("swtpm ended with {status}: {}", swtpm.log());
        }
        anyhow::ensure!(start.elapsed() < PATIENCE, "swtpm does not listen");
        sleep(Duration::from_millis(20)).await;
    }
    command.arg("-chardev").arg(format!("socket,id=tpm,path={}", socket.display())).args([
        "-tpmdev",
        "emulator,id=tpm0,chardev=tpm",
        "-device",
        "tpm-tis,tpmdev=tpm0",
    ]);
    Ok(swtpm)
}
