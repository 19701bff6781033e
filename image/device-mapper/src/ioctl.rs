//! The only system call without a safe wrapper.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ioctl::ioctl_num_type;

use crate::message::{Command, HEADER, Message};

/// `DM_IOCTL` of <linux/dm-ioctl.h>.
const DM_IOCTL: u8 = 0xfd;

/// Passes a message to the device mapper, which writes its answer over it.
pub(crate) fn call(control: &File, command: Command, message: &mut Message) -> Result<(), Errno> {
    let request: ioctl_num_type = nix::request_code_readwrite!(DM_IOCTL, command.number(), HEADER);
    let buffer = message.as_mut_bytes();
    // SAFETY: the descriptor is open as long as `control` is borrowed. The kernel reads and writes at most the bytes
    // that the header's data_size states (ctl_ioctl), and `Message` sets that to its buffer's length; the buffer is
    // borrowed exclusively for the call, the kernel keeps no pointer to it, and any bytes are valid in it.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request, buffer.as_mut_ptr()) };
    Errno::result(result).map(drop)
}
