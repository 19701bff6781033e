//! Where the TPM is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::OFlag;

use super::PcrError;

/// The largest answer of a TPM, as the kernel has it.
const ANSWER_MAX: usize = 4096;

/// Something that answers TPM 2.0 commands.
pub trait Tpm {
    /// Sends one command and returns its answer.
    ///
    /// # Errors
    /// The command may have been run all the same.
    fn transact(&mut self, command: &[u8]) -> io::Result<Vec<u8>>;

    /// Waits before a command is sent again.
    fn pause(&mut self, pause: Duration) {
        std::thread::sleep(pause);
    }
}

/// Where the kernel shows TPMs.
#[derive(Clone, Debug)]
pub struct System {
    /// The TPMs that have a driver; empty or missing without any.
    pub class: PathBuf,
    /// There if the firmware announces a TPM 2.0.
    pub acpi_table: PathBuf,
    /// The kernel's resource manager: it is shared with the attestation agent.
    pub device: PathBuf,
    /// How often to look for a TPM that the firmware announces, and how long to wait in between.
    pub looks: u32,
    /// See `looks`.
    pub pause: Duration,
}

impl Default for System {
    fn default() -> Self {
        Self {
            class: "/sys/class/tpm".into(),
            acpi_table: "/sys/firmware/acpi/tables/TPM2".into(),
            device: "/dev/tpmrm0".into(),
            looks: 101,
            pause: Duration::from_millis(100),
        }
    }
}

impl System {
    /// Opens the TPM; `None` if the VM has none and `required` is false.
    ///
    /// # Errors
    /// There is one, or one is required, but it can't be opened.
    pub(super) fn open(&self, required: bool) -> Result<Option<Device>, PcrError> {
        if !required && !self.is_there()? {
            return Ok(None);
        }
        for look in 0..self.looks {
            if look > 0 {
                std::thread::sleep(self.pause);
            }
            if let Some(device) = self.open_device()? {
                return Ok(Some(device));
            }
        }
        if self.is_there()? { Err(PcrError::NoDevice(self.device.clone())) } else { Err(PcrError::Required) }
    }

    /// A driver may still be loading while the firmware announces its TPM.
    fn is_there(&self) -> Result<bool, PcrError> {
        Ok(self.has_driver()? || self.is_announced()?)
    }

    fn has_driver(&self) -> Result<bool, PcrError> {
        let failed = |cause| PcrError::Look { path: self.class.clone(), cause };
        match std::fs::read_dir(&self.class) {
            Ok(mut entries) => Ok(entries.next().transpose().map_err(failed)?.is_some()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn is_announced(&self) -> Result<bool, PcrError> {
        self.acpi_table.try_exists().map_err(|cause| PcrError::Look { path: self.acpi_table.clone(), cause })
    }

    fn open_device(&self) -> Result<Option<Device>, PcrError> {
        let failed = |cause| PcrError::Open { path: self.device.clone(), cause };
        let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file =
            match OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(&self.device) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
        if !file.metadata().map_err(failed)?.file_type().is_char_device() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a character device")));
        }
        Ok(Some(Device(file)))
    }
}

/// A TPM behind a device of the kernel. Each command is one write, each answer one read; the kernel limits how long it waits.
#[derive(Debug)]
pub struct Device(File);

impl Tpm for Device {
    fn transact(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.0.write_all(command)?;
        let mut answer = vec![0; ANSWER_MAX];
        loop {
            match self.0.read(&mut answer) {
                Ok(length) => {
                    answer.truncate(length);
                    return Ok(answer);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
