//! The held dials of one sandbox, with the tasks that watch them.

use std::collections::HashMap;
use std::future::Future;

use tokio::sync::oneshot;

use super::super::machine::DialNo;
use super::super::world::Dial;

/// A held dial: its watch has it, and gives it back on demand.
struct HeldDial<D> {
    take: oneshot::Sender<oneshot::Sender<D>>,
    server_name: String,
}

/// The held dials by their numbers. One that is removed without being taken is closed.
pub(super) struct HeldDials<D>(HashMap<DialNo, HeldDial<D>>);

impl<D: Dial> HeldDials<D> {
    pub(super) fn new() -> Self {
        Self(HashMap::new())
    }

    /// Holds a dial. What it returns watches the dial, and has to run: why it is of no more use, or `None` once it is taken
    /// or removed.
    pub(super) fn hold(
        &mut self,
        number: DialNo,
        mut dial: D,
    ) -> impl Future<Output = Option<String>> + Send + use<D> {
        let (take, taken) = oneshot::channel::<oneshot::Sender<D>>();
        self.0.insert(number, HeldDial { take, server_name: dial.server_name() });
        async move {
            tokio::select! {
                back = taken => {
                    match back {
                        // If nothing waits for it, it is closed.
                        Ok(back) => drop(back.send(dial)),
                        // It was removed: there are too many.
                        Err(_) => dial.supersede(),
                    }
                    None
                }
                reason = dial.closed() => Some(reason),
            }
        }
    }

    /// Asks a dial's watch for the dial.
    pub(super) fn take(&mut self, number: DialNo) -> Option<oneshot::Receiver<D>> {
        let held = self.0.remove(&number)?;
        let (back, taken) = oneshot::channel();
        held.take.send(back).ok()?;
        Some(taken)
    }

    /// Whether it was held.
    pub(super) fn remove(&mut self, number: DialNo) -> bool {
        self.0.remove(&number).is_some()
    }

    /// The server name that a dial asks for; empty if it is not held.
    pub(super) fn server_name(&self, number: DialNo) -> &str {
        self.0.get(&number).map_or("", |held| &held.server_name)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
