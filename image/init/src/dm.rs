//! The verity device, made by the kernel's device mapper.

#[expect(unsafe_code, reason = "nix does not wrap the ioctl of the device mapper")]
mod ioctl;
mod message;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::failure::{Context, Failure};
use message::{Command, Message};

/// Name of the device in the device mapper; udev links it as /dev/mapper/root.
const NAME: &str = "root";
/// Control device of the device mapper.
const CONTROL: &str = "/dev/mapper/control";

/// The verity device of the root.
pub struct Verity {
    control: File,
}

impl Verity {
    /// Makes the device from its table (see [`crate::table`]) over `bytes` bytes; returns it and the path of its node.
    ///
    /// # Errors
    /// The device mapper refuses a step.
    pub fn create(table: &str, bytes: u64) -> Result<(Self, PathBuf), Failure> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open(CONTROL)
            .context(|| format!("opening {CONTROL} (is dm-verity among the modules?)"))?;
        let mut created = Message::new(NAME);
        ioctl::call(&control, Command::Create, &mut created).context(|| "creating the verity device")?;
        let mut load = Message::new(NAME)
            .with_target("verity", bytes / 512, table)
            .ok_or_else(|| Failure::new("describing the verity device", "its table is too long"))?;
        ioctl::call(&control, Command::LoadTable, &mut load)
            .context(|| format!("loading the verity table \"{table}\" (the kernel said why, above)"))?;
        ioctl::call(&control, Command::Resume, &mut Message::new(NAME))
            .context(|| "starting the verity device")?;
        Ok((Self { control }, PathBuf::from(format!("/dev/dm-{}", created.minor()))))
    }

    /// Takes an open /dev/mapper/control that another process passed on.
    pub fn inherited(control: OwnedFd) -> Self {
        Self { control: control.into() }
    }

    /// Whether every block read so far matched the root hash. (The kernel reports `V` for verified, `C` for
    /// corruption.)
    ///
    /// # Errors
    /// The device mapper does not answer.
    pub fn is_intact(&self) -> Result<bool, Failure> {
        let mut status = Message::new(NAME);
        ioctl::call(&self.control, Command::Status, &mut status)
            .context(|| "asking for the root's status")?;
        Ok(status.status() == Some(b'V'))
    }

    /// The control device, to pass to another process.
    pub fn into_control(self) -> OwnedFd {
        self.control.into()
    }
}
