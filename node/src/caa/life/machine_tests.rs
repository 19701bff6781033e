//! All states that the machine can reach, and random walks through larger ones.

use std::collections::{HashSet, VecDeque};
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const TIMES: Times = Times { grace: Duration::from_secs(60), first_dial: Duration::from_secs(600) };

fn vm(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, number).into()
}

/// What the driver has under way in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Of {
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
struct Driven {
    machine: Machine,
    channel: Of,
    release: Of,
    /// Held dials that have had no fate yet.
    dials: Vec<DialNo>,
    relays: Vec<DialNo>,
    /// A stream to the kata agent is open and unused.
    stream: bool,
    /// The kata agent has answered since the last start.
    checked: bool,
    /// The adaptor has something of the pod: a stop is due.
    has_keys: bool,
    expires: Option<Duration>,
    ended: bool,
    parked: usize,
    shown: Connection,
}

impl Driven {
    fn new() -> Self {
        Self::of(Machine::new(TIMES), false)
    }

    fn resumed() -> Self {
        let (machine, effects) = Machine::resumed(TIMES, Some(vm(1)));
        let mut driven = Self::of(machine, true);
        driven.perform(effects);
        driven
    }

    fn recorded() -> Self {
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
    fn key(&self) -> String {
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
        let dials: Vec<_> = machine.dials.iter().map(|(dial, vm)| (renamed(*dial), vm)).collect();
        let times = (machine.last, machine.armed, machine.shown, self.expires.is_some(), self.ended);
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
    fn give(&mut self, input: Input) -> bool {
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
            Input::Changed | Input::Gone | Input::Superseded => true,
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
    fn succeed(&mut self) {
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

    fn inputs(&self) -> Vec<Input> {
        let dial = self.next_dial();
        let failures = [ReleaseFailure::Again, ReleaseFailure::Lost].map(Err);
        let mut inputs = vec![
            Input::Appeared,
            Input::Changed,
            Input::Gone,
            Input::Dialled { dial, vm: vm(1) },
            Input::Dialled { dial, vm: vm(2) },
            Input::Superseded,
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
    fn can_still_live_and_end(&self) {
        let mut up = self.clone();
        up.succeed();
        if up.dials.is_empty() && up.relays.is_empty() {
            let dial = up.next_dial();
            up.give(Input::Dialled { dial, vm: vm(3) });
            up.succeed();
        }
        let last = up.machine.dials.last().map(|(_, vm)| *vm);
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

#[test]
fn every_state_is_sound_and_can_live_and_end() {
    let mut seen = HashSet::new();
    let mut queue: VecDeque<Driven> = [Driven::new(), Driven::resumed(), Driven::recorded()].into();
    while let Some(state) = queue.pop_front() {
        for input in state.inputs() {
            let mut next = state.clone();
            if matches!(input, Input::Dialled { .. }) && next.dials.len() >= 2 {
                continue;
            }
            if next.give(input) && seen.insert(next.key()) {
                next.can_still_live_and_end();
                queue.push_back(next);
            }
        }
    }
    assert!(seen.len() > 1000, "only {} states", seen.len());
}

fn given(driven: &mut Driven, inputs: &[Input]) {
    for input in inputs {
        assert!(driven.give(*input), "{input:?} is not possible: {driven:?}");
    }
}

const DIAL: Input = Input::Dialled { dial: 1, vm: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)) };

/// A pod that is connected with dial 1.
fn connected() -> Driven {
    let mut driven = Driven::new();
    given(&mut driven, &[Input::Appeared, Input::Prepared(true), DIAL, Input::Started(Ok(()))]);
    driven.succeed();
    assert_eq!(driven.relays, [1]);
    driven
}

#[test]
fn the_runtime_connects_only_after_check_and_stream() {
    let mut driven = Driven::new();
    given(&mut driven, &[Input::Appeared, Input::Prepared(true)]);
    assert_eq!(driven.expires, Some(TIMES.first_dial));
    given(&mut driven, &[DIAL]);
    assert_eq!((driven.channel, driven.expires), (Of::Start, None));
    given(&mut driven, &[Input::Started(Ok(()))]);
    assert_eq!(driven.release, Of::Check);
    given(&mut driven, &[Input::Checked(Err(ReleaseFailure::Again)), Input::Due(Slot::Release)]);
    assert_eq!(driven.release, Of::Check);
    given(&mut driven, &[Input::Checked(Ok(())), Input::Opened(Ok(()))]);
    assert_eq!(driven.release, Of::Finish(1));
    given(&mut driven, &[Input::Finished { dial: 1, proven: true }]);
    assert_eq!((driven.relays.as_slice(), driven.shown), (&[1][..], Connection::Connected));
}

#[test]
fn a_connection_that_ends_leaves_the_grace() {
    let mut driven = connected();
    given(&mut driven, &[Input::RelayEnded(1)]);
    assert_eq!((driven.expires, driven.shown), (Some(TIMES.grace), Connection::Ended));
    let mut again = driven.clone();
    given(&mut again, &[Input::Dialled { dial: 2, vm: vm(1) }]);
    assert_eq!((again.expires, again.release), (None, Of::Open), "no check: C32");
    again.succeed();
    assert_eq!(again.relays, [2]);
    given(&mut driven, &[Input::Expired]);
    assert_eq!(driven.channel, Of::Stop);
    given(&mut driven, &[Input::Stopped]);
    assert!(driven.ended);
}

#[test]
fn a_stranger_ends_no_connection() {
    let mut driven = connected();
    given(&mut driven, &[Input::Dialled { dial: 2, vm: vm(1) }, Input::Opened(Ok(()))]);
    given(&mut driven, &[Input::Finished { dial: 2, proven: false }]);
    assert_eq!(driven.relays, [1]);
    given(&mut driven, &[Input::Dialled { dial: 3, vm: vm(2) }]);
    assert_eq!((driven.relays.as_slice(), driven.channel), (&[1][..], Of::Nothing), "elsewhere");
}

#[test]
fn a_proven_dial_takes_over() {
    let mut driven = connected();
    given(&mut driven, &[Input::Dialled { dial: 2, vm: vm(1) }]);
    driven.succeed();
    assert_eq!(driven.relays, [2]);
}

#[test]
fn a_stranger_does_not_displace_the_first_dial() {
    let mut driven = Driven::new();
    given(&mut driven, &[DIAL]);
    for dial in 2..50 {
        given(&mut driven, &[Input::Dialled { dial, vm: vm(2) }]);
    }
    assert_eq!(driven.dials, [1, 48, 49]);
    driven.succeed();
    assert_eq!(driven.relays, [1]);
}

#[test]
fn a_dial_elsewhere_moves_the_pod_once_the_first_is_gone() {
    let mut driven = Driven::new();
    given(&mut driven, &[DIAL, Input::Prepared(true), Input::Dialled { dial: 2, vm: vm(2) }]);
    assert_eq!(driven.machine.vm(), Some(vm(1)));
    given(&mut driven, &[Input::DialClosed(1)]);
    assert_eq!(driven.channel, Of::Halt);
    driven.succeed();
    assert_eq!((driven.machine.vm(), driven.relays.as_slice()), (Some(vm(2)), &[2][..]));
}

#[test]
fn a_start_is_retried_while_a_dial_waits() {
    let mut driven = Driven::new();
    given(&mut driven, &[DIAL, Input::Prepared(true), Input::Started(Err(StartFailure::Again))]);
    assert_eq!(driven.channel, Of::Pause);
    given(&mut driven, &[Input::Due(Slot::Channel)]);
    assert_eq!(driven.channel, Of::Start);
    given(&mut driven, &[Input::Started(Err(StartFailure::Again)), Input::DialClosed(1)]);
    assert_eq!((driven.channel, driven.expires), (Of::Nothing, Some(TIMES.grace)));
}

#[test]
fn an_agent_that_will_never_do_is_not_tried_again() {
    let mut driven = Driven::new();
    given(&mut driven, &[DIAL, Input::Prepared(true), Input::Started(Err(StartFailure::Final))]);
    given(&mut driven, &[Input::Dialled { dial: 2, vm: vm(1) }]);
    assert_eq!((driven.channel, driven.dials.len()), (Of::Nothing, 2));
    given(&mut driven, &[Input::DialClosed(1), Input::DialClosed(2), Input::Expired, Input::Stopped]);
    assert!(driven.ended);
}

#[test]
fn a_pod_whose_address_is_taken_is_stopped_and_its_dial_parked() {
    let mut driven = Driven::new();
    given(&mut driven, &[DIAL, Input::Prepared(true), Input::Superseded]);
    assert_eq!((driven.parked, driven.channel), (1, Of::Stop));
    given(&mut driven, &[Input::Stopped]);
    assert!(driven.ended);
    let mut driven = connected();
    given(&mut driven, &[Input::Superseded]);
    assert_eq!((driven.relays.len(), driven.channel), (0, Of::Stop));
}

#[test]
fn a_resumed_pod_has_the_grace_to_be_dialled() {
    let mut driven = Driven::resumed();
    assert_eq!(driven.expires, Some(TIMES.grace));
    let mut dialled = driven.clone();
    given(&mut dialled, &[Input::Appeared, DIAL]);
    dialled.succeed();
    assert_eq!(dialled.relays, [1]);
    given(&mut driven, &[Input::Appeared, Input::Started(Ok(())), Input::Expired, Input::Stopped]);
    assert!(driven.ended);
}

#[test]
fn a_pod_that_was_prepared_only_has_the_time_of_a_new_one() {
    let mut driven = Driven::recorded();
    assert_eq!(driven.expires, Some(TIMES.grace));
    let mut new = driven.clone();
    given(&mut new, &[Input::Appeared]);
    assert_eq!((new.channel, new.expires), (Of::Prepare, Some(TIMES.first_dial)));
    given(&mut driven, &[Input::Expired, Input::Stopped]);
    assert!(driven.ended, "its directory is left over");
}

#[test]
fn a_directory_that_is_gone_ends_what_has_no_connection() {
    let mut driven = Driven::new();
    given(&mut driven, &[Input::Appeared, Input::Prepared(true), Input::Gone]);
    assert_eq!(driven.expires, Some(TIMES.grace));
    let mut driven = connected();
    given(&mut driven, &[Input::Gone]);
    assert_eq!((driven.expires, driven.relays.len()), (None, 1));
}

#[test]
fn pauses_double_up_to_their_limit() {
    let pauses: Vec<u64> =
        (1..8).map(|failures| u64::try_from(RELEASE_RETRY.after(failures).as_millis()).unwrap()).collect();
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1000, 1000]);
    assert_eq!(PREPARE_RETRY.after(u32::MAX), PREPARE_RETRY.last);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn random_lives_are_sound(choices in proptest::collection::vec(any::<prop::sample::Index>(), 0..120)) {
        let mut driven = Driven::new();
        driven.give(Input::Changed);
        for choice in choices {
            let inputs = driven.inputs();
            driven.give(inputs[choice.index(inputs.len())]);
        }
        driven.can_still_live_and_end();
    }
}
