//! Events of the kernel and of udev about devices: a disk that arrives ends a pause.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Multicast groups: the kernel's, and udev's, whose events come once the links are there.
const GROUPS: u32 = 1 | 2;
/// Most events that are dropped at once; the rest ends the next pause.
const DRAIN_MAX: usize = 256;

/// A socket that receives every event from its opening on.
#[derive(Debug)]
pub struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket =
            socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        Ok(Self { socket })
    }

    /// Drops the events that have arrived: any of them is a reason to look.
    ///
    /// # Errors
    /// The socket failed.
    pub fn drain(&self) -> io::Result<()> {
        let mut event = [0; 16];
        for _ in 0..DRAIN_MAX {
            match recv(self.socket.as_raw_fd(), &mut event, MsgFlags::MSG_DONTWAIT) {
                // Lost events (ENOBUFS) do no harm: that some came is known.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
