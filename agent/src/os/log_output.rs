//! The outputs of the log: none of them ever waits. The agent has one thread, and a log that is not read must not stop it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use log::Level;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};

/// POSIX's PIPE_BUF on Linux: a pipe that poll(2) calls writable takes this much at once.
const PIPE_BUF: usize = 4096;

/// The name of this process in syslog.
const PROCESS: &str = "agent-protocol-forwarder";

/// Where lines go.
#[derive(Debug)]
pub(super) enum Sink {
    /// sd-daemon(3): stderr, each line with its priority.
    Journal(Channel),
    /// stderr, each line with its level.
    Plain(Channel),
    /// syslog(3); stderr while syslog can't be reached.
    Syslog(Syslog, Channel),
}

impl Sink {
    /// Writes a line.
    ///
    /// # Errors
    /// `WouldBlock` if the line was not taken yet. Any other error: nothing will take it.
    pub(super) fn write(&mut self, level: Level, text: &str) -> io::Result<()> {
        match self {
            Self::Journal(stderr) => stderr.write(format!("<{}>{text}\n", priority(level)).into_bytes()),
            Self::Plain(stderr) => stderr.write(plain(level, text)),
            Self::Syslog(syslog, stderr) => match syslog.write(level, text) {
                Err(error) if !would_block(&error) => stderr.write(plain(level, text)),
                written => written,
            },
        }
    }

    /// Writes the end of the last line; whether nothing is left of it.
    pub(super) fn flush(&mut self) -> bool {
        let channel = match self {
            Self::Journal(stderr) | Self::Plain(stderr) => stderr,
            Self::Syslog(Syslog { connection: Some((channel, _)), .. }, _) => channel,
            Self::Syslog(_, stderr) => stderr,
        };
        !channel.flush().is_err_and(|error| would_block(&error))
    }
}

pub(super) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn plain(level: Level, text: &str) -> Vec<u8> {
    let prefix = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    format!("{prefix}: {text}\n").into_bytes()
}

/// syslog(3)'s severity.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A descriptor that is written without waiting, and without O_NONBLOCK on a file description that other processes share.
#[derive(Debug)]
pub(super) struct Channel {
    output: Output,
    /// The end of a line whose beginning was taken.
    rest: Vec<u8>,
}

#[derive(Debug)]
enum Output {
    /// A socket: each send says that it must not wait.
    Socket(OwnedFd),
    /// A pipe or terminal, opened once more with O_NONBLOCK: the description is ours alone.
    Reopened(File),
    /// A pipe or terminal that can't be opened once more: asked before each write.
    Polled(OwnedFd),
    /// A file on a disk.
    File(File),
}

impl Channel {
    /// The standard error of this process.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn stderr() -> io::Result<Self> {
        Self::over(io::stderr().as_fd().try_clone_to_owned()?)
    }

    /// A channel that writes to `fd`.
    ///
    /// # Errors
    /// The kind of the file can't be found out.
    pub(super) fn over(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let kind = file.metadata()?.file_type();
        let output = if kind.is_socket() {
            Output::Socket(file.into())
        } else if kind.is_fifo() || kind.is_char_device() {
            match reopen(&file) {
                Ok(own) => Output::Reopened(own),
                Err(_) => Output::Polled(file.into()),
            }
        } else {
            Output::File(file)
        };
        Ok(Self { output, rest: Vec::new() })
    }

    /// Writes a line, whose end may be kept for later.
    ///
    /// # Errors
    /// As [`Sink::write`].
    pub(super) fn write(&mut self, mut line: Vec<u8>) -> io::Result<()> {
        self.flush()?;
        let taken = self.put(&line)?;
        line.drain(..taken.min(line.len()));
        self.rest = line;
        Ok(())
    }

    /// Writes the end of the last line.
    ///
    /// # Errors
    /// `WouldBlock` if it was not taken yet; it is dropped on any other error.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.put(&self.rest) {
                Ok(taken) => drop(self.rest.drain(..taken.min(self.rest.len()))),
                Err(error) => {
                    if !would_block(&error) {
                        self.rest.clear();
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Writes what is taken at once, at least one byte.
    fn put(&self, bytes: &[u8]) -> io::Result<usize> {
        let taken = match &self.output {
            Output::Socket(socket) => {
                send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?
            }
            Output::Reopened(file) => (&*file).write(bytes)?,
            Output::Polled(fd) => {
                let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut polled, PollTimeout::ZERO)? == 0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                nix::unistd::write(fd, bytes.get(..PIPE_BUF).unwrap_or(bytes))?
            }
            Output::File(file) => (&*file).write(bytes)?,
        };
        if taken == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(taken) }
    }
}

/// Opens a pipe or terminal once more.
fn reopen(file: &File) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().write(true).custom_flags(flags.bits()).open(path)
}

/// A connection to the syslog daemon, made when there is something to send.
#[derive(Debug)]
pub(super) struct Syslog {
    path: PathBuf,
    connection: Option<(Channel, SockType)>,
}

impl Syslog {
    /// Sends to the socket at `path`.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), connection: None }
    }

    /// Sends one line, and reconnects once if the connection is gone: syslog daemons restart.
    fn write(&mut self, level: Level, text: &str) -> io::Result<()> {
        let reuses = self.connection.is_some();
        match self.try_write(level, text) {
            Err(error) if !would_block(&error) => {
                self.connection = None;
                if reuses { self.try_write(level, text) } else { Err(error) }
            }
            written => written,
        }
    }

    fn try_write(&mut self, level: Level, text: &str) -> io::Result<()> {
        let (channel, kind) = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(self.connect()?),
        };
        let facility = 3; // daemon
        // No time: the daemon sets that of the arrival, and would take ours for local time.
        let mut line =
            format!("<{}>{PROCESS}[{}]: {text}", facility * 8 + priority(level), std::process::id());
        if *kind == SockType::Stream {
            line.push('\0');
        }
        channel.write(line.into_bytes())
    }

    /// Connects. A full backlog of a stream socket is `WouldBlock`.
    fn connect(&self) -> io::Result<(Channel, SockType)> {
        let address = UnixAddr::new(&self.path)?;
        let mut refused = Errno::EPROTOTYPE;
        for kind in [SockType::Datagram, SockType::Stream] {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Unix, kind, flags, None)?;
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) => {
                    return Ok((Channel { output: Output::Socket(socket), rest: Vec::new() }, kind));
                }
                Err(errno) => refused = errno,
            }
            if refused != Errno::EPROTOTYPE {
                break;
            }
        }
        Err(refused.into())
    }
}

#[cfg(test)]
#[path = "log_output_tests.rs"]
mod tests;
