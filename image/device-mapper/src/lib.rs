//! What `init` and `podvm-volumes` share of block devices: the kernel's device mapper (devices of one target each), its
//! [`partitions`], and the disk's own table of them ([`gpt`]).
//!
//! The ioctls that no crate wraps safely are here. A well-kept crate
//! (`devicemapper`) links libdevmapper or brings a hundred times this code; a static program can't use the first, and
//! the initrd's `init` not the second.

pub mod gpt;
#[expect(unsafe_code, reason = "nix wraps neither the ioctl of the device mapper nor that of partitions")]
mod ioctl;
mod message;
pub mod partitions;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;

use zeroize::Zeroizing;

use message::{Command, Flags, Message};

/// Control device of the device mapper.
pub const CONTROL: &str = "/dev/mapper/control";
/// Longest name of a device, in bytes.
pub const NAME_MAX: usize = message::NAME - 1;

/// The open control device.
#[derive(Debug)]
pub struct DeviceMapper {
    control: File,
}

/// What a device does with its sectors.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Type of the target, such as `verity`.
    pub kind: &'a str,
    /// Size of the device, in sectors of 512 bytes.
    pub sectors: u64,
    /// The target's own arguments.
    pub table: &'a str,
    /// Whether the device is read-only.
    pub read_only: bool,
    /// Whether the table has a secret: the kernel then clears its copy of the message too.
    pub secret: bool,
}

impl DeviceMapper {
    /// Opens [`CONTROL`].
    ///
    /// # Errors
    /// It is not there (no kernel module has registered it) or may not be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Self { control: OpenOptions::new().read(true).write(true).open(CONTROL)? })
    }

    /// Takes an open control device, such as one that another process passed on.
    #[must_use]
    pub fn from_control(control: OwnedFd) -> Self {
        Self { control: control.into() }
    }

    /// The control device, to pass to another process.
    #[must_use]
    pub fn into_control(self) -> OwnedFd {
        self.control.into()
    }

    /// Makes a device without a table; returns its minor number, N of /dev/dm-N.
    ///
    /// # Errors
    /// A device of this name exists (EBUSY), or the kernel refuses.
    pub fn create(&self, name: &str, read_only: bool) -> io::Result<u32> {
        let mut message = Message::new(name, Flags { read_only, ..Flags::default() })?;
        self.call(Command::Create, &mut message)?;
        Ok(message.minor())
    }

    /// Loads a table for the device; [`Self::resume`] makes it the live one.
    ///
    /// # Errors
    /// The table is too long (InvalidInput) or the kernel refuses it; its log says why.
    pub fn load(&self, name: &str, target: &Target<'_>) -> io::Result<()> {
        let flags = Flags { read_only: target.read_only, secret: target.secret, ..Flags::default() };
        let mut message = Message::new(name, flags)?;
        message.add_target(target)?;
        self.call(Command::LoadTable, &mut message)
    }

    /// Makes the loaded table the live one.
    ///
    /// # Errors
    /// No device of this name is there, or the kernel refuses.
    pub fn resume(&self, name: &str, read_only: bool) -> io::Result<()> {
        self.call(Command::Resume, &mut Message::new(name, Flags { read_only, ..Flags::default() })?)
    }

    /// The first byte of the device's status, in the target's own terms.
    ///
    /// # Errors
    /// No device of this name is there, or it has no live table.
    pub fn status(&self, name: &str) -> io::Result<Option<u8>> {
        // Read-only, as the flags of a status have no meaning to the kernel, and `init` has always set this one.
        let mut message = Message::new(name, Flags { read_only: true, ..Flags::default() })?;
        self.call(Command::Status, &mut message)?;
        Ok(message.status())
    }

    /// Type and arguments of the device's live target. The arguments of dm-crypt have the key: they are cleared on drop.
    ///
    /// # Errors
    /// No device of this name is there, or it has not exactly one target (InvalidData).
    pub fn table(&self, name: &str) -> io::Result<(String, Zeroizing<String>)> {
        let mut message = Message::new(name, Flags { table: true, secret: true, ..Flags::default() })?;
        self.call(Command::Status, &mut message)?;
        message.table().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not exactly one target"))
    }

    /// Removes the device. With `deferred`, one in use is removed by the kernel once its last user closes it.
    ///
    /// # Errors
    /// No device of this name is there (ENXIO), or it is in use (EBUSY).
    pub fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        self.call(Command::Remove, &mut Message::new(name, Flags { deferred, ..Flags::default() })?)
    }

    fn call(&self, command: Command, message: &mut Message) -> io::Result<()> {
        ioctl::call(&self.control, command, message).map_err(io::Error::from)
    }
}
