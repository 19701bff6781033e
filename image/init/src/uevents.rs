//! Events of the kernel about devices.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};

use crate::failure::{Context, Failure};

/// Multicast group of the kernel; udev uses 2.
const KERNEL: u32 = 1;
/// Size of the receive buffer, in bytes; the bursts of a boot are much smaller.
const BACKLOG: usize = 4 << 20;
/// Size of a read, in bytes; events of the kernel have at most 2 KiB.
const EVENT: usize = 8192;

/// A socket that receives every event from its opening on.
pub struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn listen() -> Result<Self, Failure> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )
        .context(|| "opening a socket for the kernel's events")?;
        setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG)
            .and_then(|()| bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL)))
            .context(|| "listening to the kernel's events")?;
        Ok(Self { socket })
    }

    /// Waits for an event, then reads all that have arrived. Returns false once the deadline has passed.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait_until(&self, deadline: Instant) -> Result<bool, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // Rounded up: a timeout of 0 would spin through the last millisecond.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => return Err(Failure::new("waiting for the kernel's events", error)),
            }
        }
        let mut event = [0; EVENT];
        loop {
            match recv(self.socket.as_raw_fd(), &mut event, MsgFlags::MSG_DONTWAIT) {
                // Lost events (ENOBUFS) do no harm: the caller checks every disk after any event.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => return Ok(true),
                Err(error) => return Err(Failure::new("reading the kernel's events", error)),
            }
        }
    }

    /// The socket, to pass to another process.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

/// Waits on an inherited socket until dm-verity reports a bad block, or until events were lost, which may have been
/// such reports.
///
/// # Errors
/// The socket failed.
pub fn wait_for_verity_error(socket: &impl AsRawFd) -> io::Result<()> {
    let mut event = [0; EVENT];
    loop {
        match recv(socket.as_raw_fd(), &mut event, MsgFlags::empty()) {
            Ok(length) if is_verity_error(event.get(..length).unwrap_or(&event)) => return Ok(()),
            Err(Errno::ENOBUFS) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the event reports a bad block (verity_handle_err in drivers/md/dm-verity-target.c).
fn is_verity_error(event: &[u8]) -> bool {
    event.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"DM_VERITY_ERR_BLOCK_NR="))
}

#[cfg(test)]
mod tests {
    use super::is_verity_error;

    #[test]
    fn only_a_verity_event_counts_as_an_error() {
        assert!(is_verity_error(
            b"change@/devices/virtual/block/dm-0\0ACTION=change\0DM_VERITY_ERR_BLOCK_NR=0,3\0"
        ));
        assert!(!is_verity_error(
            b"change@/devices/virtual/block/dm-0\0ACTION=change\0X=DM_VERITY_ERR_BLOCK_NR=0\0"
        ));
        assert!(!is_verity_error(b""));
    }
}
