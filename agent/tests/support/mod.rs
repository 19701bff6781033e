//! The real binary, in a directory of its own.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../../adaptor/tests/support/own_port.rs"]
mod own_port;

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use own_port::own_port;

/// Timeout of a test that hangs. Nothing is measured with it.
pub const HANG: Duration = Duration::from_secs(60);

/// Flags with which the agent binds no fixed port.
pub const FREE_PORTS: [&str; 3] = ["-secure-comms", "-secure-comms-inbounds", "BOTH_PHASES:KBS:0"];

/// A free address that no other test of this process gets.
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, own_port()).into()
}

/// A directory for apf.json and the latched keys.
pub struct Place {
    pub directory: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        // On a tmpfs, as the state directory should be: elsewhere the agent warns.
        let place = Self { directory: tempfile::tempdir_in("/dev/shm").unwrap() };
        place.write_config("{}");
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write_config(&self, text: &str) {
        std::fs::write(self.path("apf.json"), text).unwrap();
    }

    /// Default flags, before those of the test: the last one wins.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_agent-protocol-forwarder"));
        command.arg("-config").arg(self.path("apf.json"));
        command.arg("-secure-comms-state-dir").arg(self.path("state")).arg("-secure-comms-state-dir-on-disk");
        command.args(["-pod-namespace", "", "-secure-comms-listen", "127.0.0.1:0"]).args(args);
        // Under a journal it logs to stderr, wherever the tests run.
        command.env_clear().env("JOURNAL_STREAM", "1:1").stdin(Stdio::null());
        command
    }

    /// Runs the agent until it exits.
    pub fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        self.command(args).envs(env.iter().copied()).output().unwrap()
    }

    /// Starts the agent.
    pub fn start(&self, args: &[&str], env: &[(&str, &str)]) -> Agent {
        let (reader, writer) = std::io::pipe().unwrap();
        self.start_logging_to(args, env, writer.into(), reader)
    }

    /// Starts the agent with this stderr, whose other end is `log`.
    pub fn start_logging_to(
        &self,
        args: &[&str],
        env: &[(&str, &str)],
        stderr: Stdio,
        log: impl Read + 'static,
    ) -> Agent {
        Self::spawn(self.command(args), env, stderr, log)
    }

    /// Starts the agent as a user who may have no inotify instance.
    pub fn start_without_inotify(&self, args: &[&str]) -> Agent {
        let agent = self.command(args);
        let mut command = Command::new("unshare");
        let script = "echo 0 >/proc/sys/user/max_inotify_instances && exec \"$@\"";
        command.args(["--user", "--map-root-user", "sh", "-c", script, "sh"]);
        command.arg(agent.get_program()).args(agent.get_args()).stdin(Stdio::null());
        let (reader, writer) = std::io::pipe().unwrap();
        Self::spawn(command, &[("JOURNAL_STREAM", "1:1")], writer.into(), reader)
    }

    /// Starts the agent on a terminal, whose lines are its log.
    pub fn start_on_terminal(&self, args: &[&str]) -> Agent {
        let agent = self.command(args);
        let words = std::iter::once(agent.get_program()).chain(agent.get_args());
        let words: Vec<_> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        let mut command = Command::new("sh");
        command.args(["-c", "exec script -qec \"$1\" /dev/null >&2", "sh", &words.join(" ")]);
        command.stdin(Stdio::null()).env_remove("JOURNAL_STREAM");
        let (reader, writer) = std::io::pipe().unwrap();
        Self::spawn(command, &[], writer.into(), reader)
    }

    fn spawn(mut command: Command, env: &[(&str, &str)], stderr: Stdio, log: impl Read + 'static) -> Agent {
        command.envs(env.iter().copied()).stdout(Stdio::null()).stderr(stderr);
        Agent { child: command.spawn().unwrap(), log: BufReader::new(Box::new(log)) }
    }
}

/// A running agent, killed on drop.
pub struct Agent {
    child: Child,
    log: BufReader<Box<dyn Read>>,
}

impl Agent {
    /// Reads the log up to a line with `part`; returns the rest of that line.
    pub fn says(&mut self, part: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "it ended without logging {part:?}");
            if let Some((_, rest)) = line.split_once(part) {
                return rest.trim_end().to_owned();
            }
        }
    }

    /// The rest of the log, until the agent exits.
    pub fn rest(&mut self) -> String {
        let mut text = String::new();
        self.log.read_to_string(&mut text).unwrap();
        text
    }

    /// Address of its SSH server.
    pub fn address(&mut self) -> SocketAddr {
        self.says(">listens on ").parse().unwrap()
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }

    /// Sends SIGTERM, and waits for the exit.
    pub fn terminate(&mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.exits()
    }

    /// Waits for the exit.
    pub fn exits(&mut self) -> ExitStatus {
        let deadline = Instant::now() + HANG;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it did not end");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// systemd's end of NOTIFY_SOCKET.
pub struct Systemd(UnixDatagram);

impl Systemd {
    pub fn new(place: &Place) -> Self {
        let socket = UnixDatagram::bind(place.path("notify")).unwrap();
        socket.set_read_timeout(Some(HANG)).unwrap();
        Self(socket)
    }

    /// Receives until a message has this assignment; returns the message.
    pub fn hears(&self, assignment: &str) -> String {
        let mut buffer = [0; 1024];
        loop {
            let length = self.0.recv(&mut buffer).unwrap();
            let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
            if message.lines().any(|line| line == assignment) {
                return message;
            }
        }
    }
}
