//! The two system calls without a safe wrapper.

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

/// `BLKPG` of <linux/blkpg.h>.
const BLKPG: ioctl_num_type = 0x1269;
/// `BLKPG_ADD_PARTITION`
const ADD: libc::c_int = 1;
/// Bytes of a name in a [`Partition`], which the kernel ignores.
const NAME: usize = 64;

/// `struct blkpg_partition`
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    names: [[libc::c_char; NAME]; 2],
}

/// `struct blkpg_ioctl_arg`
#[repr(C)]
struct Argument {
    command: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *mut Partition,
}

/// Makes a partition, in the kernel only; bounds are in bytes.
pub(crate) fn add_partition(disk: &File, start: i64, length: i64, number: i32) -> Result<(), Errno> {
    let mut partition = Partition { start, length, number, names: [[0; NAME]; 2] };
    let size = size_of::<Partition>().try_into().map_err(|_| Errno::EINVAL)?;
    let mut argument = Argument { command: ADD, flags: 0, length: size, data: &raw mut partition };
    // SAFETY: the descriptor is open as long as `disk` is borrowed. The kernel copies a blkpg_ioctl_arg from the pointer
    // and a blkpg_partition from its `data` (block/ioctl.c), both of them initialised and alive for the call; it writes
    // to neither and keeps no pointer.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw mut argument) };
    Errno::result(result).map(drop)
}
