//! The kernel's announcements of changes of nftables rules: netlink, group `NFNLGRP_NFTABLES`.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::TABLE;

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h is 7; a bind takes a mask.
const GROUP: u32 = 1 << (7 - 1);
/// A message of netlink is no longer than a page, or 32 KiB for a dump.
const MESSAGE: usize = 32 * 1024;

/// A subscription.
pub(super) struct Changes {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Changes {
    /// # Errors
    /// The kernel has no nf_tables, or no netlink socket is to be had.
    pub(super) fn subscribe() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe for types that change their file; OwnedFd does not"
        )]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE)?;
        Ok(Self { socket, buffer: vec![0; MESSAGE] })
    }

    /// Waits for a change of our table. Changes of other tables, as kube-proxy makes them all the time, are skipped.
    /// Cancellation safe.
    ///
    /// # Errors
    /// The socket failed.
    pub(super) async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            let (buffer, mut ours) = (&mut self.buffer, false);
            loop {
                match recv(ready.get_inner().as_raw_fd(), buffer, MsgFlags::empty()) {
                    // Every message of a table has its name, with a NUL.
                    Ok(length) => ours |= buffer.get(..length).is_some_and(names_us),
                    Err(Errno::EAGAIN) => break,
                    // Announcements were lost: ours may be one of them.
                    Err(Errno::ENOBUFS) => ours = true,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if ours {
                return Ok(());
            }
        }
    }
}

fn names_us(message: &[u8]) -> bool {
    let name = TABLE.as_bytes();
    message.windows(name.len() + 1).any(|window| window.split_last() == Some((&0, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_table_is_found_by_its_whole_name() {
        assert!(names_us(b"..secure-comms-adaptor\0.."));
        assert!(!names_us(b"..secure-comms-adaptor-2\0"));
        assert!(!names_us(b"filter\0"));
        assert!(!names_us(b""));
    }
}
