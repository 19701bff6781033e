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

use std::net::IpAddr;
use std::time::Duration;

/// Held dials of one sandbox. A stranger's dials must not displace that of cloud-api-adaptor, which has one at a time.
pub(super) const DIALS_MAX: usize = 3;

const PREPARE_RETRY: Backoff = Backoff { first: Duration::from_secs(1), last: Duration::from_secs(30) };
const START_RETRY: Backoff = Backoff { first: Duration::from_secs(1), last: Duration::from_secs(15) };
const RELEASE_RETRY: Backoff = Backoff { first: Duration::from_millis(50), last: Duration::from_secs(1) };

/// Pauses that double.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    first: Duration,
    last: Duration,
}

impl Backoff {
    fn after(self, failures: u32) -> Duration {
        let factor = 2_u32.saturating_pow(failures.saturating_sub(1));
        self.first.saturating_mul(factor).min(self.last)
    }
}

/// Number of a held dial, in the order of their arrival.
pub(super) type DialNo = u64;

/// How the start of a pod failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartFailure {
    /// Another try may succeed.
    Again,
    /// The VM at this address will never do.
    Final,
    /// The adaptor does not know the pod: it has to be prepared again.
    NotPrepared,
}

/// How a step of a release failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReleaseFailure {
    /// Another try may succeed.
    Again,
    /// The adaptor does not serve the pod any more.
    Lost,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// Its directory describes a pod that begins or lives.
    Appeared,
    /// What the directory says has changed.
    Changed,
    /// The directory is gone.
    Gone,
    /// Cloud-api-adaptor, or a stranger, has dialled the VM, and waits in its handshake.
    Dialled { dial: DialNo, vm: IpAddr },
    /// The other end has closed a held dial.
    DialClosed(DialNo),
    /// A younger sandbox has the VM's address.
    Superseded,
    /// The keys are published, and the inbounds listen, or not.
    Prepared(bool),
    /// The Kubernetes phase is up, or not.
    Started(Result<(), StartFailure>),
    /// The pod's channel is suspended.
    Halted,
    /// The kata agent has answered, or not.
    Checked(Result<(), ReleaseFailure>),
    /// A stream to the kata agent is confirmed, or not.
    Opened(Result<(), ReleaseFailure>),
    /// A dial's handshake has ended: it is cloud-api-adaptor's, or it is gone.
    Finished { dial: DialNo, proven: bool },
    /// The relay with this dial has ended.
    RelayEnded(DialNo),
    /// The pod is stopped; whether its keys are deleted is the adaptor's business.
    Stopped,
    /// The pause before the next try of this is over.
    Due(Slot),
    /// The time that [`Effect::Expire`] gave is over.
    Expired,
}

/// What may be under way at one time: each slot has one operation or pause, and a new one replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Slot {
    /// Of the adaptor's pod: prepare, start, halt, stop.
    Channel,
    /// Of a held dial: check, open, finish.
    Release,
}

/// Why a pod is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    /// No dial came in the time for a start.
    NeverDialled,
    /// No dial came after a restart of this service.
    NotDialledAgain,
    /// The last dial was closed before the pod could be used.
    DialClosed,
    /// The relay has ended.
    RelayEnded,
    /// The directory is gone.
    DirectoryGone,
    /// A younger sandbox has the VM's address.
    Superseded,
}

/// How the runtime's connection is, for viewers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Connection {
    None,
    Held,
    Connected,
    Ended,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Publish the keys.
    Prepare,
    /// Start the pod at this address, or wait until a start there is up.
    Start(IpAddr),
    /// Suspend the pod's channel: it has to be started elsewhere.
    Halt,
    /// Stop the pod and delete its keys.
    Stop(Cause),
    /// Ask the kata agent whether it answers.
    Check,
    /// Open a stream to the kata agent.
    Open,
    /// End the handshake of this dial.
    Finish(DialNo),
    /// Relay between this dial and the open stream.
    Relay(DialNo),
    /// End the relay with this dial.
    Cut(DialNo),
    /// Close this dial: others wait, and there is no room for more.
    Drop(DialNo),
    /// Keep this dial open, without use: it would dial again.
    Park(DialNo),
    /// Give up what the slot has under way, and what it has opened.
    Abort(Slot),
    /// Give [`Input::Due`] after this time.
    Pause(Slot, Duration),
    /// Give [`Input::Expired`] after this time, unless another order comes; `None`: never.
    Expire(Option<Duration>),
    /// Show the connection like this.
    Show(Connection),
    /// Nothing of the sandbox is left. Given again by each input that does not change that.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Channel {
    /// There is nothing of the pod.
    Unknown,
    /// An earlier process has prepared the pod; it is not served.
    Recorded,
    Preparing,
    PrepareLater,
    Prepared,
    Starting(IpAddr),
    StartLater(IpAddr),
    Up(IpAddr),
    /// The VM at this address will never do.
    Failed(IpAddr),
    Halting,
    Stopping,
}

impl Channel {
    fn vm(self) -> Option<IpAddr> {
        match self {
            Self::Starting(vm) | Self::StartLater(vm) | Self::Up(vm) | Self::Failed(vm) => Some(vm),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Release {
    Idle,
    Checking,
    CheckLater,
    Opening,
    OpenLater,
    /// A stream is open, and no dial is there for it.
    Opened,
    Finishing(DialNo),
}

/// What a pod without a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Expiry {
    /// Its first dial.
    FirstDial,
    /// Another dial.
    NextDial(Cause),
}

/// Times that the settings give.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// For the next dial.
    pub(super) grace: Duration,
    /// For the first one.
    pub(super) first_dial: Duration,
}

/// The state of one sandbox.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    times: Times,
    channel: Channel,
    release: Release,
    /// Held dials, oldest first.
    dials: Vec<(DialNo, IpAddr)>,
    relay: Option<DialNo>,
    /// A relay has begun: the kata agent may accept no second connection.
    relayed: bool,
    /// The pod has to be prepared though no dial waits.
    wanted: bool,
    /// What the pod has seen last, which ends it unless a dial comes.
    last: Expiry,
    armed: Option<Expiry>,
    shown: Connection,
    /// The directory's content has changed since the last prepare.
    stale: bool,
    superseded: bool,
    failures: Failures,
}

/// Failures in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Failures {
    prepare: u32,
    start: u32,
    release: u32,
}

impl Machine {
    /// A sandbox of which nothing is served.
    pub(super) fn new(times: Times) -> Self {
        Self {
            times,
            channel: Channel::Unknown,
            release: Release::Idle,
            dials: Vec::new(),
            relay: None,
            relayed: false,
            wanted: false,
            last: Expiry::FirstDial,
            armed: None,
            shown: Connection::None,
            stale: false,
            superseded: false,
            failures: Failures::default(),
        }
    }

    /// A sandbox whose pod an earlier process has begun. `vm`: the adaptor has resumed it there. It waits for a dial.
    pub(super) fn resumed(times: Times, vm: Option<IpAddr>) -> (Self, Vec<Effect>) {
        let mut machine = Self::new(times);
        machine.last = Expiry::NextDial(Cause::NotDialledAgain);
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
            Input::Prepared(done) => self.prepared(done, effects),
            Input::Started(result) => self.started(result, effects),
            Input::Halted if self.channel == Channel::Halting => self.prepare(effects),
            Input::Checked(result) => self.checked(result, effects),
            Input::Opened(result) => self.opened(result, effects),
            Input::Finished { dial, proven } => self.finished(dial, proven, effects),
            Input::RelayEnded(dial) => self.relay_ended(dial),
            Input::Stopped if self.channel == Channel::Stopping => self.channel = Channel::Unknown,
            Input::Halted | Input::Stopped => {}
            Input::Due(Slot::Channel) => self.channel_due(effects),
            Input::Due(Slot::Release) => self.release_due(),
            Input::Expired => self.expired(effects),
        }
    }

    fn appeared(&mut self) {
        self.wanted = true;
        let ended = matches!(self.channel, Channel::Unknown | Channel::Recorded | Channel::Stopping);
        if ended || self.last == Expiry::NextDial(Cause::DirectoryGone) {
            self.last = Expiry::FirstDial;
        }
    }

    fn gone(&mut self) {
        self.wanted = false;
        if self.relay.is_none() {
            self.last = Expiry::NextDial(Cause::DirectoryGone);
        }
    }

    /// The oldest dial is kept: cloud-api-adaptor closes one before it makes the next.
    fn dialled(&mut self, dial: DialNo, vm: IpAddr, effects: &mut Vec<Effect>) {
        if self.dials.len() >= DIALS_MAX
            && let Some(place) = self.dials.iter().skip(1).position(|(dial, _)| !self.is_finishing(*dial))
        {
            let (dropped, _) = self.dials.remove(place + 1);
            effects.push(Effect::Drop(dropped));
        }
        self.dials.push((dial, vm));
    }

    fn is_finishing(&self, dial: DialNo) -> bool {
        self.release == Release::Finishing(dial)
    }

    fn dial_closed(&mut self, dial: DialNo) {
        // A dial whose handshake is being ended reports that itself.
        if !self.is_finishing(dial) {
            self.forget(dial);
        }
    }

    fn forget(&mut self, dial: DialNo) {
        let before = self.dials.len();
        self.dials.retain(|(held, _)| *held != dial);
        if self.dials.len() < before && self.dials.is_empty() && self.relay.is_none() {
            self.last = Expiry::NextDial(Cause::DialClosed);
        }
    }

    fn prepared(&mut self, done: bool, effects: &mut Vec<Effect>) {
        if self.channel != Channel::Preparing {
            return;
        }
        if done {
            self.failures.prepare = 0;
            self.channel = Channel::Prepared;
        } else {
            self.prepare_later(effects);
        }
    }

    fn prepare_later(&mut self, effects: &mut Vec<Effect>) {
        self.failures.prepare = self.failures.prepare.saturating_add(1);
        self.channel = Channel::PrepareLater;
        effects.push(Effect::Pause(Slot::Channel, PREPARE_RETRY.after(self.failures.prepare)));
    }

    fn started(&mut self, result: Result<(), StartFailure>, effects: &mut Vec<Effect>) {
        let Channel::Starting(vm) = self.channel else { return };
        match result {
            Ok(()) => {
                self.failures.start = 0;
                self.failures.release = 0;
                self.channel = Channel::Up(vm);
            }
            Err(StartFailure::Final) => self.channel = Channel::Failed(vm),
            Err(StartFailure::NotPrepared) => self.prepare_later(effects),
            Err(StartFailure::Again) => {
                self.failures.start = self.failures.start.saturating_add(1);
                self.channel = Channel::StartLater(vm);
                effects.push(Effect::Pause(Slot::Channel, START_RETRY.after(self.failures.start)));
            }
        }
    }

    fn checked(&mut self, result: Result<(), ReleaseFailure>, effects: &mut Vec<Effect>) {
        if self.release != Release::Checking {
            return;
        }
        match result {
            Ok(()) => {
                self.release = Release::Opening;
                effects.push(Effect::Open);
            }
            Err(failure) => self.release_failed(failure, Release::CheckLater, effects),
        }
    }

    fn opened(&mut self, result: Result<(), ReleaseFailure>, effects: &mut Vec<Effect>) {
        if self.release != Release::Opening {
            return;
        }
        match result {
            Ok(()) => self.release = Release::Opened,
            Err(failure) => self.release_failed(failure, Release::OpenLater, effects),
        }
    }

    fn release_failed(&mut self, failure: ReleaseFailure, later: Release, effects: &mut Vec<Effect>) {
        match failure {
            ReleaseFailure::Again => {
                self.failures.release = self.failures.release.saturating_add(1);
                self.release = later;
                effects.push(Effect::Pause(Slot::Release, RELEASE_RETRY.after(self.failures.release)));
            }
            ReleaseFailure::Lost => {
                self.release = Release::Idle;
                self.relayed = false;
                self.prepare_later(effects);
            }
        }
    }

    fn finished(&mut self, dial: DialNo, proven: bool, effects: &mut Vec<Effect>) {
        if self.release != Release::Finishing(dial) {
            return;
        }
        if proven {
            if let Some(earlier) = self.relay.replace(dial) {
                effects.push(Effect::Cut(earlier));
            }
            self.dials.retain(|(held, _)| *held != dial);
            self.failures.release = 0;
            self.relayed = true;
            self.release = Release::Idle;
            effects.push(Effect::Relay(dial));
        } else {
            // Nothing was sent on the stream: the next dial gets it.
            self.release = Release::Opened;
            self.forget(dial);
        }
    }

    fn relay_ended(&mut self, dial: DialNo) {
        if self.relay == Some(dial) {
            self.relay = None;
            self.last = Expiry::NextDial(Cause::RelayEnded);
        }
    }

    fn channel_due(&mut self, effects: &mut Vec<Effect>) {
        match self.channel {
            Channel::PrepareLater => self.prepare(effects),
            Channel::StartLater(vm) => self.start(vm, effects),
            _ => {}
        }
    }

    fn release_due(&mut self) {
        if matches!(self.release, Release::CheckLater | Release::OpenLater) {
            self.release = Release::Idle;
        }
    }

    fn expired(&mut self, effects: &mut Vec<Effect>) {
        let cause = match self.armed.take() {
            None => return,
            Some(Expiry::FirstDial) => Cause::NeverDialled,
            Some(Expiry::NextDial(cause)) => cause,
        };
        self.stop(cause, effects);
    }

    fn prepare(&mut self, effects: &mut Vec<Effect>) {
        self.stale = false;
        self.channel = Channel::Preparing;
        effects.push(Effect::Prepare);
    }

    fn start(&mut self, vm: IpAddr, effects: &mut Vec<Effect>) {
        self.channel = Channel::Starting(vm);
        effects.push(Effect::Start(vm));
    }

    fn stop(&mut self, cause: Cause, effects: &mut Vec<Effect>) {
        self.wanted = false;
        self.relayed = false;
        self.stale = false;
        self.failures = Failures::default();
        self.give_up_release(effects);
        if let Some(dial) = self.relay.take() {
            effects.push(Effect::Cut(dial));
        }
        self.last = Expiry::NextDial(cause);
        self.channel = Channel::Stopping;
        effects.push(Effect::Stop(cause));
    }

    fn give_up_release(&mut self, effects: &mut Vec<Effect>) {
        if let Release::Finishing(dial) = self.release {
            self.forget(dial);
        }
        if self.release != Release::Idle {
            self.release = Release::Idle;
            effects.push(Effect::Abort(Slot::Release));
        }
    }

    /// Decides by the state what has to be done.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        if std::mem::take(&mut self.superseded) {
            self.supersede(effects);
        }
        self.settle_channel(effects);
        self.settle_release(effects);
        self.settle_expiry(effects);
        self.settle_shown(effects);
        if self.channel == Channel::Unknown && self.dials.is_empty() && !self.wanted {
            effects.push(Effect::Ended);
        }
    }

    /// The VM at the address is another's. Dials to it are kept open without use: closed, they would come again.
    fn supersede(&mut self, effects: &mut Vec<Effect>) {
        let lost = self.channel.vm().or_else(|| self.dials.first().map(|(_, vm)| *vm));
        if !matches!(self.channel, Channel::Unknown | Channel::Stopping) {
            self.stop(Cause::Superseded, effects);
        }
        self.wanted = false;
        let (parked, kept) = self.dials.iter().partition(|(_, vm)| Some(*vm) == lost);
        self.dials = kept;
        let parked: Vec<(DialNo, IpAddr)> = parked;
        effects.extend(parked.into_iter().map(|(dial, _)| Effect::Park(dial)));
    }

    fn settle_channel(&mut self, effects: &mut Vec<Effect>) {
        match self.channel {
            Channel::Unknown | Channel::Recorded if self.wanted || !self.dials.is_empty() => {
                self.prepare(effects)
            }
            Channel::Preparing | Channel::PrepareLater | Channel::Prepared if self.stale => {
                self.prepare(effects);
            }
            Channel::Prepared => {
                if let Some((_, vm)) = self.dials.first() {
                    self.start(*vm, effects);
                }
            }
            Channel::StartLater(_) if self.dials.is_empty() => {
                self.channel = Channel::Prepared;
                effects.push(Effect::Abort(Slot::Channel));
            }
            Channel::Starting(vm) | Channel::StartLater(vm) | Channel::Up(vm) | Channel::Failed(vm)
                if self.is_elsewhere(vm) =>
            {
                self.give_up_release(effects);
                self.relayed = false;
                self.channel = Channel::Halting;
                effects.push(Effect::Halt);
            }
            _ => {}
        }
    }

    /// Whether all dials are to other addresses.
    fn is_elsewhere(&self, vm: IpAddr) -> bool {
        self.relay.is_none() && !self.dials.is_empty() && self.dials.iter().all(|(_, dialled)| *dialled != vm)
    }

    fn settle_release(&mut self, effects: &mut Vec<Effect>) {
        let Channel::Up(vm) = self.channel else {
            self.give_up_release(effects);
            return;
        };
        let next = self.dials.iter().find(|(_, dialled)| *dialled == vm).map(|(dial, _)| *dial);
        match (self.release, next) {
            (Release::Idle, Some(_)) if self.relayed => {
                self.release = Release::Opening;
                effects.push(Effect::Open);
            }
            (Release::Idle, Some(_)) => {
                self.release = Release::Checking;
                effects.push(Effect::Check);
            }
            (Release::Opened, Some(dial)) => {
                self.release = Release::Finishing(dial);
                effects.push(Effect::Finish(dial));
            }
            (Release::Idle | Release::Finishing(_), _) | (_, Some(_)) => {}
            // All that waited are gone.
            (_, None) => self.give_up_release(effects),
        }
    }

    fn settle_expiry(&mut self, effects: &mut Vec<Effect>) {
        let idle = self.relay.is_none() && self.dials.is_empty();
        let served = !matches!(self.channel, Channel::Unknown | Channel::Stopping);
        let expiry = (idle && served).then_some(self.last);
        if expiry != self.armed {
            self.armed = expiry;
            effects.push(Effect::Expire(expiry.map(|expiry| match expiry {
                Expiry::FirstDial => self.times.first_dial,
                Expiry::NextDial(_) => self.times.grace,
            })));
        }
    }

    fn settle_shown(&mut self, effects: &mut Vec<Effect>) {
        let now = match (self.relay, self.dials.is_empty(), self.last) {
            (Some(_), ..) => Connection::Connected,
            (None, false, _) => Connection::Held,
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
#[path = "machine_tests.rs"]
mod tests;
