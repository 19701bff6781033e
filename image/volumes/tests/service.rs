//! The program, over its socket, with a fake /dev and /sys and mounts of its own. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use secure_comms_protocol::volumes::{Answer, FailureKind, LINE_MAX, Request};
use support::{Loop, Tree, in_own_mounts, volume};

const PROGRAM: &str = env!("CARGO_BIN_EXE_podvm-volumes");
const SOCKET: &str = "/run/podvm-volumes/volumes.sock";
const AT: &str = "/run/cloud-volumes/vol-0";
/// A wait for a disk that ends only with the client.
const PATIENT: (&str, &str) = ("CAA_DISK_DETECT_RETRY_DELAY", "600s");

/// The program as a service; killed on drop.
struct Service {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Service {
    fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.arg("serve").args(args).envs(env.iter().copied());
        let mut service = Self::spawn(command);
        // There is no other sign that it listens.
        while UnixStream::connect(SOCKET).is_err() {
            assert_eq!(service.child.try_wait().unwrap(), None, "it has ended");
            std::thread::yield_now();
        }
        service
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// The next line of the log with this text.
    fn logged(&mut self, text: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let mut fds = [PollFd::new(self.log.get_ref().as_fd(), PollFlags::POLLIN)];
            let is_there = !self.log.buffer().is_empty() || poll(&mut fds, 60_000u16).unwrap() > 0;
            assert!(is_there, "no '{text}' in the log");
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "the log ended without '{text}'");
            if line.contains(text) {
                return line;
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.child.kill());
        self.child.wait().unwrap();
    }
}

/// Puts the tree's /dev and /sys in place of the real ones, which the program then takes for the system's.
fn enter(tree: &Tree) {
    mknod(&tree.roots.dev.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))
        .unwrap();
    for (from, to) in [(&tree.roots.dev, "/dev"), (&tree.roots.sys, "/sys")] {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }
}

fn send(line: &str) -> UnixStream {
    let mut client = UnixStream::connect(SOCKET).unwrap();
    client.write_all(line.as_bytes()).unwrap();
    client
}

fn mount_request(lun: u32) -> String {
    serde_json::to_string(&Request::Mount(vec![volume("vol-0", lun)])).unwrap() + "\n"
}

fn unmount_request() -> String {
    serde_json::to_string(&Request::UnmountAll).unwrap() + "\n"
}

fn answer_of(client: UnixStream) -> Answer {
    try_answer(client).expect("closed without an answer")
}

/// The answer; none if the connection is closed without one.
fn try_answer(client: UnixStream) -> Option<Answer> {
    let mut line = String::new();
    BufReader::new(client).read_line(&mut line).ok().filter(|length| *length > 0)?;
    assert!(line.ends_with('\n') && line.len() <= LINE_MAX, "{line}");
    Some(serde_json::from_str(&line).unwrap())
}

fn failure_of(client: UnixStream) -> (FailureKind, String) {
    match answer_of(client) {
        Answer::Failed(failure) => (failure.kind, failure.message),
        answer => panic!("{answer:?}"),
    }
}

#[test]
fn a_restart_loses_nothing() {
    // Outside: losetup needs the real /dev.
    let device = Loop::new(64 << 20);
    in_own_mounts(|| {
        let tree = Tree::bare();
        tree.loop_disk("vdb", &device);
        enter(&tree);
        let mut service = Service::start(&[], &[]);
        for (path, mode) in [(SOCKET, 0o600), ("/run/podvm-volumes", 0o700)] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, mode, "{path}");
        }
        assert_eq!(answer_of(send(&mount_request(0))), Answer::Mounted(vec![AT.into()]));
        service.logged("volume vol-0: /dev/vdb is mounted at /run/cloud-volumes/vol-0");
        service.logged("volume vol-0: not encrypted: the cloud chose this disk");
        fs::write(format!("{AT}/data"), "kept").unwrap();
        drop(service);

        let mut service = Service::start(&[], &[]);
        assert_eq!(answer_of(send(&mount_request(0))), Answer::Mounted(vec![AT.into()]));
        service.logged("was mounted already");
        assert_eq!(fs::read_to_string(format!("{AT}/data")).unwrap(), "kept");
        assert_eq!(answer_of(send(&unmount_request())), Answer::Unmounted);
        assert!(!Path::new(AT).exists());
    });
}

#[test]
fn a_second_service_is_refused() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let _service = Service::start(&[], &[]);
        let second = Command::new(PROGRAM).arg("serve").output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        let text = String::from_utf8(second.stderr).unwrap();
        assert_eq!(text, format!("podvm-volumes: listening at {SOCKET}: another process listens there\n"));
    });
}

#[test]
fn a_silent_client_blocks_no_other() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let _service = Service::start(&[], &[]);
        let _silent: Vec<_> = (0..8).map(|_| send("{\"mount\":")).collect();
        assert_eq!(answer_of(send(&unmount_request())), Answer::Unmounted);
    });
}

#[test]
fn a_client_that_leaves_ends_its_wait() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let mut service = Service::start(&[], &[PATIENT]);
        let waiting = send(&mount_request(0));
        service.logged("volume vol-0: waiting for its disk, with LUN 0");
        let next = send(&unmount_request());
        drop(waiting);
        service.logged("the agent gave the request up");
        assert_eq!(answer_of(next), Answer::Unmounted);
    });
}

#[test]
fn a_client_that_only_sends_no_more_still_waits() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let short = ("CAA_DISK_DETECT_RETRY_DELAY", "1ms");
        let _service = Service::start(&[], &[short, ("CAA_DISK_DETECT_MAX_ATTEMPTS", "2")]);
        let client = send(&mount_request(0));
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (kind, text) = failure_of(client);
        assert_eq!(kind, FailureKind::NoDisk);
        assert!(text.starts_with("volume vol-0: no disk with LUN 0 within 0 s"), "{text}");
    });
}

#[test]
fn what_is_no_request_is_refused() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let mut service = Service::start(&[], &[]);
        let nested = format!("{}\n", "[".repeat(20_000));
        let long = format!("\"{}\"\n", "x".repeat(LINE_MAX));
        for bad in [
            "\n",
            "{}\n",
            "\"format_all\"\n",
            "{\"mount\":7}\n",
            "\0\n",
            &nested,
            "\"unmount_all\" 1\n",
            &long,
        ] {
            let mut client = UnixStream::connect(SOCKET).unwrap();
            // The service may have closed its side before the end of a long line.
            drop(client.write_all(bad.as_bytes()));
            let (kind, text) = failure_of(client);
            assert_eq!(kind, FailureKind::Invalid);
            assert!(text.starts_with("reading the request: ") && !text.contains('\n'), "{text}");
            service.logged("refused a request: reading the request: ");
        }
    });
}

#[test]
fn encryption_can_be_required() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let _service = Service::start(&["--require-encryption"], &[]);
        let (kind, text) = failure_of(send(&mount_request(0)));
        assert_eq!(kind, FailureKind::Refused);
        assert!(
            text.contains("it is not encrypted, and this image refuses such volumes (--require-encryption)"),
            "{text}"
        );
    });
}

#[test]
fn only_root_is_heard() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let mut service = Service::start(&[], &[]);
        // Permissions as a mistake could leave them.
        fs::set_permissions("/run/podvm-volumes", PermissionsExt::from_mode(0o755)).unwrap();
        fs::set_permissions(SOCKET, PermissionsExt::from_mode(0o666)).unwrap();
        // Closed, be it before or after the request was sent.
        let script = format!(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({SOCKET:?})\n\
             try:\n s.send(b'\"unmount_all\"\\n')\n print(len(s.recv(1)))\nexcept OSError:\n print(0)"
        );
        let output = Command::new("python3").args(["-c", &script]).uid(65534).gid(65534).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{output:?}");
        service.logged("refused a connection of user 65534");
    });
}

#[test]
fn systemds_socket_is_taken() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let listener = UnixListener::bind("/run/other.sock").unwrap();
        let mut waiting = UnixStream::connect("/run/other.sock").unwrap();
        waiting.write_all(unmount_request().as_bytes()).unwrap();
        let mut command = Command::new("sh");
        let script =
            format!("exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec {PROGRAM} serve");
        command.args(["-c", &script]).stdin(Stdio::from(OwnedFd::from(listener)));
        let _service = Service::spawn(command);
        assert_eq!(answer_of(waiting), Answer::Unmounted);
        assert!(!Path::new(SOCKET).exists());
    });
}

#[test]
fn more_connections_than_places_are_closed() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let mut service = Service::start(&[], &[]);
        let silent: Vec<_> = (0..17).map(|_| UnixStream::connect(SOCKET).unwrap()).collect();
        service.logged("16 connections are open: closing another one");
        drop(silent);
        // The places of those that have left are free again.
        let is_served = || {
            let mut client = UnixStream::connect(SOCKET).unwrap();
            client.write_all(unmount_request().as_bytes()).ok().and_then(|()| try_answer(client))
        };
        while is_served() != Some(Answer::Unmounted) {}
    });
}

#[test]
fn wrong_arguments_and_environment_are_named() {
    let run = |args: &[&str], env: (&str, &str)| {
        let output = Command::new(PROGRAM).args(args).env(env.0, env.1).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = run(&["serve"], ("CAA_DISK_DETECT_MAX_ATTEMPTS", "many"));
    let expected =
        "podvm-volumes: environment: CAA_DISK_DETECT_MAX_ATTEMPTS: expected a number from 1 to 600\n";
    assert_eq!((code, &*text), (Some(1), expected));
    let (code, text) = run(&["mount"], ("X", ""));
    assert_eq!(code, Some(2));
    assert!(text.starts_with("podvm-volumes: Unrecognized argument: mount"), "{text}");
    for path in ["", "volumes.sock"] {
        let (code, text) = run(&["serve", "--socket", path], ("X", ""));
        let expected = format!("podvm-volumes: listening at {path}: not an absolute path\n");
        assert_eq!((code, text), (Some(1), expected));
    }
    let help = Command::new(PROGRAM).args(["serve", "--help"]).output().unwrap();
    assert!(
        help.status.success() && String::from_utf8(help.stdout).unwrap().contains("--require-encryption")
    );
}

#[test]
fn without_its_marker_there_is_no_scratch_disk() {
    in_own_mounts(|| {
        let tree = Tree::bare();
        enter(&tree);
        let output = Command::new(PROGRAM).arg("scratch").output().unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8(output.stderr).unwrap().contains("scratch: none is asked for"));
    });
}
