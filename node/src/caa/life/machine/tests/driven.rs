//! A driver of the machine that checks each effect, and knows what can happen next.

use super::super::dials::DIALS_MAX;
use super::*;

/// What the driver has under way in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Of {
    Nothing,
    Prepare,
    Start,
    Halt,
    Stop,
    Check,
    Open,
    Finish(DialNo),
    Pause,
}

/// The machine with a driver that checks each effect.
#[derive(Clone, Debug)]
pub(super) struct Driven {
    pub(super) machine: Machine,
    pub(super) channel: Of,
    pub(super) release: Of,
    /// Held dials that have had no fate yet.
    pub(super) dials: Vec<DialNo>,
    pub(super) relays: Vec<DialNo>,
    /// A stream to the kata agent is open and unused.
    pub(super) stream: bool,
    /// The kata agent has answered since the last start.
    pub(super) checked: bool,
    /// The adaptor has something of the pod: a stop is due.
    pub(super) has_keys: bool,
    pub(super) expires: Option<Duration>,
    pub(super) ended: bool,
    pub(super) parked: usize,
    pub(super) shown: Connection,
}

impl Driven {
    pub(super) fn new() -> Self {
        Self::of(Machine::new(TIMES), false)
    }

    pub(super) fn resumed() -> Self {
        let (machine, effects) = Machine::resumed(TIMES, Some(vm(1)));
        let mut driven = Self::of(machine, true);
        driven.perform(effects);
        driven
    }

    pub(super) fn recorded() -> Self {
        let (machine, effects) = Machine::resumed(TIMES, None);
        let mut driven = Self::of(machine, true);
        driven.perform(effects);
        driven
    }

    fn of(machine: Machine, has_keys: bool) -> Self {
        Self {
            machine,
            channel: Of::Nothing,
            release: Of::Nothing,
            dials: Vec::new(),
            relays: Vec::new(),
            stream: false,
            checked: false,
            has_keys,
            expires: None,
            ended: false,
            parked: 0,
            shown: Connection::None,
        }
    }

    /// What tells states apart, with the dials numbered from 0.
    pub(super) fn key(&self) -> String {
        let mut numbers: Vec<DialNo> = self.dials.iter().chain(&self.relays).copied().collect();
        numbers.sort_unstable();
        let renamed = |dial: DialNo| numbers.iter().position(|number| *number == dial);
        let machine = &self.machine;
        let finishing = match self.release {
            Of::Finish(dial) => renamed(dial),
            _ => None,
        };
        let release = match machine.release {
            Release::Finishing(_) => Release::Finishing(0),
            release => release,
        };
        let dials: Vec<_> = machine.dials.iter().map(|(dial, vm)| (renamed(dial), vm)).collect();
        let times =
            (machine.grace.last, machine.grace.armed, machine.shown, self.expires.is_some(), self.ended);
        let flags =
            (machine.relayed, machine.wanted, machine.stale, self.checked, self.has_keys, self.stream);
        format!(
            "{:?} {release:?} {dials:?} {:?} {times:?} {flags:?} {finishing:?} {:?}",
            machine.channel,
            machine.relay.and_then(renamed),
            self.channel,
        )
    }

    fn next_dial(&self) -> DialNo {
        self.dials.iter().chain(&self.relays).max().map_or(1, |last| last + 1)
    }

    /// Gives the machine what a driver can give it now. False if it cannot.
    pub(super) fn give(&mut self, input: Input) -> bool {
        let possible = match input {
            Input::Dialled { dial, .. } => {
                self.dials.push(dial);
                self.ended = false;
                true
            }
            Input::Appeared => {
                self.ended = false;
                true
            }
            Input::Changed | Input::Gone | Input::Superseded | Input::TakenAway => true,
            Input::DialClosed(dial) => {
                let held = self.dials.contains(&dial) && self.release != Of::Finish(dial);
                self.dials.retain(|other| !held || *other != dial);
                held
            }
            Input::Prepared(_) => self.take_channel(Of::Prepare),
            Input::Started(result) => {
                let started = self.take_channel(Of::Start);
                self.checked &= !started || result.is_err();
                started
            }
            Input::Halted => self.take_channel(Of::Halt),
            Input::Stopped => {
                let stopped = self.take_channel(Of::Stop);
                self.has_keys &= !stopped;
                if stopped {
                    self.shown = Connection::None;
                }
                stopped
            }
            Input::Due(Slot::Channel) => self.take_channel(Of::Pause),
            Input::Due(Slot::Release) => self.take_release(Of::Pause),
            Input::Checked(result) => {
                let checked = self.take_release(Of::Check);
                self.checked |= checked && result.is_ok();
                checked
            }
            Input::Opened(result) => {
                let opened = self.take_release(Of::Open);
                self.stream |= opened && result.is_ok();
                opened
            }
            Input::Finished { dial, .. } => {
                let finished = self.take_release(Of::Finish(dial));
                self.dials.retain(|other| !finished || *other != dial);
                finished
            }
            Input::RelayEnded(dial) => {
                let lives = self.relays.contains(&dial);
                self.relays.retain(|other| *other != dial);
                lives
            }
            Input::Expired => self.expires.take().is_some(),
        };
        if possible {
            let effects = self.machine.step(input);
            self.perform(effects);
        }
        possible
    }

    fn take_channel(&mut self, of: Of) -> bool {
        let is = self.channel == of;
        if is {
            self.channel = Of::Nothing;
        }
        is
    }

    fn take_release(&mut self, of: Of) -> bool {
        let is = self.release == of;
        if is {
            self.release = Of::Nothing;
        }
        is
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.check(effect);
        }
        assert!(self.dials.len() <= DIALS_MAX, "more dials than there is room for");
        assert!(self.relays.len() <= 1, "two relays");
        let idle = self.dials.is_empty() && self.relays.is_empty();
        assert!(
            !idle || self.ended || self.expires.is_some() || self.channel == Of::Stop,
            "nothing would ever end the pod: {self:?}"
        );
        assert!(idle || self.expires.is_none(), "a pod in use has an end: {self:?}");
        let shown = match (self.relays.is_empty(), self.dials.is_empty()) {
            (false, _) => Connection::Connected,
            (true, false) => Connection::Held,
            (true, true) => return assert!(matches!(self.shown, Connection::None | Connection::Ended)),
        };
        assert_eq!(self.shown, shown);
    }

    fn check(&mut self, effect: Effect) {
        let (starts_channel, starts_release) = (&mut self.channel, &mut self.release);
        match effect {
            Effect::Prepare => {
                *starts_channel = Of::Prepare;
                self.has_keys = true;
            }
            Effect::Start(_) => *starts_channel = Of::Start,
            Effect::Halt => *starts_channel = Of::Halt,
            Effect::Stop(_) => {
                assert!(self.has_keys, "a stop of nothing");
                *starts_channel = Of::Stop;
                self.checked = false;
            }
            Effect::Pause(Slot::Channel, time) => {
                assert!(time >= Duration::from_secs(1));
                *starts_channel = Of::Pause;
            }
            Effect::Pause(Slot::Release, time) => {
                assert!(time >= Duration::from_millis(50));
                *starts_release = Of::Pause;
            }
            Effect::Check => {
                assert_eq!(*starts_release, Of::Nothing);
                *starts_release = Of::Check;
            }
            Effect::Open => {
                assert_eq!(*starts_release, Of::Nothing);
                assert!(self.checked, "a stream for the runtime before the kata agent has answered");
                assert!(!self.stream);
                *starts_release = Of::Open;
            }
            Effect::Finish(dial) => {
                assert_eq!(*starts_release, Of::Nothing);
                assert!(self.stream, "a handshake ends before the stream is confirmed");
                assert!(self.dials.contains(&dial));
                *starts_release = Of::Finish(dial);
            }
            Effect::Relay(dial) => {
                assert!(std::mem::take(&mut self.stream), "a relay without a stream");
                self.relays.push(dial);
            }
            Effect::Cut(dial) => {
                assert!(self.relays.contains(&dial));
                self.relays.retain(|other| *other != dial);
            }
            Effect::Drop(dial) | Effect::Park(dial) => {
                assert!(self.dials.contains(&dial), "a dial has two fates");
                assert_ne!(self.release, Of::Finish(dial));
                self.dials.retain(|other| *other != dial);
                self.parked += usize::from(matches!(effect, Effect::Park(_)));
            }
            Effect::Abort(Slot::Channel) => *starts_channel = Of::Nothing,
            Effect::Abort(Slot::Release) => {
                if let Of::Finish(dial) = self.release {
                    self.dials.retain(|other| *other != dial);
                }
                self.release = Of::Nothing;
                self.stream = false;
            }
            Effect::Expire(time) => self.expires = time,
            Effect::Show(connection) => self.shown = connection,
            Effect::Ended => {
                assert!(!self.has_keys, "the end, with keys left");
                assert!(self.dials.is_empty() && self.relays.is_empty() && self.expires.is_none());
                self.ended = true;
            }
        }
    }

    /// All that is under way succeeds, until nothing is under way.
    pub(super) fn succeed(&mut self) {
        for _ in 0..40 {
            let channel = match self.channel {
                Of::Prepare => Input::Prepared(true),
                Of::Start => Input::Started(Ok(())),
                Of::Halt => Input::Halted,
                Of::Stop => Input::Stopped,
                _ => Input::Due(Slot::Channel),
            };
            let release = match self.release {
                Of::Check => Input::Checked(Ok(())),
                Of::Open => Input::Opened(Ok(())),
                Of::Finish(dial) => Input::Finished { dial, proven: true },
                _ => Input::Due(Slot::Release),
            };
            if !self.give(channel) && !self.give(release) {
                return;
            }
        }
        panic!("it does not come to rest: {self:?}");
    }

    pub(super) fn inputs(&self) -> Vec<Input> {
        let dial = self.next_dial();
        let failures = [ReleaseFailure::Again, ReleaseFailure::Lost].map(Err);
        let mut inputs = vec![
            Input::Appeared,
            Input::Changed,
            Input::Gone,
            Input::Dialled { dial, vm: vm(1) },
            Input::Dialled { dial, vm: vm(2) },
            Input::Superseded,
            Input::TakenAway,
            Input::Prepared(true),
            Input::Prepared(false),
            Input::Started(Ok(())),
            Input::Started(Err(StartFailure::Again)),
            Input::Started(Err(StartFailure::Final)),
            Input::Started(Err(StartFailure::NotPrepared)),
            Input::Halted,
            Input::Stopped,
            Input::Due(Slot::Channel),
            Input::Due(Slot::Release),
            Input::Expired,
            Input::Checked(Ok(())),
            Input::Opened(Ok(())),
        ];
        inputs.extend(failures.map(Input::Checked));
        inputs.extend(failures.map(Input::Opened));
        inputs.extend(self.dials.iter().map(|dial| Input::DialClosed(*dial)));
        inputs.extend(self.relays.iter().map(|dial| Input::RelayEnded(*dial)));
        for dial in &self.dials {
            inputs.extend([true, false].map(|proven| Input::Finished { dial: *dial, proven }));
        }
        inputs
    }

    /// Whatever has happened, a pod that is dialled comes up, unless its VM will never do, and ends when all have gone.
    pub(super) fn can_still_live_and_end(&self) {
        let mut up = self.clone();
        up.succeed();
        if up.dials.is_empty() && up.relays.is_empty() {
            let dial = up.next_dial();
            up.give(Input::Dialled { dial, vm: vm(3) });
            up.succeed();
        }
        let last = up.machine.dials.iter().last().map(|(_, vm)| vm);
        let waits = up.relays.is_empty() && last != up.machine.vm();
        let failed = matches!(up.machine.channel, Channel::Failed(_));
        assert!(failed || !waits, "a dial waits for nothing: {up:?}");
        assert!(failed || !up.relays.is_empty(), "it does not come up: {up:?}");
        let mut end = self.clone();
        for _ in 0..4 {
            let ends: Vec<Input> = end.relays.iter().map(|dial| Input::RelayEnded(*dial)).collect();
            let closed: Vec<Input> = end.dials.iter().map(|dial| Input::DialClosed(*dial)).collect();
            for input in ends.into_iter().chain(closed) {
                end.give(input);
            }
            end.succeed();
        }
        end.give(Input::Expired);
        end.succeed();
        assert!(end.ended, "it does not end: {end:?}");
        assert!(!end.has_keys);
    }
}
