//! What the machine itself takes: a process that does nothing but answer, under the same load as the service. The service's
//! figure next to it, in one run, is what the service adds.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// First argument of the program that makes it the process.
pub const ARGUMENT: &str = "control-process";
/// Bytes that the process answers at most.
const ANSWER_MAX: u32 = 1024 * 1024;
/// Time that an answer has.
const PATIENCE: Duration = Duration::from_secs(60);
/// Request of a list to the API.
const LIST: &[u8] = b"GET /v1/pods HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// The process. It ends when this is dropped.
#[derive(Debug)]
pub struct Control {
    process: Child,
    directory: TempDir,
}

impl Control {
    /// Starts this program a second time, as the process.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("sc-").tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(ARGUMENT)
            .arg(directory.path().join("socket"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut control =
            Self { process: command.spawn().context("starting the control process")?, directory };
        let mut ready = [0];
        let said = control.process.stdout.as_mut().context("it has no output")?.read(&mut ready)?;
        ensure!(said == 1, "the control process does not listen");
        Ok(control)
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process: for each connection, one after the other, answers each request, a size of 4 bytes, with as many bytes. Runs
/// until it is killed.
///
/// # Errors
/// If it cannot listen.
pub fn run(socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::io::stdout().write_all(b"!")?;
    std::io::stdout().flush()?;
    let mut connections = Vec::new();
    for stream in listener.incoming() {
        let stream = stream?;
        connections.push(std::thread::spawn(move || answer(stream)));
        connections.retain(|connection| !connection.is_finished());
    }
    Ok(())
}

fn answer(mut stream: UnixStream) -> std::io::Result<()> {
    loop {
        let mut size = [0; 4];
        stream.read_exact(&mut size)?;
        let size = u32::from_be_bytes(size).min(ANSWER_MAX) as usize;
        stream.write_all(&vec![b'x'; size])?;
    }
}

/// Times of the same call, to the service and to the process that does nothing.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// The service's, sorted.
    pub service: Vec<Duration>,
    /// The other's, sorted.
    pub control: Vec<Duration>,
}

/// Lists the pods, and asks the control process for an answer of the same size.
///
/// # Errors
/// If either does not answer.
pub fn ask(api: &Path, control: &Path) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let mut stream = connect(api)?;
    stream.write_all(LIST)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let service = begun.elapsed();
    ensure!(answer.starts_with(b"HTTP/1.1 200 "), "GET /v1/pods: {}", String::from_utf8_lossy(&answer));
    answer.truncate(ANSWER_MAX as usize);
    let begun = Instant::now();
    let mut stream = connect(control)?;
    stream.write_all(&u32::try_from(answer.len())?.to_be_bytes())?;
    stream.read_exact(&mut answer)?;
    Ok((service, begun.elapsed()))
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Exchanges single bytes with the control process, from a task of this program: two wake-ups each.
///
/// # Errors
/// If it does not answer.
pub async fn exchange(control: &Path, exchanges: usize) -> Result<Duration> {
    let mut stream = tokio::net::UnixStream::connect(control).await?;
    let begun = Instant::now();
    for _ in 0..exchanges {
        stream.write_all(&1_u32.to_be_bytes()).await?;
        stream.read_u8().await?;
    }
    Ok(begun.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_process_answers_as_many_bytes_as_are_asked_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = std::thread::spawn(move || answer(theirs));
        let mut asked = ours.try_clone().unwrap();
        for size in [1_u32, 70_000] {
            asked.write_all(&size.to_be_bytes()).unwrap();
            let mut answered = vec![0; size as usize];
            (&ours).read_exact(&mut answered).unwrap();
            assert!(answered.iter().all(|byte| *byte == b'x'));
        }
        drop((ours, asked));
        assert_eq!(process.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}
