//! All states that the machine can reach, and random walks through larger ones.

mod driven;

use std::collections::{HashSet, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;

use self::driven::{Driven, Of};
use super::*;

const TIMES: Times = Times { grace: Duration::from_secs(60), first_dial: Duration::from_secs(600) };

fn vm(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, number).into()
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
fn a_pod_that_is_taken_away_stays_so_until_it_is_dialled() {
    let mut starting = Driven::new();
    given(&mut starting, &[Input::Appeared, DIAL, Input::Prepared(true)]);
    given(&mut starting, &[Input::Dialled { dial: 2, vm: vm(2) }]);
    let mut later = starting.clone();
    given(&mut later, &[Input::Started(Err(StartFailure::NotPrepared))]);
    for mut driven in [starting, later, connected()] {
        let waiting = driven.dials.len();
        given(&mut driven, &[Input::TakenAway]);
        assert_eq!((driven.parked, driven.channel, driven.relays.len()), (waiting, Of::Stop, 0));
        assert_eq!(driven.shown, Connection::None);
        given(&mut driven, &[Input::Stopped]);
        assert!(driven.ended);
        given(&mut driven, &[DIAL]);
        driven.succeed();
        assert_eq!(driven.relays, [1]);
    }
}

#[test]
fn a_dial_that_comes_during_a_stop_is_shown_after_it() {
    let mut driven = connected();
    given(&mut driven, &[Input::RelayEnded(1), Input::Expired, DIAL, Input::Stopped]);
    assert_eq!((driven.channel, driven.shown), (Of::Prepare, Connection::Held));
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
