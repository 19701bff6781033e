//! Carries out what the machine asks for.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, sleep};

use super::super::machine::{Cause, Connection, DialNo, Effect, Slot};
use super::super::world::World;
use super::Actor;
use super::operations::{Done, Outcome};
use crate::pods::Runtime;

impl<W: World> Actor<W> {
    pub(super) fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare | Effect::Start(_) | Effect::Halt | Effect::Stop(_) => self.of_channel(effect),
            Effect::Check | Effect::Open => self.of_release(effect),
            Effect::Finish(dial) => self.finish(dial),
            Effect::Relay(dial) => self.relay(dial),
            Effect::Cut(dial) => {
                if let Some(relay) = self.relays.remove(&dial) {
                    relay.abort();
                }
            }
            Effect::Drop(dial) => {
                self.dials.remove(dial);
            }
            Effect::Park(dial) => self.park(dial),
            Effect::Abort(slot) => {
                self.operations.abort(slot);
                if slot == Slot::Release {
                    self.stream = None;
                }
            }
            Effect::Pause(slot, time) => self.operations.begin(slot, async move {
                sleep(time).await;
                Outcome::Due
            }),
            Effect::Expire(time) => {
                self.expires = time.and_then(|time| Instant::now().checked_add(time));
            }
            Effect::Show(connection) => self.show(connection),
            Effect::Ended => {}
        }
    }

    fn of_channel(&mut self, effect: Effect) {
        let (common, id, sandbox) = (Arc::clone(&self.common), self.id.clone(), self.sandbox.clone());
        match effect {
            Effect::Prepare => self.operations.begin(Slot::Channel, async move {
                Outcome::Prepared(match sandbox {
                    Some(sandbox) => common.world.prepare(&sandbox).await,
                    None => Err("its directory is gone".to_owned()),
                })
            }),
            Effect::Start(vm) => {
                self.operations
                    .begin(Slot::Channel, async move { Outcome::Started(common.world.start(&id, vm).await) });
            }
            Effect::Halt => self.operations.begin(Slot::Channel, async move {
                common.world.halt(&id).await;
                Outcome::Halted
            }),
            Effect::Stop(cause) => {
                self.log_end(cause);
                self.clear_obstacle();
                self.operations
                    .begin(Slot::Channel, async move { Outcome::Stopped(common.world.stop(&id).await) });
            }
            _ => {}
        }
    }

    fn of_release(&mut self, effect: Effect) {
        let (common, id) = (Arc::clone(&self.common), self.id.clone());
        if effect == Effect::Check {
            self.operations
                .begin(Slot::Release, async move { Outcome::Checked(common.world.check(&id).await) });
        } else {
            self.operations
                .begin(Slot::Release, async move { Outcome::Opened(common.world.open(&id).await) });
        }
    }

    fn finish(&mut self, dial: DialNo) {
        let (common, sandbox) = (Arc::clone(&self.common), self.sandbox.clone());
        let taken = self.dials.take(dial);
        self.operations.begin(Slot::Release, async move {
            let closed = || "it was closed before".to_owned();
            let result = match (taken, sandbox) {
                (Some(taken), Some(sandbox)) => match taken.await {
                    Ok(dial) => common.world.finish(dial, &sandbox).await,
                    Err(_) => Err(closed()),
                },
                _ => Err(closed()),
            };
            Outcome::Finished(dial, result)
        });
    }

    fn park(&mut self, dial: DialNo) {
        let name = self.dials.server_name(dial);
        tracing::info!("pod {}: the dial for {name} is kept open without use: {}", self.id, self.last_end);
        let (parked, taken) = (self.common.parked.clone(), self.dials.take(dial));
        self.operations.spawn(async move {
            if let Some(taken) = taken
                && let Ok(dial) = taken.await
            {
                // An error means that the service ends.
                drop(parked.send(dial));
            }
            Done::DialTaken
        });
    }

    fn relay(&mut self, dial: DialNo) {
        let (Some(client), Some(stream)) = (self.client.take(), self.stream.take()) else { return };
        tracing::info!("pod {}: can be used: the runtime is connected to its kata agent", self.id);
        let (common, id) = (Arc::clone(&self.common), self.id.clone());
        let task = self
            .operations
            .spawn(async move { Done::RelayEnded(dial, common.world.relay(&id, client, stream).await) });
        self.relays.insert(dial, task);
    }

    fn show(&mut self, connection: Connection) {
        let now = SystemTime::now();
        if connection != Connection::Held {
            self.held_since = None;
        }
        self.common.world.show(
            &self.id,
            match connection {
                Connection::None => Runtime::None,
                Connection::Held => Runtime::Held { since: *self.held_since.get_or_insert(now) },
                Connection::Connected => Runtime::Connected { since: now },
                Connection::Ended => Runtime::Ended { since: now, reason: self.last_end.clone() },
            },
        );
    }

    fn log_end(&self, cause: Cause) {
        let (grace, first_dial) = (self.common.times.grace.as_secs(), self.common.times.first_dial.as_secs());
        let why = match cause {
            Cause::NeverDialled => format!("cloud-api-adaptor has not dialled its VM within {first_dial} s"),
            Cause::NotDialledAgain => {
                format!(
                    "cloud-api-adaptor has not dialled its VM within {grace} s after the restart of this service"
                )
            }
            Cause::DialClosed | Cause::RelayEnded => {
                format!("{}, and no other connection came within {grace} s", self.last_end)
            }
            Cause::DirectoryGone => format!("its directory was removed {grace} s ago"),
            Cause::Superseded | Cause::TakenAway => self.last_end.clone(),
        };
        tracing::info!("pod {}: stopped, its keys are deleted: {why}", self.id);
    }
}
