//! Real processes under test: their output by line, their exit status, signals and memory.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
pub use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

use super::binaries::{BIN_DIR, OLD_BIN_DIR};

pub use super::binaries::{Binaries, ensure_built, old_binaries};

/// Output stream of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line that a process wrote.
#[derive(Clone, Debug)]
pub struct Line {
    /// Time at which it was read, since the start of the process.
    pub at: Duration,
    /// Output stream it was written to.
    pub output: Output,
    /// Its text, without the line end.
    pub text: String,
}

/// A child process; killed when dropped.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: Pid,
    child: tokio::process::Child,
    log: Arc<Log>,
}

/// The lines so far; the watched value only signals a change.
#[derive(Debug)]
struct Log {
    start: Instant,
    lines: Mutex<Vec<Line>>,
    /// Number of output streams that are still open.
    open: watch::Sender<u8>,
}

impl Child {
    /// Starts `command`; `name` is what errors and logs call it. Standard input is empty.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(name: impl Into<String>, mut command: Command) -> Result<Self> {
        let name = name.into();
        // Ours: the programs warn of a variable of this prefix that they do not know.
        command.env_remove(BIN_DIR).env_remove(OLD_BIN_DIR);
        let program = command.as_std().get_program().to_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("{name}: starting {}", program.display()))?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = Pid::from_raw(id.with_context(|| format!("{name}: it has no pid"))?);
        let log =
            Arc::new(Log { start: Instant::now(), lines: Mutex::default(), open: watch::Sender::new(2) });
        let stdout = child.stdout.take().with_context(|| format!("{name}: no stdout"))?;
        let stderr = child.stderr.take().with_context(|| format!("{name}: no stderr"))?;
        tokio::spawn(Arc::clone(&log).collect(stdout, Output::Stdout));
        tokio::spawn(Arc::clone(&log).collect(stderr, Output::Stderr));
        Ok(Self { name, pid, child, log })
    }

    /// The name given at its start.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits for a line, past or coming, that `wanted` accepts, and returns it.
    ///
    /// # Errors
    /// After `deadline`, or when its outputs are closed; with the whole log.
    pub async fn wait_for(&self, wanted: impl Fn(&str) -> bool, deadline: Duration) -> Result<String> {
        self.wait_from(0, wanted, deadline).await
    }

    /// As [`Child::wait_for`], for a line that contains `text`.
    ///
    /// # Errors
    /// As there; the error names the text.
    pub async fn wait_for_text(&self, text: &str, deadline: Duration) -> Result<String> {
        let found = self.wait_for(|line| line.contains(text), deadline).await;
        found.with_context(|| format!("{}: waiting for {text:?}", self.name))
    }

    /// As [`Child::wait_for`], for lines after the first `mark` ones (see [`Child::mark`]).
    ///
    /// # Errors
    /// As [`Child::wait_for`].
    pub async fn wait_from(
        &self,
        mark: usize,
        wanted: impl Fn(&str) -> bool,
        deadline: Duration,
    ) -> Result<String> {
        let mut changes = self.log.open.subscribe();
        let search = async {
            let mut next = mark;
            loop {
                // Read before the lines, so that a line written after the last check wakes this task again.
                let open = *changes.borrow_and_update();
                let lines = self.log.since(next);
                next += lines.len();
                if let Some(line) = lines.into_iter().find(|line| wanted(&line.text)) {
                    return Some(line.text);
                }
                if open == 0 || changes.changed().await.is_err() {
                    return None;
                }
            }
        };
        match tokio::time::timeout(deadline, search).await {
            Ok(Some(line)) => Ok(line),
            Ok(None) => bail!("{}: it ended without the line waited for\n{}", self.name, self.log()),
            Err(_) => {
                bail!("{}: the line waited for did not come in {deadline:?}\n{}", self.name, self.log())
            }
        }
    }

    /// Number of lines so far: a position for [`Child::wait_from`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.log.lock().len()
    }

    /// Every line so far.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.log.since(0)
    }

    /// The log as text, with times.
    #[must_use]
    pub fn log(&self) -> String {
        self.lines().iter().fold(String::new(), |mut text, line| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{} | {line}", self.name);
            text
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Only until it is reaped: later its pid may belong to another process.
        self.child.id().with_context(|| format!("{}: {signal}: it has ended already", self.name))?;
        nix::sys::signal::kill(self.pid, signal).with_context(|| format!("{}: sending {signal}", self.name))
    }

    /// Kills it with SIGKILL, and waits until it has ended.
    ///
    /// # Errors
    /// If that fails.
    pub async fn kill9(&mut self) -> Result<()> {
        self.child.kill().await.with_context(|| format!("{}: killing it", self.name))
    }

    /// Stops it (SIGSTOP).
    ///
    /// # Errors
    /// If the process is gone.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Continues it (SIGCONT).
    ///
    /// # Errors
    /// If the process is gone.
    pub fn cont(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Resident memory in KiB.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn rss_kib(&self) -> Result<u64> {
        self.status("VmRSS")
    }

    /// Peak of its resident memory so far, in KiB.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn peak_kib(&self) -> Result<u64> {
        self.status("VmHWM")
    }

    /// Number of its threads.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn threads(&self) -> Result<u64> {
        self.status("Threads")
    }

    /// Number of its open files.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn open_files(&self) -> Result<usize> {
        let path = format!("/proc/{}/fd", self.pid);
        let files = std::fs::read_dir(&path).with_context(|| format!("{}: reading {path}", self.name))?;
        Ok(files.count())
    }

    /// Waits until it has at most `most` open files. There is no event to await, so this polls.
    ///
    /// # Errors
    /// After `deadline`, with the number of open files and the whole log, or if the process is gone.
    pub async fn wait_for_files(&self, most: usize, deadline: Duration) -> Result<()> {
        let poll = async {
            while self.open_files()? > most {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        match tokio::time::timeout(deadline, poll).await {
            Ok(polled) => polled,
            Err(_) => {
                let open = self.open_files()?;
                bail!("{}: {open} files stay open, expected {most}\n{}", self.name, self.log())
            }
        }
    }

    /// A number from `/proc/PID/status`.
    fn status(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let status =
            std::fs::read_to_string(&path).with_context(|| format!("{}: reading {path}", self.name))?;
        let fields: HashMap<_, _> = status.lines().filter_map(|line| line.split_once(':')).collect();
        let value = fields.get(field).map(|value| value.trim().trim_end_matches(" kB"));
        value
            .and_then(|value| value.parse().ok())
            .with_context(|| format!("{}: no {field} in {path}", self.name))
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// After `deadline`, with the whole log; the process goes on running.
    pub async fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        match tokio::time::timeout(deadline, self.child.wait()).await {
            Ok(status) => {
                let status = status.with_context(|| format!("{}: waiting for its end", self.name))?;
                self.drain(deadline).await;
                Ok(status)
            }
            Err(_) => Err(anyhow!("{}: it did not end within {deadline:?}\n{}", self.name, self.log())),
        }
    }

    /// Reads the last lines of an ended process.
    async fn drain(&self, deadline: Duration) {
        let mut open = self.log.open.subscribe();
        // A grandchild may keep the output streams open for longer.
        let _ = tokio::time::timeout(deadline.min(Duration::from_secs(1)), open.wait_for(|open| *open == 0))
            .await;
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let output = if self.output == Output::Stderr { "E" } else { " " };
        write!(f, "{:9.3}{output} {}", self.at.as_secs_f64(), self.text)
    }
}

impl Log {
    async fn collect(self: Arc<Self>, pipe: impl AsyncRead + Unpin, output: Output) {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        // Bytes, not `lines()`: output that is not UTF-8 must not end the log.
        while matches!(pipe.read_until(b'\n', &mut bytes).await, Ok(1..)) {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            self.lock().push(Line { at: self.start.elapsed(), output, text });
            self.open.send_modify(|_| {});
        }
        self.open.send_modify(|open| *open = open.saturating_sub(1));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since(&self, mark: usize) -> Vec<Line> {
        self.lock().get(mark..).unwrap_or_default().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn sh(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Child::spawn("sh", command).unwrap()
    }

    #[tokio::test]
    async fn a_line_of_either_output_is_found_whenever_it_comes() {
        let child = sh("echo one; echo two >&2; exec sleep 100");
        assert_eq!(child.wait_for_text("tw", SOON).await.unwrap(), "two");
        assert_eq!(child.wait_for_text("one", SOON).await.unwrap(), "one");
        assert!(child.rss_kib().unwrap() > 0);
    }

    #[tokio::test]
    async fn waiting_on_an_ended_process_fails_with_its_log() {
        let mut child = sh("echo only this; exit 3");
        assert_eq!(child.wait_exit(SOON).await.unwrap().code(), Some(3));
        let error = format!("{:#}", child.wait_for_text("never", SOON).await.unwrap_err());
        assert!(error.contains("\"never\"") && error.contains("only this"), "{error}");
        assert!(child.signal(Signal::SIGTERM).is_err());
    }

    #[tokio::test]
    async fn a_mark_hides_the_lines_before_it() {
        let child = sh("echo again; read x < /dev/zero");
        child.wait_for_text("again", SOON).await.unwrap();
        let mark = child.mark();
        assert!(child.wait_from(mark, |line| line == "again", Duration::from_millis(50)).await.is_err());
    }

    #[tokio::test]
    async fn a_stopped_process_goes_on_and_a_killed_one_is_gone() {
        let mut child = sh("trap 'echo got it; exit 0' TERM; echo ready; while :; do sleep 0.01; done");
        child.wait_for_text("ready", SOON).await.unwrap();
        child.stop().unwrap();
        child.signal(Signal::SIGTERM).unwrap();
        assert!(child.wait_exit(Duration::from_millis(50)).await.is_err());
        child.cont().unwrap();
        assert!(child.wait_exit(SOON).await.unwrap().success());
        let mut child = sh("exec sleep 100");
        child.kill9().await.unwrap();
        assert!(child.rss_kib().is_err());
    }
}
