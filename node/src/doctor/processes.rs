//! Other processes, as /proc shows them.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};

/// Bytes of a process's name that the kernel keeps.
const COMM_MAX: usize = 15;
/// The state of a socket that listens, in /proc/net/tcp.
const LISTEN: &str = "0A";

/// The processes of a machine.
#[derive(Clone, Debug)]
pub(super) struct Processes {
    root: PathBuf,
}

/// A listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    inode: u64,
    pub(super) is_ipv6: bool,
}

impl Processes {
    /// Those of /proc, or of a directory that looks like it.
    pub(super) fn of(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The ids of all processes, in ascending order.
    fn all(&self) -> Vec<u32> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut all: Vec<u32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        all.sort_unstable();
        all
    }

    /// The ids of those whose program is called `name`.
    pub(super) fn named(&self, name: &str) -> Vec<u32> {
        let comm = name.get(..COMM_MAX).unwrap_or(name);
        let is_named =
            |pid: &u32| self.comm(*pid).is_some_and(|found| found == comm) && self.program_is(*pid, name);
        self.all().into_iter().filter(is_named).collect()
    }

    /// The name of a process; `None` if it is gone.
    pub(super) fn comm(&self, pid: u32) -> Option<String> {
        let text = fs::read_to_string(self.file(pid, "comm")).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    /// Whether the first word of the command line ends with `name`, where the kernel's name is too short to say.
    fn program_is(&self, pid: u32, name: &str) -> bool {
        if name.len() <= COMM_MAX {
            return true;
        }
        let line = fs::read(self.file(pid, "cmdline")).unwrap_or_default();
        let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
        let program = String::from_utf8_lossy(program);
        Path::new(&*program).file_name().is_some_and(|file| file == name)
    }

    /// The network namespace of a process, as `net:[4026531840]`.
    ///
    /// # Errors
    /// It is gone, or is another user's.
    pub(super) fn network_of(&self, pid: u32) -> io::Result<String> {
        let link = fs::read_link(self.file(pid, "ns/net"))?;
        Ok(link.to_string_lossy().into_owned())
    }

    /// The most files that a process may have open, and how many it has; `None` for what cannot be read.
    pub(super) fn files_of(&self, pid: u32) -> (Option<u64>, Option<usize>) {
        let limits = fs::read_to_string(self.file(pid, "limits")).unwrap_or_default();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let soft = line.and_then(|line| line.split_whitespace().next());
        let soft = soft.and_then(|soft| if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() });
        (soft, fs::read_dir(self.file(pid, "fd")).ok().map(Iterator::count))
    }

    /// The sockets of our network namespace that listen at a TCP port.
    ///
    /// # Errors
    /// The kernel's table cannot be read.
    pub(super) fn listeners(&self, port: u16) -> io::Result<Vec<Listener>> {
        let mut found = Vec::new();
        for (file, is_ipv6) in [("net/tcp", false), ("net/tcp6", true)] {
            let table = match File::open(self.root.join(file)) {
                // A kernel without IPv6.
                Err(error) if is_ipv6 && error.kind() == io::ErrorKind::NotFound => continue,
                table => table?,
            };
            for line in BufReader::new(table).lines().skip(1) {
                found.extend(listener(&line?, port).map(|inode| Listener { inode, is_ipv6 }));
            }
        }
        Ok(found)
    }

    /// The process that has the socket; `None` if none is found, as others' files cannot be seen without privileges.
    pub(super) fn owner_of(&self, listener: Listener) -> Option<u32> {
        let wanted = format!("socket:[{}]", listener.inode);
        self.all().into_iter().find(|pid| {
            let files = fs::read_dir(self.file(*pid, "fd")).into_iter().flatten().flatten();
            files
                .into_iter()
                .any(|file| fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == &*wanted))
        })
    }

    fn file(&self, pid: u32, name: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(name)
    }
}

/// The inode of a line of /proc/net/tcp, if it is of a socket that listens at `port`.
fn listener(line: &str, port: u16) -> Option<u64> {
    let mut words = line.split_whitespace();
    let local = words.nth(1)?;
    let state = words.nth(1)?;
    let at = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    // What is between: the queues, the timer, the retransmissions, the user and the timeout.
    let inode = words.nth(5)?;
    if state == LISTEN && at == port { inode.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_listener_and_its_owner_are_found() {
        let processes = Processes::of("/proc");
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let found = processes.listeners(port).unwrap();
        let [listener] = *found else { panic!("{found:?}") };
        assert!(!listener.is_ipv6);
        assert_eq!(processes.owner_of(listener), Some(std::process::id()));
        drop(server);
        // A process that another test is about to start has the listener for a moment.
        let begun = Instant::now();
        while !processes.listeners(port).unwrap().is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(30), "it still listens");
        }
    }

    #[test]
    fn files_and_network_of_a_process_are_read() {
        let processes = Processes::of("/proc");
        let us = std::process::id();
        let (limit, open) = processes.files_of(us);
        assert!(limit.unwrap() > 10 && open.unwrap() > 2);
        assert!(processes.network_of(us).unwrap().starts_with("net:["));
    }

    #[test]
    fn a_long_name_is_compared_with_the_command_line() {
        let dir = tempfile::tempdir().unwrap();
        for (pid, program) in
            [("7", "/usr/local/bin/cloud-api-adaptor\0-x"), ("8", "/bin/cloud-api-adapterium\0")]
        {
            fs::create_dir(dir.path().join(pid)).unwrap();
            fs::write(dir.path().join(pid).join("comm"), "cloud-api-adapt\n").unwrap();
            fs::write(dir.path().join(pid).join("cmdline"), program).unwrap();
        }
        assert_eq!(Processes::of(dir.path()).named("cloud-api-adaptor"), [7]);
    }

    #[test]
    fn a_line_that_is_no_listener_is_skipped() {
        let line = "   0: 0100007F:3B2F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0";
        assert_eq!(listener(line, 15151), Some(4711));
        assert_eq!(listener(line, 15150), None);
        assert_eq!(listener(&line.replace(" 0A ", " 01 "), 15151), None);
        assert_eq!(listener("x", 1), None);
    }
}
