//! A process under test, started again when it ends: as systemd and the node's daemon set do.

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

/// How long after an end of its own it is started again.
const RESTART: Duration = Duration::from_millis(200);

/// Makes its command line.
pub type Make = Box<dyn Fn() -> Result<Command> + Send>;

/// A process and its successors. Killed when dropped.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    orders: mpsc::Sender<(Order, oneshot::Sender<Result<()>>)>,
    pid: watch::Receiver<Option<i32>>,
    past: Arc<Mutex<Past>>,
    task: JoinHandle<Result<()>>,
}

/// What is left of those that have ended.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// What each said.
    pub logs: Vec<String>,
    /// How those ended that nobody ended.
    pub own_ends: Vec<ExitStatus>,
}

#[derive(Debug)]
enum Order {
    /// End it by a signal; the next one starts so much later.
    End(Signal, Duration),
    /// Send a signal that does not end it.
    Signal(Signal),
    /// End it for good, in good order.
    Stop,
}

/// What ends the life of one process.
enum Ended {
    ByItself(ExitStatus),
    Restart(Duration),
    ForGood,
}

impl Program {
    /// Starts it.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(name: &'static str, make: Make) -> Result<Self> {
        let (orders, taken) = mpsc::channel(8);
        let (told, pid) = watch::channel(None);
        let past = Arc::<Mutex<Past>>::default();
        let first = Child::spawn(name, make()?)?;
        told.send_replace(Some(first.pid()));
        let task = tokio::spawn(keep(name, first, make, taken, told, Arc::clone(&past)));
        Ok(Self { name, orders, pid, past, task })
    }

    /// Its process id, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        *self.pid.borrow()
    }

    /// Ends it by a signal, and lets the next one start after a pause; returns once that one runs.
    ///
    /// # Errors
    /// The next one can't be started.
    pub async fn end(&self, signal: Signal, pause: Duration) -> Result<()> {
        self.order(Order::End(signal, pause)).await
    }

    /// Sends a signal that does not end it.
    ///
    /// # Errors
    /// It does not run.
    pub async fn signal(&self, signal: Signal) -> Result<()> {
        self.order(Order::Signal(signal)).await
    }

    /// Ends it for good, in good order, and answers what there was.
    ///
    /// # Errors
    /// It does not end.
    pub async fn stop(self) -> Result<Past> {
        self.order(Order::Stop).await?;
        Ok(self.past().clone())
    }

    /// What those said that have ended, and how.
    #[must_use]
    pub fn history(&self) -> Past {
        self.past().clone()
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn order(&self, order: Order) -> Result<()> {
        let (done, result) = oneshot::channel();
        let gone = || anyhow!("{}: nobody keeps it running", self.name);
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

/// One process, to its end, and who is to be told once there is another one.
async fn live(
    child: &mut Child,
    orders: &mut mpsc::Receiver<(Order, oneshot::Sender<Result<()>>)>,
) -> Result<(Ended, Option<oneshot::Sender<Result<()>>>)> {
    loop {
        let (order, done) = tokio::select! {
            status = child.wait_exit(PATIENCE) => return Ok((Ended::ByItself(status?), None)),
            order = orders.recv() => order.context("nobody wants it any more")?,
        };
        match order {
            Order::Signal(signal) => drop(done.send(child.signal(signal))),
            Order::End(signal, pause) => {
                // One that has been stopped would not take it.
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
    async fn what_ends_is_started_again_and_only_its_own_ends_are_told() {
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
        assert!(program.history().own_ends.is_empty());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(second), Signal::SIGKILL).unwrap();
        let other = |pid: &Option<i32>| pid.is_some_and(|pid| pid != second);
        tokio::time::timeout(PATIENCE, program.pid.clone().wait_for(other)).await.unwrap().unwrap();
        assert_eq!(program.history().own_ends.len(), 1);
    }
}
