//! A virtual machine under qemu.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::{Mutex, MutexGuard};

use super::user_data::METADATA_FILE;
use super::{Artifacts, HostCredentials, UserData, artifacts, firmware, tpm};
use crate::harness::process::Child;
use crate::harness::scene::PATIENCE;

/// qemu emulates on all processors: two machines at a time would not be faster.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Permission to run a machine. To be acquired before any process starts whose timeout would run while it waits.
#[derive(Debug)]
pub struct MachinePermit(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl MachinePermit {
    /// Waits until no other machine runs.
    pub async fn take() -> Self {
        Self(ONE_AT_A_TIME.lock().await)
    }
}

/// What a machine boots.
#[derive(Clone, Debug)]
pub enum Boot {
    /// The initramfs without systemd.
    Bare,
    /// The root as one cpio, with systemd.
    Fast,
    /// The disk (the artifact, or a changed copy), by OVMF and the UKI on it.
    Disk(Option<PathBuf>),
    /// Kernel and initrd given to qemu, with the disk and this root hash.
    Direct {
        /// Root hash on the command line of the kernel.
        root_hash: String,
        /// A word of the command line that is left out.
        without: Option<&'static str>,
    },
}

/// Platform of a machine that boots its disk by firmware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Platform {
    /// Neither Secure Boot nor a TPM.
    #[default]
    Plain,
    /// Secure Boot, with the public test key of Debian's OVMF in its db, and a TPM 2.0.
    SecureBoot,
    /// A TPM 2.0.
    Tpm,
}

/// What the root and a seed with user data are attached to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bus {
    /// Disks of virtio.
    #[default]
    Virtio,
    /// A SATA disk and a SATA CD-ROM, as in cloud-api-adaptor's libvirt domains.
    Sata,
}

impl Bus {
    /// qemu's device for the root's drive.
    fn root(self, drive: &str) -> String {
        match self {
            Self::Virtio => format!("virtio-blk-pci,drive={drive}"),
            // On a port of the AHCI controller that q35 has.
            Self::Sata => format!("ide-hd,bus=ide.0,drive={drive}"),
        }
    }

    /// qemu's device for the seed's drive.
    pub(super) fn seed(self, drive: &str) -> String {
        match self {
            Self::Virtio => format!("virtio-blk-pci,drive={drive}"),
            Self::Sata => format!("ide-cd,bus=ide.1,drive={drive}"),
        }
    }
}

/// Options of a machine.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// Name of its log.
    pub name: &'static str,
    /// What it boots.
    pub boot: Boot,
    /// Its platform.
    pub platform: Platform,
    /// What its root and its seed are attached to.
    pub bus: Bus,
    /// Port of the host that is forwarded to the guest's port 2222.
    pub ssh: SocketAddr,
    /// Source of its apf.json.
    pub user_data: UserData,
    /// What a hostile host hands to its systemd.
    pub host: HostCredentials,
    /// Further disks, after the root.
    pub disks: Vec<DataDisk>,
    /// A reboot ends the machine.
    pub no_reboot: bool,
}

/// A disk with data.
#[derive(Clone, Debug)]
pub struct DataDisk {
    /// Its content, raw.
    pub file: PathBuf,
    /// Its serial number.
    pub serial: &'static str,
}

impl DataDisk {
    fn arguments(&self) -> [String; 4] {
        let serial = self.serial;
        let drive = format!("if=none,id={serial},format=raw,file={}", self.file.display());
        let device = format!("virtio-blk-pci,drive={serial},serial={serial}");
        ["-drive".to_owned(), drive, "-device".to_owned(), device]
    }
}

impl MachineOptions {
    /// A machine whose host is not hostile, and which may reboot.
    pub fn new(name: &'static str, boot: Boot, ssh: SocketAddr, user_data: UserData) -> Self {
        let (platform, bus, host) = (Platform::default(), Bus::default(), HostCredentials::None);
        Self { name, boot, platform, bus, ssh, user_data, host, disks: Vec::new(), no_reboot: false }
    }
}

/// A running machine; killed when dropped. Its console log is kept unless [`Machine::passed`] was called.
#[derive(Debug)]
pub struct Machine {
    name: &'static str,
    ssh: SocketAddr,
    passed: bool,
    /// Its console.
    pub console: Child,
    _tpm: Option<Child>,
    directory: TempDir,
    _permit: MachinePermit,
}

impl Machine {
    /// Starts a machine.
    ///
    /// # Errors
    /// If something that it needs does not exist.
    pub async fn start(permit: MachinePermit, options: &MachineOptions) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("secure-comms-boot-").tempdir()?;
        let mut command = Command::new("qemu-system-x86_64");
        let more = options.user_data.network(directory.path(), &artifacts()?)?;
        let forward = format!("user,id=net,restrict=on,hostfwd=tcp:{}-:2222{more}", options.ssh);
        // Without an option ROM: the network card is not booted from.
        command
            .args([
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-machine",
                machine(options.platform),
                "-smp",
                "2",
                "-m",
                "1024",
            ])
            .args(["-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args(["-netdev", &forward, "-device", "virtio-net-pci,netdev=net,romfile="])
            .args(options.host.arguments(directory.path())?)
            // In the order in which the guest numbers them.
            .args(boot_arguments(options, &artifacts()?, directory.path())?)
            .args(options.disks.iter().flat_map(DataDisk::arguments))
            .args(options.user_data.arguments(options.bus, directory.path())?);
        let tpm = match options.platform {
            Platform::Tpm | Platform::SecureBoot => Some(tpm::start(directory.path(), &mut command).await?),
            Platform::Plain => None,
        };
        if options.no_reboot {
            command.arg("-no-reboot");
        }
        let console = Child::spawn("console", command)
            .context("qemu: is qemu-system-x86 installed? tests/install-deps does it")?;
        Ok(Self {
            name: options.name,
            ssh: options.ssh,
            passed: false,
            console,
            _tpm: tpm,
            directory,
            _permit: permit,
        })
    }

    /// Waits until the console prints `text`, after the first `mark` lines.
    ///
    /// # Errors
    /// If it does not, or the machine ends.
    pub async fn says_after(&self, mark: usize, text: &str) -> Result<String> {
        let said = self.console.wait_from(mark, |line| line.contains(text), PATIENCE).await;
        said.with_context(|| format!("{}: waiting for {text:?} on the console", self.name))
    }

    /// Replaces what the metadata service answers.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn set_user_data(&self, text: &[u8]) -> Result<()> {
        let file = self.directory.path().join(METADATA_FILE);
        let new = file.with_extension("new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &file))
            .context("writing the user data")
    }

    /// Waits until the machine ends; returns whether an SSH server answered before.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn ends_without_serving(&mut self) -> Result<(ExitStatus, bool)> {
        let ssh = self.ssh;
        let served = tokio::spawn(async move {
            // qemu accepts the connection; only bytes from the guest prove a server.
            loop {
                if greeting(ssh).await.is_ok_and(|greeting| greeting.starts_with(b"SSH-")) {
                    return;
                }
                // No event shows when the guest begins to listen; aborted once the machine has ended.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let ended = self.console.wait_exit(PATIENCE).await;
        let answered = served.is_finished();
        served.abort();
        Ok((ended?, answered))
    }

    /// Marks the test as passed: the log is not kept.
    pub fn passed(mut self) {
        self.passed = true;
    }

    fn keep_log(&self) -> Result<PathBuf> {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("finding the source tree")?;
        let directory = top.join("target/boot-logs");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{}.log", self.name));
        std::fs::write(&path, self.console.log())?;
        Ok(path)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.passed {
            return;
        }
        match self.keep_log() {
            Ok(path) => eprintln!("{}: the console's log is in {}", self.name, path.display()),
            Err(error) => eprintln!("{}: keeping the console's log: {error:#}", self.name),
        }
    }
}

async fn greeting(ssh: SocketAddr) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 256];
    let mut stream = TcpStream::connect(ssh).await?;
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut bytes)).await??;
    bytes.truncate(read);
    Ok(bytes)
}

fn machine(platform: Platform) -> &'static str {
    match platform {
        // Only system management mode may change the keys of the firmware.
        Platform::SecureBoot => "q35,smm=on",
        Platform::Plain | Platform::Tpm => "q35",
    }
}

fn boot_arguments(options: &MachineOptions, artifacts: &Artifacts, directory: &Path) -> Result<Vec<String>> {
    let text = |path: PathBuf| path.display().to_string();
    let kernel = |initrd: &str, append: String| -> Result<Vec<String>> {
        let (kernel, initrd) = (artifacts.file("podvm.vmlinuz")?, artifacts.file(initrd)?);
        let arguments =
            ["-kernel".into(), text(kernel), "-initrd".into(), text(initrd), "-append".into(), append];
        Ok(arguments.into())
    };
    let disk = |path: PathBuf| {
        let drive = format!("if=none,id=disk,format=raw,snapshot=on,file={}", path.display());
        ["-drive".to_owned(), drive, "-device".to_owned(), options.bus.root("disk")]
    };
    Ok(match &options.boot {
        Boot::Bare => kernel("bare.cpio", artifacts.command_line(None, None)?)?,
        Boot::Fast => kernel("podvm-fast.cpio", artifacts.command_line(None, None)?)?,
        Boot::Direct { root_hash, without } => {
            let command_line = artifacts.command_line(Some(root_hash), *without)?;
            let mut arguments = kernel("podvm.initrd", command_line)?;
            arguments.extend(disk(artifacts.file("podvm.raw")?));
            arguments
        }
        Boot::Disk(changed) => {
            let path = changed.clone().map_or_else(|| artifacts.file("podvm.raw"), Ok)?;
            let mut arguments = Vec::from(disk(path));
            arguments.extend(firmware::arguments(options.platform, directory)?);
            arguments
        }
    })
}
