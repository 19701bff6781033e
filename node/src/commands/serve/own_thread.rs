//! A thread with a runtime of its own, for the parts that only show the service or give it orders: they answer while the
//! threads of the pods compute.

use std::convert::Infallible;
use std::io;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Its threads for blocking work, as on the store. Each ends when it was idle for 10 s.
const BLOCKING_THREADS: usize = 2;

/// The thread. Dropping it cancels what runs there.
#[derive(Debug)]
pub(super) struct OwnThread {
    runtime: Handle,
    // Dropping it ends the thread, which nothing waits for: its tasks own what they use.
    _end: oneshot::Sender<Infallible>,
}

impl OwnThread {
    /// Starts it under this name.
    ///
    /// # Errors
    /// There can be no more threads or file descriptors.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .thread_name(name)
            .max_blocking_threads(BLOCKING_THREADS)
            .build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<Infallible>();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let Err(_) = runtime.block_on(ended);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, _end: end })
    }

    /// Where to spawn.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn it_runs_tasks_while_the_caller_is_blocked() {
        let thread = OwnThread::start("test").unwrap();
        let (done, is_done) = mpsc::channel();
        let mut tasks = JoinSet::new();
        tasks.spawn_on(async move { done.send(()).unwrap() }, thread.runtime());
        // Blocks the only thread of this runtime.
        is_done.recv_timeout(Duration::from_secs(30)).unwrap();
        assert!(tasks.join_next().await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn its_end_cancels_what_runs_there() {
        let thread = OwnThread::start("test").unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn_on(std::future::pending::<()>(), thread.runtime());
        drop(thread);
        assert!(tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
    }
}
