//! The unix sockets of the VM, and which of them a process can reach.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::{UnixSocket, proc};

/// A bound socket: its type and its name.
type Bound = (SockType, String);

/// Tries all sockets from the mount namespace of `pid`, as root with all capabilities.
pub(super) fn of(pid: i32) -> Result<Vec<UnixSocket>> {
    let mut bound = BTreeSet::new();
    // The kernel lists those of one network namespace; a path leads to those of all.
    for process in proc::processes()? {
        // The process may have ended.
        let table = fs::read_to_string(format!("/proc/{}/net/unix", process.pid)).unwrap_or_default();
        bound.extend(table.lines().skip(1).filter_map(line).map(|(kind, name)| (kind as i32, name)));
    }
    let namespace = File::open(format!("/proc/{pid}/ns/mnt")).context("opening the mount namespace")?;
    // A thread of its own: entering a mount namespace is for good, and changes the root.
    let tried = std::thread::spawn(move || -> Result<Vec<UnixSocket>> {
        unshare(CloneFlags::CLONE_FS).context("separating the root of this thread")?;
        setns(namespace, CloneFlags::CLONE_NEWNS).context("entering the mount namespace")?;
        let sockets = bound.into_iter().map(|(kind, name)| {
            let error = try_connect(SockType::try_from(kind)?, &name).err().map(|error| error.to_string());
            Ok(UnixSocket { name, error })
        });
        sockets.collect()
    });
    tried.join().map_err(|_| anyhow!("the thread ended"))?
}

/// proc_net(5): the fifth field is the type in hexadecimal, the eighth the name, if it has one.
fn line(line: &str) -> Option<Bound> {
    let mut fields = line.split_whitespace();
    let kind = i32::from_str_radix(fields.nth(4)?, 16).ok()?;
    let name = fields.nth(2)?;
    Some((SockType::try_from(kind).ok()?, name.to_owned()))
}

fn try_connect(kind: SockType, name: &str) -> nix::Result<()> {
    let address = match name.strip_prefix('@') {
        Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
        None => UnixAddr::new(name)?,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, kind, flags, None)?;
    match connect(socket.as_raw_fd(), &address) {
        // Its queue is full: it can be reached.
        Err(Errno::EAGAIN) => Ok(()),
        connected => connected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_in_the_kernels_table() {
        let listening = "ffff8880: 00000002 00000000 00010000 0001 01 12345 /run/systemd/private";
        assert_eq!(line(listening), Some((SockType::Stream, "/run/systemd/private".to_owned())));
        assert_eq!(line("ffff8880: 00000003 00000000 00000000 0002 03 1 @name").unwrap().1, "@name");
        assert_eq!(line("ffff8880: 00000003 00000000 00000000 0001 03 12345"), None);
    }

    #[test]
    fn a_socket_of_this_process_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        try_connect(SockType::Stream, path.to_str().unwrap()).unwrap();
        assert_eq!(try_connect(SockType::Datagram, path.to_str().unwrap()), Err(Errno::EPROTOTYPE));
        assert_eq!(try_connect(SockType::Stream, "/nowhere"), Err(Errno::ENOENT));
    }
}
