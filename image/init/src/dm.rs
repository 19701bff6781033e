//! The verity device, made by the kernel's device mapper.

#[expect(unsafe_code, reason = "the device mapper is spoken to by an ioctl that nix does not wrap")]
mod ioctl;
mod message;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::failure::{Context, Failure};
use message::{Command, Message};

/// Its name in the device mapper, /dev/mapper/root if udev makes links.
const NAME: &str = "root";
/// The device mapper's door.
const CONTROL: &str = "/dev/mapper/control";

/// The verified root.
pub struct Verity {
    control: File,
}

impl Verity {
    /// Makes the device from its table (see `table`), over that many bytes; its node.
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

    /// The device that an open /dev/mapper/control leads to, in another process.
    pub fn inherited(control: OwnedFd) -> Self {
        Self { control: control.into() }
    }

    /// Has a block been read that does not match the root hash? (`V` is verified so far, `C` is corruption found.)
    pub fn is_intact(&self) -> Result<bool, Failure> {
        let mut status = Message::new(NAME);
        ioctl::call(&self.control, Command::Status, &mut status)
            .context(|| "asking for the root's status")?;
        Ok(status.status() == Some(b'V'))
    }

    /// To hand to another process.
    pub fn into_control(self) -> OwnedFd {
        self.control.into()
    }
}
