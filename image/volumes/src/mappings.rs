//! The device mapper, as far as volumes need it; a test has another.

use std::io;

use podvm_device_mapper::{DeviceMapper, Target};
use zeroize::Zeroizing;

use crate::log;

/// Devices of the device mapper.
pub trait Mappings: Send + Sync {
    /// Type and arguments of a device's target.
    ///
    /// # Errors
    /// There is no device of this name, or the kernel refuses.
    fn table(&self, name: &str) -> io::Result<(String, Zeroizing<String>)>;

    /// Makes a dm-crypt device of this size, in sectors; returns its minor number, N of /dev/dm-N.
    ///
    /// # Errors
    /// A device of this name exists (EBUSY), or the kernel refuses; its log says why.
    fn create_crypt(&self, name: &str, table: &str, sectors: u64) -> io::Result<u32>;

    /// Removes a device; with `deferred`, one in use once its last user ends.
    ///
    /// # Errors
    /// As of [`Self::table`]; it is in use (EBUSY).
    fn remove(&self, name: &str, deferred: bool) -> io::Result<()>;
}

/// Those of the kernel. The control device is opened for each call: a VM without encrypted volumes may not have it.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl Mappings for Kernel {
    fn table(&self, name: &str) -> io::Result<(String, Zeroizing<String>)> {
        DeviceMapper::open()?.table(name)
    }

    fn create_crypt(&self, name: &str, table: &str, sectors: u64) -> io::Result<u32> {
        let mapper = DeviceMapper::open()?;
        let minor = mapper.create(name, false)?;
        let target = Target { kind: "crypt", sectors, table, read_only: false, secret: true };
        match mapper.load(name, &target).and_then(|()| mapper.resume(name, false)) {
            Ok(()) => Ok(minor),
            Err(error) => {
                if let Err(error) = mapper.remove(name, true) {
                    log::line(format_args!("removing {name}, which is of no use: {error}"));
                }
                Err(error)
            }
        }
    }

    fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        DeviceMapper::open()?.remove(name, deferred)
    }
}
