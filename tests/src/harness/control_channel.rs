//! The control channel over the stock client, to exchange messages by hand.

use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use super::scene::PATIENCE;
use crate::simulators::openssh::OpenSsh;

/// A running `ssh -s .. secure-comms`. It is killed when dropped.
#[derive(Debug)]
pub struct ControlChannel {
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    stderr: ChildStderr,
}

impl ControlChannel {
    /// Logs in as `user` and asks for the subsystem; `extra` are more arguments of `ssh`.
    ///
    /// # Errors
    /// `ssh` can't be started.
    pub fn open(ssh: &OpenSsh, user: &str, extra: &[&str]) -> Result<Self> {
        let arguments: Vec<&str> = extra.iter().copied().chain(["-s"]).collect();
        Self::start(ssh.command(user, &arguments, &["secure-comms"]))
    }

    /// Starts this `ssh`, whose arguments ask for the subsystem.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("starting ssh")?;
        let stdin = child.stdin.take().context("ssh: no stdin")?;
        let stdout = child.stdout.take().context("ssh: no stdout")?;
        let stderr = child.stderr.take().context("ssh: no stderr")?;
        Ok(Self { _child: child, stdin, lines: BufReader::new(stdout).lines(), stderr })
    }

    /// Sends one line.
    ///
    /// # Errors
    /// `ssh` has ended.
    pub async fn say(&mut self, line: &str) -> Result<()> {
        Ok(self.stdin.write_all(format!("{line}\n").as_bytes()).await?)
    }

    /// Waits for the next message of this kind, and returns its content.
    ///
    /// # Errors
    /// The channel ends without one, or there is none within [`PATIENCE`].
    pub async fn hears(&mut self, key: &str) -> Result<Value> {
        let search = async {
            while let Some(line) = self.lines.next_line().await? {
                let mut message: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
                if let Some(content) = message.get_mut(key) {
                    return Ok(content.take());
                }
            }
            bail!("the control channel ended without {key:?}")
        };
        timeout(PATIENCE, search).await.with_context(|| format!("waiting for {key:?}"))?
    }

    /// Waits for the end; returns what `ssh` printed on standard error.
    ///
    /// # Errors
    /// The channel stays for longer than [`PATIENCE`].
    pub async fn ends(mut self) -> Result<String> {
        let mut text = String::new();
        let rest = async {
            // Reads to the end, so that a full pipe does not block ssh.
            while let Ok(Some(_)) = self.lines.next_line().await {}
            self.stderr.read_to_string(&mut text).await
        };
        timeout(PATIENCE, rest).await.context("the control channel stays")??;
        Ok(text)
    }
}
