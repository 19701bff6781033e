//! A process under test and its supervisor, which restarts it as systemd and the node's daemon set do.

use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::harness::process::Child;
use crate::harness::scene::PATIENCE;

/// Pause before a process that ended unexpectedly is restarted.
const RESTART: Duration = Duration::from_millis(200);

/// Builds the command line.
pub(super) type Make = Box<dyn Fn() -> Result<Command> + Send>;

/// A process and its successors; killed when dropped.
#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    orders: mpsc::Sender<(Order, oneshot::Sender<Result<()>>)>,
    pid: watch::Receiver<Option<i32>>,
    past: Arc<Mutex<Past>>,
    task: JoinHandle<Result<()>>,
}

/// Record of the processes that have ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Past {
    /// Their logs.
    pub logs: Vec<String>,
    /// Exit statuses of those that ended unexpectedly.
    pub own_ends: Vec<ExitStatus>,
}

#[derive(Debug)]
enum Order {
    /// Ends the process by a signal; the next one starts after a pause.
    End(Signal, Duration),
    /// Sends a signal that does not end the process.
    Signal(Signal),
    /// Stops the process for good, in good order.
    Stop,
}

/// Why a process ended.
enum Ended {
    ByItself(ExitStatus),
    Restart(Duration),
    ForGood,
}

impl Program {
    /// Starts it.
    ///
    /// # Errors
    /// If it can't be started.
    pub(super) fn start(name: &'static str, make: Make) -> Result<Self> {
        let (orders, taken) = mpsc::channel(8);
        let (started, pid) = watch::channel(None);
        let past = Arc::<Mutex<Past>>::default();
        let first = Child::spawn(name, make()?)?;
        started.send_replace(Some(first.pid()));
        let task = tokio::spawn(keep(name, first, make, taken, started, Arc::clone(&past)));
        Ok(Self { name, orders, pid, past, task })
    }

    /// Process id, if it runs.
    #[must_use]
    pub(super) fn pid(&self) -> Option<i32> {
        *self.pid.borrow()
    }

    /// Ends the process by a signal, and starts the next one after a pause; returns once that one runs.
    ///
    /// # Errors
    /// If the next one can't be started.
    pub(super) async fn end(&self, signal: Signal, pause: Duration) -> Result<()> {
        self.order(Order::End(signal, pause)).await
    }

    /// Sends a signal that does not end it.
    ///
    /// # Errors
    /// If the process does not run.
    pub(super) async fn signal(&self, signal: Signal) -> Result<()> {
        self.order(Order::Signal(signal)).await
    }

    /// Stops the process for good, in good order; returns the record of all of them.
    ///
    /// # Errors
    /// If the process does not end.
    pub(super) async fn stop(self) -> Result<Past> {
        self.order(Order::Stop).await?;
        Ok(self.past().clone())
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn order(&self, order: Order) -> Result<()> {
        let (done, result) = oneshot::channel();
        let gone = || anyhow!("{}: its supervisor has ended", self.name);
        self.orders.send((order, done)).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    name: &'static str,
    mut child: Child,
    make: Make,
    mut orders: mpsc::Receiver<(Order, oneshot::Sender<Result<()>>)>,
    pid: watch::Sender<Option<i32>>,
    past: Arc<Mutex<Past>>,
) -> Result<()> {
    loop {
        let (ended, done) = live(&mut child, &mut orders).await?;
        pid.send_replace(None);
        let pause = {
            let mut past = past.lock().unwrap_or_else(PoisonError::into_inner);
            past.logs.push(child.log());
            match ended {
                Ended::ByItself(status) => {
                    past.own_ends.push(status);
                    RESTART
                }
                Ended::Restart(pause) => pause,
                Ended::ForGood => {
                    drop(done.map(|done| done.send(Ok(()))));
                    return Ok(());
                }
            }
        };
        tokio::time::sleep(pause).await;
        child = Child::spawn(name, make()?)?;
        pid.send_replace(Some(child.pid()));
        drop(done.map(|done| done.send(Ok(()))));
    }
}

/// Runs one process to its end; `started` is notified once its successor runs.
async fn live(
    child: &mut Child,
    orders: &mut mpsc::Receiver<(Order, oneshot::Sender<Result<()>>)>,
) -> Result<(Ended, Option<oneshot::Sender<Result<()>>>)> {
    loop {
        let (order, done) = tokio::select! {
            status = child.wait_exit(PATIENCE) => return Ok((Ended::ByItself(status?), None)),
            order = orders.recv() => order.context("its supervisor was dropped")?,
        };
        match order {
            Order::Signal(signal) => drop(done.send(child.signal(signal))),
            Order::End(signal, pause) => {
                // A stopped process (SIGSTOP) does not handle SIGTERM.
                child.signal(signal)?;
                child.signal(Signal::SIGCONT)?;
                child.wait_exit(PATIENCE).await?;
                return Ok((Ended::Restart(pause), Some(done)));
            }
            Order::Stop => {
                child.signal(Signal::SIGCONT)?;
                child.signal(Signal::SIGTERM)?;
                child.wait_exit(PATIENCE).await?;
                return Ok((Ended::ForGood, Some(done)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ended_processes_restart_and_unexpected_ends_are_reported() {
        let make = || {
            let mut command = Command::new("sh");
            command.args(["-c", "echo here; exec sleep 1000"]);
            Ok(command)
        };
        let program = Program::start("sh", Box::new(make)).unwrap();
        let first = program.pid().unwrap();
        program.end(Signal::SIGKILL, Duration::ZERO).await.unwrap();
        let second = program.pid().unwrap();
        assert_ne!(first, second);
        assert!(program.past().own_ends.is_empty());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(second), Signal::SIGKILL).unwrap();
        let other = |pid: &Option<i32>| pid.is_some_and(|pid| pid != second);
        tokio::time::timeout(PATIENCE, program.pid.clone().wait_for(other)).await.unwrap().unwrap();
        assert_eq!(program.past().own_ends.len(), 1);
    }
}
