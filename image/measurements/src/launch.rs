//! The launch digest of a confidential VM: of its firmware, and of the kernel, the initrd and the command line where the host boots
//! them directly.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::boot::Uki;

/// Program that computes it, from the package of that name (<https://github.com/virtee/sev-snp-measure>).
const PROGRAM: &str = "sev-snp-measure";
/// Where the error's command installs it.
const ENVIRONMENT: &str = "cache/sev-snp-measure";

/// A virtual machine with SEV-SNP, as its host starts it.
#[derive(Clone, Debug)]
pub struct SnpMachine {
    /// The firmware; for a direct boot it must have a table for the hashes of the kernel, the initrd and the command line (OVMF's
    /// AmdSev).
    pub firmware: PathBuf,
    /// Number of processors.
    pub processors: u32,
    /// Their type, as qemu names it.
    pub processor: String,
    /// SEV features of the VM's save area.
    pub guest_features: u64,
    /// The host boots the UKI's parts directly. Else the firmware boots a disk, which the launch digest does not cover.
    pub direct: bool,
}

/// Why there is no launch digest.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No such program.
    #[error(
        "no {PROGRAM} in PATH or {ENVIRONMENT}/bin: python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install {PROGRAM}"
    )]
    Missing,
    /// It could not be run, or a file for it could not be written.
    #[error("running {PROGRAM}")]
    Run(#[source] io::Error),
    /// It refused.
    #[error("{PROGRAM}: {0}")]
    Refused(String),
}

/// The launch digest of `machine`, in hex; of the parts of `uki` only with a direct boot.
///
/// # Errors
/// If sev-snp-measure is not installed, or refuses.
pub fn snp(machine: &SnpMachine, uki: &Uki<'_>) -> Result<String, LaunchError> {
    let parts = Parts::write(uki).map_err(LaunchError::Run)?;
    let mut command = Command::new(program()?);
    command
        .args(["--mode", "snp", "--output-format", "hex", "--vcpu-type", &machine.processor])
        .arg(format!("--vcpus={}", machine.processors))
        .arg(format!("--guest-features={:#x}", machine.guest_features))
        .arg("--ovmf")
        .arg(&machine.firmware);
    if machine.direct {
        command.arg("--kernel").arg(parts.directory.join("kernel"));
        command.arg("--initrd").arg(parts.directory.join("initrd"));
        command.arg("--append").arg(&uki.command_line);
    }
    let output = command.output().map_err(LaunchError::Run)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(LaunchError::Refused(said.lines().last().unwrap_or("no cause given").to_owned()));
    }
    let digest = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if digest.len() != 96 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(LaunchError::Refused(format!("not a digest: {digest}")));
    }
    Ok(digest)
}

fn program() -> Result<PathBuf, LaunchError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(ENVIRONMENT).join("bin");
    let mut directories = std::env::split_paths(&path).chain([top]);
    directories
        .find_map(|directory| Some(directory.join(PROGRAM)).filter(|file| file.is_file()))
        .ok_or(LaunchError::Missing)
}

/// The kernel and the initrd as files; removed when dropped.
struct Parts {
    directory: PathBuf,
}

impl Parts {
    fn write(uki: &Uki<'_>) -> io::Result<Self> {
        let directory = std::env::temp_dir().join(format!("podvm-measure-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        let parts = Self { directory };
        std::fs::write(parts.directory.join("kernel"), &uki.kernel)?;
        std::fs::write(parts.directory.join("initrd"), &uki.section_initrd)?;
        Ok(parts)
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // Files of this process in the directory for such files: nothing depends on their removal.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
