//! What the demo programs `demo-vm` and `demo-node` share: they run one process in a terminal until Ctrl-C. Their state is
//! in a directory, so that either may be killed and started again. And the file of `double` ([`transfer`]).

pub mod transfer;

use std::cell::Cell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::time::timeout;

use crate::harness::kept_directory::{private_directory, remember_child};
use crate::harness::process::{Child, Signal};
use crate::harness::scene::{PATIENCE, Scene};

/// Exit code of a demo program; prints the error, if any.
pub fn finish(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Arguments of a demo program: `[--dir DIR]` and others.
#[derive(Debug)]
pub struct Arguments {
    /// Directory that both halves share.
    pub directory: PathBuf,
    /// The other arguments.
    pub others: Vec<String>,
}

impl Arguments {
    /// Reads them. The default directory is under the system's for temporary files, with the user's number.
    ///
    /// # Errors
    /// `--dir` has no value, or is no UTF-8.
    pub fn read(words: impl IntoIterator<Item = String>) -> Result<Self> {
        let user = nix::unistd::geteuid();
        let mut directory = std::env::temp_dir().join(format!("secure-comms-demo-{user}"));
        let (mut words, mut others) = (words.into_iter(), Vec::new());
        while let Some(word) = words.next() {
            match word.as_str() {
                "--dir" => directory = words.next().context("--dir: expected a directory")?.into(),
                flag if flag.starts_with('-') => bail!("{flag}: unknown; see --help"),
                _ => others.push(word),
            }
        }
        Ok(Self { directory, others })
    }

    /// The directory of one half; makes both.
    ///
    /// # Errors
    /// They can't be made, or others may access them.
    pub fn half(&self, name: &str) -> Result<PathBuf> {
        private_directory(&self.directory)?;
        let half = self.directory.join(name);
        private_directory(&half)?;
        Ok(half.canonicalize()?)
    }

    /// Where `demo-vm` leaves what its agent runs with, for `demo-node`.
    fn agent_file(&self) -> PathBuf {
        self.directory.join("agent")
    }

    /// Leaves what the agent of this scene runs with.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn leave_agent(&self, scene: &Scene) -> Result<()> {
        let socket = scene.kata_socket.display();
        let text = format!("{}\n{}\n{socket}\n", scene.agent_inbounds, scene.agent_outbounds);
        std::fs::write(self.agent_file(), text).context("leaving what the agent runs with")
    }

    /// Makes the adaptor of this scene expect the agent that `demo-vm` left; one with the built-in tunnels, if it left none.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn expect_agent(&self, scene: &mut Scene) -> Result<()> {
        let file = self.agent_file();
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        let [inbounds, outbounds, socket] = text.lines().collect::<Vec<_>>()[..] else {
            bail!("{}: expected three lines", file.display());
        };
        (scene.agent_inbounds, scene.agent_outbounds) = (inbounds.to_owned(), outbounds.to_owned());
        scene.kata_socket = socket.into();
        Ok(())
    }

    /// Where `demo-vm` leaves its address for `demo-node`.
    pub fn address_file(&self) -> PathBuf {
        self.directory.join("address")
    }
}

/// Directory of the adaptor's sockets. Short: with the pod's id, the path of a socket may have 107 bytes.
///
/// # Errors
/// It can't be made, or others may access it.
pub fn run_directory() -> Result<PathBuf> {
    let directory = std::env::temp_dir().join(format!("sc-{}", nix::unistd::geteuid()));
    private_directory(&directory)?;
    Ok(directory)
}

/// The signals that end a demo program.
#[derive(Debug)]
pub struct Stop([Signals; 3]);

impl Stop {
    /// Receives SIGINT, SIGTERM and SIGHUP from now on. The programs that we start get none of them: only then are they
    /// never seen to end before we know why.
    ///
    /// # Errors
    /// The handlers can't be installed.
    pub fn new() -> Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    /// Waits for one of them.
    pub async fn wait(&mut self) {
        let Self([interrupt, terminate, hangup]) = self;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Starts the process of a half. Ctrl-C in the terminal does not reach it.
///
/// # Errors
/// It can't be started.
pub fn start(name: &str, mut command: Command, directory: &Path) -> Result<Child> {
    command.process_group(0);
    let process = Child::spawn(name, command)?;
    remember_child(directory, process.pid())?;
    Ok(process)
}

/// Longer than any demo runs without output.
const QUIET: Duration = Duration::from_secs(30 * 24 * 3600);
/// Exit code of a program that SIGTERM ended before its work was done.
const TERMINATED: i32 = 128 + 15;

/// Prints the output of `process` until a signal, then ends the process. Calls `ready` once, after a line that contains
/// `sign`.
///
/// # Errors
/// If the process ends before, or not in good order.
pub async fn watch(
    process: &mut Child,
    stop: &mut Stop,
    sign: &str,
    ready: impl AsyncFn(&Child) -> Result<()>,
) -> Result<()> {
    let shown = Cell::new(0);
    let print = |line: &str| {
        println!("{} | {line}", process.name());
        shown.set(shown.get() + 1);
    };
    let show = async {
        let mut is_ready = false;
        // An error means that its outputs are closed: how it ended says why.
        while let Ok(line) = process.wait_from(shown.get(), |_| true, QUIET).await {
            print(&line);
            if !is_ready && line.contains(sign) {
                is_ready = true;
                if let Err(error) = ready(process).await {
                    println!("{}: {error:#}", process.name());
                }
            }
        }
    };
    let ordered = tokio::select! {
        biased;
        () = stop.wait() => true,
        () = show => false,
    };
    if ordered {
        process.signal(Signal::SIGTERM)?;
    }
    let status = tokio::select! {
        status = process.wait_exit(PATIENCE) => status?,
        // It is killed when dropped.
        () = stop.wait() => bail!("the {} was killed by a second signal", process.name()),
    };
    for line in process.lines().iter().skip(shown.get()) {
        println!("{} | {}", process.name(), line.text);
    }
    ensure!(ordered, "the {} ended with {status}; its last lines say why", process.name());
    ensure!(
        status.success() || status.code() == Some(TERMINATED),
        "the {} ended with {status}",
        process.name()
    );
    Ok(())
}

/// Waits for `work`, but no longer than a signal takes to come: then `None`.
///
/// # Errors
/// Those of `work`.
pub async fn unless_stopped<T>(stop: &mut Stop, work: impl Future<Output = Result<T>>) -> Result<Option<T>> {
    tokio::select! {
        biased;
        () = stop.wait() => Ok(None),
        done = work => done.map(Some),
    }
}

/// As `work`, but an error after `limit`.
///
/// # Errors
/// Those of `work`, and the limit.
pub async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, work).await.with_context(|| format!("{what}: nothing within {limit:?}"))?
}
