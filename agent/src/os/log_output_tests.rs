use std::io::{Read, Seek};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{Backlog, bind, listen};

use super::*;

/// More lines than any output takes.
const MANY: usize = 100_000;

fn is_shared_blocking(fd: impl AsFd) -> bool {
    !OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
}

/// Lines that were taken before the first `WouldBlock`.
fn fill(mut write: impl FnMut() -> io::Result<()>) -> usize {
    for taken in 0..MANY {
        match write() {
            Ok(()) => {}
            Err(error) if would_block(&error) => return taken,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("it takes everything")
}

#[test]
fn a_pipe_that_is_not_read_does_not_block() {
    let (reader, writer) = io::pipe().unwrap();
    let mut channel = Channel::over(OwnedFd::from(writer.try_clone().unwrap())).unwrap();
    assert!(matches!(channel.output, Output::Reopened(_)), "{channel:?}");
    assert!(fill(|| channel.write(vec![b'x'; 1000])) > 50);
    assert!(is_shared_blocking(&writer), "other processes may write to it");
    drop(reader);
    assert!(!would_block(&channel.write(b"x".to_vec()).unwrap_err()), "a closed pipe is no wait");
}

#[test]
fn a_pipe_that_cannot_be_opened_again_does_not_block() {
    let (_reader, writer) = io::pipe().unwrap();
    let output = Output::Polled(OwnedFd::from(writer));
    let mut channel = Channel { output, rest: Vec::new() };
    assert!(fill(|| channel.write(vec![b'x'; 1000])) > 10);
}

#[test]
fn a_socket_that_is_not_read_does_not_block() {
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let mut channel = Channel::over(OwnedFd::from(writer.try_clone().unwrap())).unwrap();
    let taken = fill(|| channel.write(b"0123456789\n".to_vec()));
    assert!(is_shared_blocking(&writer), "other processes may write to it");
    // No line is torn: the end of the last one follows once there is room.
    drop(writer);
    let lines = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    while channel.flush().is_err() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    drop(channel);
    let text = lines.join().unwrap();
    assert_eq!(text.lines().count(), taken);
    assert!(text.lines().all(|line| line == "0123456789"));
}

#[test]
fn a_file_is_written_where_others_have_left_off() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before\n").unwrap();
    let mut channel = Channel::over(file.try_clone().unwrap().into()).unwrap();
    channel.write(b"line\n".to_vec()).unwrap();
    file.write_all(b"after\n").unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before\nline\nafter\n");
}

#[test]
fn a_full_or_lost_syslog_daemon_does_not_block() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let mut syslog = Syslog::new(&path);
    syslog.write(Level::Warn, "hello").unwrap();
    let mut buffer = [0; 256];
    let length = daemon.recv(&mut buffer).unwrap();
    let expected = format!("<28>agent-protocol-forwarder[{}]: hello", std::process::id());
    assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap(), expected);
    fill(|| syslog.write(Level::Info, "flood"));
    drop(daemon);
    assert!(!would_block(&syslog.write(Level::Info, "the daemon is gone").unwrap_err()));
    std::fs::remove_file(&path).unwrap();
    let daemon = UnixDatagram::bind(&path).unwrap();
    syslog.write(Level::Info, "it has restarted").unwrap();
    assert!(daemon.recv(&mut buffer).unwrap() > 0);
}

#[test]
fn a_syslog_daemon_that_accepts_no_connection_does_not_block() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let daemon = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(daemon.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&daemon, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    let full = loop {
        let mut syslog = Syslog::new(&path);
        match syslog.write(Level::Info, "one connection more") {
            Ok(()) => waiting.push(syslog),
            Err(error) => break error,
        }
        assert!(waiting.len() < 100, "it takes everything");
    };
    assert!(would_block(&full), "{full}");
    let daemon = UnixListener::from(daemon);
    let mut accepted = daemon.accept().unwrap().0;
    let mut syslog = Syslog::new(&path);
    syslog.write(Level::Info, "after all").unwrap();
    let mut line = vec![0; 256];
    let length = accepted.read(&mut line).unwrap();
    assert!(line[..length].ends_with(b"one connection more\0"), "each message ends with a NUL");
}

#[test]
fn without_a_syslog_daemon_lines_go_to_stderr() {
    let (mut reader, writer) = io::pipe().unwrap();
    let stderr = Channel::over(writer.into()).unwrap();
    let mut sink = Sink::Syslog(Syslog::new("/nonexistent/log"), stderr);
    sink.write(Level::Warn, "where to").unwrap();
    drop(sink);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "warning: where to\n");
}
