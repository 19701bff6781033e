//! Runs a program of the image, with a limit for its time and its output.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::text::one_line;

/// Where programs are.
const DIRECTORY: &str = "/usr/sbin";
/// Most bytes of output that are kept; the rest is read and dropped.
const OUTPUT_MAX: usize = 16 * 1024;

/// A program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It is not in the image.
    #[error("{} is not in this image", .0.display())]
    Missing(PathBuf),
    /// It could not be run.
    #[error("running {}", path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// It had not ended in time, and was killed.
    #[error("{} has not ended within {} s and was killed", path.display(), limit.as_secs())]
    TooSlow {
        /// The program.
        path: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// It failed.
    #[error("{} failed ({status}): {said}", path.display())]
    Failed {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error, in one line.
        said: String,
    },
}

/// What a program left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// The failure of the program, with what it said about it.
    #[must_use]
    pub fn failed(&self, path: &Path, said: &[u8]) -> ProgramError {
        let said = Some(one_line(&String::from_utf8_lossy(said))).filter(|said| !said.is_empty());
        let said = said.unwrap_or_else(|| "it gave no reason".to_owned());
        ProgramError::Failed { path: path.to_owned(), status: self.status, said }
    }
}

/// Path of a program of this name, if it is in the image.
///
/// # Errors
/// It is not.
pub fn find(name: &str) -> Result<PathBuf, ProgramError> {
    let path = Path::new(DIRECTORY).join(name);
    if path.exists() { Ok(path) } else { Err(ProgramError::Missing(path)) }
}

/// Runs the program to its end. It has no standard input and, but for PATH and the locale, no environment.
///
/// # Errors
/// It can't be run, or takes longer than the limit. A failure of the program itself is none: see [`succeed`].
pub fn run(path: &Path, args: &[&str], limit: Duration) -> Result<Output, ProgramError> {
    let failed = |cause| ProgramError::Run { path: path.to_owned(), cause };
    let mut child = Command::new(path)
        .args(args)
        .env_clear()
        .env("PATH", DIRECTORY)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let deadline = Instant::now() + limit;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(io::Error::other("no pipes")));
    };
    let mut pipes = [Pipe::new(stdout.into()), Pipe::new(stderr.into())];
    if !read_all(&mut pipes, deadline).map_err(failed)? {
        // Not waited for: a program that hangs in the kernel, on a disk that does not answer, would not end by it.
        child.kill().and_then(|()| child.try_wait()).map_err(failed)?;
        return Err(ProgramError::TooSlow { path: path.to_owned(), limit });
    }
    let status = child.wait().map_err(failed)?;
    let [stdout, stderr] = pipes.map(|pipe| pipe.bytes);
    Ok(Output { status, stdout, stderr })
}

/// Runs the program, and takes its failure as one.
///
/// # Errors
/// As of [`run`], and if it does not end with 0.
pub fn succeed(path: &Path, args: &[&str], limit: Duration) -> Result<Output, ProgramError> {
    let output = run(path, args, limit)?;
    if output.status.success() {
        return Ok(output);
    }
    Err(output.failed(path, &output.stderr))
}

/// An output of a program.
struct Pipe {
    file: File,
    bytes: Vec<u8>,
    ended: bool,
}

impl Pipe {
    fn new(pipe: OwnedFd) -> Self {
        Self { file: pipe.into(), bytes: Vec::new(), ended: false }
    }

    fn read_once(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let length = match self.file.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            length => length?,
        };
        let room = OUTPUT_MAX.saturating_sub(self.bytes.len()).min(length);
        self.bytes.extend_from_slice(buffer.get(..room).unwrap_or_default());
        self.ended = length == 0;
        Ok(())
    }
}

/// Reads the outputs to their ends; returns false if the time has passed before.
fn read_all(pipes: &mut [Pipe], deadline: Instant) -> io::Result<bool> {
    while pipes.iter().any(|pipe| !pipe.ended) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let open = pipes.iter().filter(|pipe| !pipe.ended);
        let mut fds: Vec<_> = open.map(|pipe| PollFd::new(pipe.file.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (pipe, _) in pipes.iter_mut().filter(|pipe| !pipe.ended).zip(ready).filter(|(_, ready)| *ready) {
            pipe.read_once()?;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: &str = "/bin/sh";
    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str, limit: Duration) -> Result<Output, ProgramError> {
        run(Path::new(SHELL), &["-c", &format!("PATH=/usr/bin:/bin; {script}")], limit)
    }

    #[test]
    fn both_outputs_and_the_status_come_back() {
        let output = shell("echo out; echo err >&2; exit 3", LONG).unwrap();
        assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn a_flood_of_output_is_cut_and_blocks_nothing() {
        let output = shell("yes 0123456 | head -c 1000000; yes | head -c 1000000 >&2", LONG).unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (OUTPUT_MAX, OUTPUT_MAX));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let slow = shell("exec sleep 60", Duration::from_millis(50));
        assert!(matches!(slow, Err(ProgramError::TooSlow { .. })));
    }

    #[test]
    fn a_failure_has_its_words_in_one_line() {
        let failed = succeed(Path::new(SHELL), &["-c", "printf 'a\\nb' >&2; exit 1"], LONG).unwrap_err();
        assert_eq!(failed.to_string(), "/bin/sh failed (exit status: 1): a b");
        let silent = succeed(Path::new(SHELL), &["-c", "kill -9 $$"], LONG).unwrap_err();
        assert_eq!(silent.to_string(), "/bin/sh failed (signal: 9 (SIGKILL)): it gave no reason");
        assert!(matches!(find("no-such-program"), Err(ProgramError::Missing(_))));
    }
}
