//! The client of an inspector.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{Process, Ran, Request, TEXT_LIMIT, TIME_LIMIT, UnixSocket};

/// Longest answer in bytes: JSON escapes make text longer.
const ANSWER_LIMIT: u64 = 8 * TEXT_LIMIT;

/// Address of an inspector.
#[derive(Clone, Copy, Debug)]
pub struct Inspection(pub SocketAddr);

impl Inspection {
    /// Sends any request.
    ///
    /// # Errors
    /// If no answer comes in time, or the answer is an error.
    pub async fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let answer = tokio::time::timeout(TIME_LIMIT * 2, self.exchange(request)).await;
        let answer = answer.context("no answer in time").and_then(|answer| answer);
        answer.with_context(|| format!("inspector: {request:?}"))
    }

    async fn exchange<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let mut stream = BufReader::new(TcpStream::connect(self.0).await.context("connecting")?);
        stream.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes()).await?;
        let mut line = String::new();
        stream.take(ANSWER_LIMIT).read_line(&mut line).await?;
        let mut answer: Value = serde_json::from_str(&line).with_context(|| format!("answer {line:?}"))?;
        if let Some(error) = answer.get("error") {
            bail!("it answers: {error}");
        }
        let ok = answer.get_mut("ok").map(Value::take).context("an answer without content")?;
        Ok(serde_json::from_value(ok)?)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// As [`Inspection::ask`].
    pub async fn read(&self, path: &str) -> Result<String> {
        self.ask(&Request::Read(path.to_owned())).await
    }

    /// Finds the process of this name; an error if there is none or more than one.
    ///
    /// # Errors
    /// As [`Inspection::ask`].
    pub async fn process(&self, program: &str) -> Result<Process> {
        let all: Vec<Process> = self.ask(&Request::Processes).await?;
        let is = |process: &&Process| {
            let named = |arg: &String| arg.rsplit('/').next() == Some(program);
            // The simulator's role is its first argument if it is not the program's name.
            process.command.first().is_some_and(named) || process.command.get(1).is_some_and(named)
        };
        match all.iter().filter(is).collect::<Vec<_>>().as_slice() {
            [one] => Ok((*one).clone()),
            some => bail!("inspector: {program}: {some:?} instead of one process, among {all:?}"),
        }
    }

    /// Runs a program, which must succeed; returns its standard output.
    ///
    /// # Errors
    /// As [`Inspection::ask`], and if the program fails.
    pub async fn run(&self, command: &[&str]) -> Result<String> {
        let owned = command.iter().map(|arg| (*arg).to_owned()).collect();
        let ran: Ran = self.ask(&Request::Run(owned)).await?;
        if ran.code != Some(0) {
            bail!("inspector: {command:?}: {ran:?}");
        }
        Ok(ran.stdout)
    }

    /// Lists the TCP listeners in the network namespace of a process.
    ///
    /// # Errors
    /// As [`Inspection::ask`].
    pub async fn listeners(&self, process: &Process) -> Result<Vec<SocketAddr>> {
        self.ask(&Request::Listeners(process.pid)).await
    }

    /// Lists the unix sockets of the VM, and which of them a process can connect to.
    ///
    /// # Errors
    /// As [`Inspection::ask`].
    pub async fn unix_sockets(&self, process: &Process) -> Result<Vec<UnixSocket>> {
        self.ask(&Request::UnixSockets(process.pid)).await
    }

    /// Sends a request that may end the connection, so that no answer comes.
    pub async fn have_done(&self, request: &Request) {
        // Whether the request was carried out shows in what the machine does next.
        let _ = self.ask::<Value>(request).await;
    }
}
