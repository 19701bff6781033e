//! The verity device, made by the kernel's device mapper.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use podvm_device_mapper::{CONTROL, DeviceMapper, Target};

use crate::failure::{Context, Failure};

/// Name of the device in the device mapper; udev links it as /dev/mapper/root.
const NAME: &str = "root";

/// The verity device of the root.
pub struct Verity {
    control: DeviceMapper,
}

impl Verity {
    /// Makes the device from its table (see [`crate::table`]) over `bytes` bytes; returns it and the path of its node.
    ///
    /// # Errors
    /// The device mapper refuses a step.
    pub fn create(table: &str, bytes: u64) -> Result<(Self, PathBuf), Failure> {
        let control = DeviceMapper::open()
            .context(|| format!("opening {CONTROL} (is dm-verity among the modules?)"))?;
        let minor = control.create(NAME, true).context(|| "creating the verity device")?;
        let target = Target { kind: "verity", sectors: bytes / 512, table, read_only: true, secret: false };
        control
            .load(NAME, &target)
            .context(|| format!("loading the verity table \"{table}\" (the kernel said why, above)"))?;
        control.resume(NAME, true).context(|| "starting the verity device")?;
        Ok((Self { control }, PathBuf::from(format!("/dev/dm-{minor}"))))
    }

    /// Takes an open /dev/mapper/control that another process passed on.
    pub fn inherited(control: OwnedFd) -> Self {
        Self { control: DeviceMapper::from_control(control) }
    }

    /// Whether every block read so far matched the root hash. (The kernel reports `V` for verified, `C` for
    /// corruption.)
    ///
    /// # Errors
    /// The device mapper does not answer.
    pub fn is_intact(&self) -> Result<bool, Failure> {
        let status = self.control.status(NAME).context(|| "asking for the root's status")?;
        Ok(status == Some(b'V'))
    }

    /// The control device, to pass to another process.
    pub fn into_control(self) -> OwnedFd {
        self.control.into_control()
    }
}
