//! The life of one sandbox of cloud-api-adaptor, as a machine without I/O.
//!
//! ```text
//! channel: Unknown -> Preparing -> Prepared -> Starting -> Up          (of the adaptor's pod)
//! release:                                       Idle -> Checking -> Opening -> Finishing     (of a held dial)
//! relay:                                                                          lives -> ended -> grace -> stop
//! ```
//! In: what happened. Out: what to do. [`Machine::step`] changes the state by the input, and [`Machine::settle`] then decides
//! by the state alone what has to be done next. So the decision is the same however a state was reached.
//!
//! No dial is trusted before its handshake has ended: any process of the node can make one, with a server name that it has
//! read. So a dial alone starts a pod, but it does not move one whose address another dial holds, and does not end a relay.

mod backoff;
mod channel;
mod dials;
mod effect;
mod grace;
mod input;
mod release;

use std::net::IpAddr;

use self::backoff::Backoffs;
use self::channel::Channel;
use self::dials::Dials;
pub(super) use self::effect::{Cause, Connection, Effect};
pub(super) use self::grace::Times;
use self::grace::{Expiry, Grace};
pub(super) use self::input::{DialNo, Input, ReleaseFailure, Slot, StartFailure};
use self::release::Release;

/// The state of one sandbox.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    channel: Channel,
    release: Release,
    dials: Dials,
    relay: Option<DialNo>,
    /// A relay has begun: the kata agent may accept no second connection.
    relayed: bool,
    /// The pod has to be prepared though no dial waits.
    wanted: bool,
    grace: Grace,
    shown: Connection,
    /// The directory's content has changed since the last prepare.
    stale: bool,
    superseded: bool,
    backoffs: Backoffs,
}

impl Machine {
    /// A sandbox of which nothing is served.
    pub(super) fn new(times: Times) -> Self {
        Self {
            channel: Channel::Unknown,
            release: Release::Idle,
            dials: Dials::default(),
            relay: None,
            relayed: false,
            wanted: false,
            grace: Grace::new(times, Expiry::FirstDial),
            shown: Connection::None,
            stale: false,
            superseded: false,
            backoffs: Backoffs::default(),
        }
    }

    /// A sandbox whose pod an earlier process has begun. `vm`: the adaptor has resumed it there. It waits for a dial.
    pub(super) fn resumed(times: Times, vm: Option<IpAddr>) -> (Self, Vec<Effect>) {
        let mut machine = Self::new(times);
        machine.grace.last = Expiry::NextDial(Cause::NotDialledAgain);
        let mut effects = Vec::new();
        match vm {
            Some(vm) => machine.start(vm, &mut effects),
            None => machine.channel = Channel::Recorded,
        }
        machine.settle(&mut effects);
        (machine, effects)
    }

    /// The address that the pod is started at.
    pub(super) fn vm(&self) -> Option<IpAddr> {
        self.channel.vm()
    }

    /// Whether the runtime is connected.
    pub(super) fn is_relaying(&self) -> bool {
        self.relay.is_some()
    }

    /// Takes what happened, and says what to do, in this order.
    pub(super) fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.take(input, &mut effects);
        self.settle(&mut effects);
        effects
    }

    fn take(&mut self, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Appeared => self.appeared(),
            Input::Changed => self.stale = true,
            Input::Gone => self.gone(),
            Input::Dialled { dial, vm } => self.dialled(dial, vm, effects),
            Input::DialClosed(dial) => self.dial_closed(dial),
            Input::Superseded => self.superseded = true,
            Input::TakenAway => self.taken_away(effects),
            Input::Prepared(done) => self.prepared(done, effects),
            Input::Started(result) => self.started(result, effects),
            Input::Halted if self.channel == Channel::Halting => self.prepare(effects),
            Input::Checked(result) => self.checked(result, effects),
            Input::Opened(result) => self.opened(result, effects),
            Input::Finished { dial, proven } => self.finished(dial, proven, effects),
            Input::RelayEnded(dial) => self.relay_ended(dial),
            Input::Stopped if self.channel == Channel::Stopping => {
                self.channel = Channel::Unknown;
                // With the pod, all that was shown of it is gone.
                self.shown = Connection::None;
            }
            Input::Halted | Input::Stopped => {}
            Input::Due(Slot::Channel) => self.channel_due(effects),
            Input::Due(Slot::Release) => self.release_due(),
            Input::Expired => self.expired(effects),
        }
    }

    fn appeared(&mut self) {
        self.wanted = true;
        let ended = matches!(self.channel, Channel::Unknown | Channel::Recorded | Channel::Stopping);
        if ended || self.grace.last == Expiry::NextDial(Cause::DirectoryGone) {
            self.grace.last = Expiry::FirstDial;
        }
    }

    fn gone(&mut self) {
        self.wanted = false;
        if self.relay.is_none() {
            self.grace.last = Expiry::NextDial(Cause::DirectoryGone);
        }
    }

    fn dialled(&mut self, dial: DialNo, vm: IpAddr, effects: &mut Vec<Effect>) {
        let finishing = match self.release {
            Release::Finishing(dial) => Some(dial),
            _ => None,
        };
        effects.extend(self.dials.hold(dial, vm, finishing).map(Effect::Drop));
    }

    fn dial_closed(&mut self, dial: DialNo) {
        // A dial whose handshake is being ended reports that itself.
        if self.release != Release::Finishing(dial) {
            self.forget(dial);
        }
    }

    /// Without a relay, the last dial that goes begins the grace.
    fn forget(&mut self, dial: DialNo) {
        if self.dials.remove(dial) && self.dials.is_empty() && self.relay.is_none() {
            self.grace.last = Expiry::NextDial(Cause::DialClosed);
        }
    }

    fn relay_ended(&mut self, dial: DialNo) {
        if self.relay == Some(dial) {
            self.relay = None;
            self.grace.last = Expiry::NextDial(Cause::RelayEnded);
        }
    }

    fn expired(&mut self, effects: &mut Vec<Effect>) {
        if let Some(cause) = self.grace.expire() {
            self.stop(cause, effects);
        }
    }

    fn stop(&mut self, cause: Cause, effects: &mut Vec<Effect>) {
        self.wanted = false;
        self.relayed = false;
        self.stale = false;
        self.backoffs = Backoffs::default();
        self.give_up_release(effects);
        if let Some(dial) = self.relay.take() {
            effects.push(Effect::Cut(dial));
        }
        self.grace.last = Expiry::NextDial(cause);
        self.channel = Channel::Stopping;
        effects.push(Effect::Stop(cause));
    }

    /// Decides by the state what has to be done.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        if std::mem::take(&mut self.superseded) {
            self.supersede(effects);
        }
        self.settle_channel(effects);
        self.settle_release(effects);
        self.settle_grace(effects);
        self.settle_shown(effects);
        if self.channel == Channel::Unknown && self.dials.is_empty() && !self.wanted {
            effects.push(Effect::Ended);
        }
    }

    /// The VM at the address is another's. Dials to it are kept open without use: closed, they would come again.
    fn supersede(&mut self, effects: &mut Vec<Effect>) {
        let lost = self.channel.vm().or_else(|| self.dials.first_vm());
        if !matches!(self.channel, Channel::Unknown | Channel::Stopping) {
            self.stop(Cause::Superseded, effects);
        }
        self.wanted = false;
        if let Some(vm) = lost {
            effects.extend(self.dials.remove_to(vm).into_iter().map(Effect::Park));
        }
    }

    /// Its dials are kept open without use: closed, they would come again, and with them the pod.
    fn taken_away(&mut self, effects: &mut Vec<Effect>) {
        if !matches!(self.channel, Channel::Unknown | Channel::Stopping) {
            self.stop(Cause::TakenAway, effects);
        }
        self.wanted = false;
        effects.extend(self.dials.remove_all().into_iter().map(Effect::Park));
    }

    fn settle_grace(&mut self, effects: &mut Vec<Effect>) {
        let idle = self.relay.is_none() && self.dials.is_empty();
        let served = !matches!(self.channel, Channel::Unknown | Channel::Stopping);
        effects.extend(self.grace.settle(idle && served));
    }

    fn settle_shown(&mut self, effects: &mut Vec<Effect>) {
        let now = match (self.relay, self.dials.is_empty(), self.grace.last) {
            (Some(_), ..) => Connection::Connected,
            (None, false, _) => Connection::Held,
            _ if self.channel == Channel::Unknown => Connection::None,
            (None, true, Expiry::NextDial(Cause::RelayEnded | Cause::DialClosed)) => Connection::Ended,
            _ => Connection::None,
        };
        if now != self.shown {
            self.shown = now;
            effects.push(Effect::Show(now));
        }
    }
}

#[cfg(test)]
mod tests;
