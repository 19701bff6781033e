//! A runtime of one thread on which bulk data wait for everything else.
//!
//! tokio runs its tasks in the order in which they became ready. A request passes two tasks in each process, its relay and
//! its SSH session, and would wait for a burst of every busy stream before each of them. Here a task that has moved a burst
//! waits in a queue of its own. One of them goes on at a time, and only when no other task is ready and the
//! sockets have nothing new: so a request waits at most for the burst that is under way.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;

/// Most operations of other tasks before the next waiting task goes on all the same: a thread that is never idle must not
/// stop bulk data.
const OPERATIONS: u32 = 64;

thread_local! {
    static TURNS: RefCell<Turns> = RefCell::default();
}

/// The tasks of this thread that have moved a burst and wait.
#[derive(Debug, Default)]
struct Turns {
    /// Whether the runtime of this thread is a [`SingleThread`].
    active: bool,
    /// Counts the times at which no task was ready.
    round: u64,
    waiting: VecDeque<Waker>,
    /// Number of the first one that waits: as many have gone on.
    first: u64,
    /// Whether the sockets were asked since the last one went on.
    asked: bool,
    /// Operations since then.
    operations: u32,
}

impl Turns {
    /// Lets the first one go on.
    fn next(&mut self) -> Option<Waker> {
        let next = self.waiting.pop_front();
        self.first += u64::from(next.is_some());
        (self.asked, self.operations) = (false, 0);
        next
    }
}

/// The place of a task in the queue; a default one has none.
#[derive(Debug, Default)]
pub(crate) struct Turn(Option<u64>);

impl Turn {
    /// Waits until it is the task's turn. Each wait is a new one. Cancellation safe. Ready at once on other runtimes.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        TURNS.with_borrow_mut(|turns| {
            let place = match self.0 {
                Some(number) => number.checked_sub(turns.first),
                None if turns.active => {
                    self.0 = Some(turns.first + turns.waiting.len() as u64);
                    turns.waiting.push_back(cx.waker().clone());
                    return Poll::Pending;
                }
                None => None,
            };
            let waker = place.and_then(|place| usize::try_from(place).ok());
            let Some(waker) = waker.and_then(|place| turns.waiting.get_mut(place)) else {
                self.0 = None;
                return Poll::Ready(());
            };
            waker.clone_from(cx.waker());
            Poll::Pending
        })
    }

    /// Whether the task has asked for its turn.
    pub(crate) fn is_waiting(&self) -> bool {
        self.0.is_some()
    }
}

/// Number of times at which no task was ready. None on other runtimes.
pub(crate) fn round() -> Option<u64> {
    TURNS.with_borrow(|turns| turns.active.then_some(turns.round))
}

/// Counts an operation of a task. Returns [`round`].
pub(crate) fn operation() -> Option<u64> {
    let (round, late) = TURNS.with_borrow_mut(|turns| {
        if !turns.active {
            return (None, None);
        }
        turns.operations += 1;
        let late = (turns.operations > OPERATIONS).then(|| turns.next()).flatten();
        (Some(turns.round), late)
    });
    if let Some(waker) = late {
        waker.wake();
    }
    round
}

/// Called when no task is ready.
fn on_idle() {
    let (waits, next) = TURNS.with_borrow_mut(|turns| {
        turns.round += 1;
        let waits = !turns.waiting.is_empty();
        // Twice for each: a task that a socket has made ready comes before, with all that it makes ready.
        let next = if turns.asked { turns.next() } else { None };
        turns.asked = waits && next.is_none();
        (waits, next)
    });
    if waits {
        // Makes the runtime ask the sockets without waiting for them, and come back.
        let asked = pin!(yield_now()).poll(&mut Context::from_waker(Waker::noop()));
        debug_assert!(asked.is_pending(), "a yield that does not wait");
    }
    if let Some(waker) = next {
        waker.wake();
    }
}

/// A runtime of one thread, with all its drivers.
#[derive(Debug)]
pub struct SingleThread(Runtime);

impl SingleThread {
    /// Makes the runtime.
    ///
    /// # Errors
    /// The process may open no more files.
    pub fn new() -> io::Result<Self> {
        Builder::new_current_thread().enable_all().on_thread_park(on_idle).build().map(Self)
    }

    /// Runs a future to its end on this thread, with the tasks that it spawns.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _active = Active::begin();
        self.0.block_on(future)
    }

    /// Ends the runtime without waiting for blocked threads.
    pub fn shutdown_background(self) {
        self.0.shutdown_background();
    }
}

/// The time in which this thread runs a [`SingleThread`].
struct Active;

impl Active {
    fn begin() -> Self {
        TURNS.with_borrow_mut(|turns| turns.active = true);
        Self
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let waiting = TURNS.with_borrow_mut(|turns| {
            turns.active = false;
            turns.first += turns.waiting.len() as u64;
            std::mem::take(&mut turns.waiting)
        });
        // Their tasks may run again on this runtime, and no one else would wake them.
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use secure_comms_protocol::limits::MESSAGE_MAX;
    use tokio::sync::{mpsc, watch};
    use tokio::task::JoinHandle;

    use super::*;
    use crate::budget::{BURST, Burst};

    /// What tasks have moved, in bytes.
    type Total = watch::Sender<usize>;

    /// A task that always has bytes to move, and counts them.
    fn busy(total: &Total) -> JoinHandle<()> {
        let total = total.clone();
        tokio::spawn(async move {
            let mut burst = Burst::default();
            loop {
                total.send_modify(|total| *total += MESSAGE_MAX);
                burst.moved(MESSAGE_MAX).await;
            }
        })
    }

    /// Waits until the tasks have moved some more bursts.
    async fn more(total: &Total, bursts: usize) {
        let until = *total.borrow() + bursts * BURST;
        total.subscribe().wait_for(|total| *total >= until).await.unwrap();
    }

    /// A chain of tasks, each of which passes on what it is given, as a relay and its SSH session do.
    fn chain(tasks: usize) -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
        let (first, mut last) = mpsc::channel(1);
        for _ in 0..tasks {
            let (send, receive) = mpsc::channel(1);
            let mut from = std::mem::replace(&mut last, receive);
            tokio::spawn(async move {
                while let Some(()) = from.recv().await {
                    if send.send(()).await.is_err() {
                        return;
                    }
                }
            });
        }
        (first, last)
    }

    #[test]
    fn a_request_waits_for_one_burst_at_most() {
        SingleThread::new().unwrap().block_on(async {
            let total = Total::default();
            for _ in 0..8 {
                busy(&total);
            }
            let (first, mut last) = chain(4);
            for _ in 0..100 {
                more(&total, 20).await;
                let before = *total.borrow();
                first.send(()).await.unwrap();
                last.recv().await.unwrap();
                let moved = *total.borrow() - before;
                assert!(moved <= BURST, "{moved} bytes before the answer");
            }
        });
    }

    #[test]
    fn busy_tasks_share_the_thread() {
        SingleThread::new().unwrap().block_on(async {
            let totals: Vec<_> = (0..4).map(|_| Total::default()).collect();
            for total in &totals {
                busy(total);
            }
            for total in &totals {
                more(total, 100).await;
            }
            let moved: Vec<_> = totals.iter().map(|total| *total.borrow()).collect();
            let spread = moved.iter().max().unwrap() - moved.iter().min().unwrap();
            assert!(spread <= 2 * BURST, "{moved:?}");
        });
    }

    /// Becomes ready again at once.
    async fn again() {
        let mut first = true;
        poll_fn(|cx| {
            if !std::mem::take(&mut first) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    #[test]
    fn bulk_data_go_on_while_another_task_never_rests() {
        SingleThread::new().unwrap().block_on(async {
            let total = Total::default();
            busy(&total);
            tokio::spawn(async {
                let mut burst = Burst::default();
                loop {
                    burst.moved(1).await;
                    again().await;
                }
            });
            more(&total, 20).await;
        });
    }

    #[test]
    fn a_task_that_left_while_it_waited_holds_up_no_other() {
        SingleThread::new().unwrap().block_on(async {
            let total = Total::default();
            busy(&total);
            for _ in 0..20 {
                let leaver = busy(&Total::default());
                more(&total, 4).await;
                leaver.abort();
                more(&total, 4).await;
            }
        });
    }

    #[test]
    fn a_wait_does_not_outlast_the_time_in_which_its_runtime_runs() {
        let runtime = SingleThread::new().unwrap();
        let total = Total::default();
        runtime.block_on(async {
            busy(&total);
            more(&total, 2).await;
        });
        runtime.block_on(more(&total, 2));
    }
}
