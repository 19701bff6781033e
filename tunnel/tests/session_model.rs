//! Every state of small worlds: a stream goes on over other connections without a byte lost, doubled or reordered, and both
//! ends forget it in the end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod model {
    pub(crate) mod explore;
    pub(crate) mod lies;
    pub(crate) mod stream;
    pub(crate) mod world;
}

use bytes::Bytes;
use model::explore::explore;
use model::lies;
use model::stream::{ADAPTOR, AGENT, Plan, Stream, Who, drive};
use proptest::prelude::*;
use secure_comms_protocol::limits::MESSAGE_MAX;
use secure_comms_tunnel::session::stream::{Lie, StreamState};

/// One message in each direction, and one cut.
fn plan(opener: Who) -> Plan {
    Plan {
        opener,
        messages: [vec![1], vec![1]],
        window: 2,
        reads_at_once: true,
        cuts: 1,
        resets: 0,
        refusals: 0,
        elsewhere: 0,
    }
}

#[track_caller]
fn holds(plan: Plan) {
    let started = std::time::Instant::now();
    match explore(&Stream::new(plan.clone())) {
        Ok(explored) => eprintln!("{plan:?}: {explored:?} {:?}", started.elapsed()),
        Err(broken) => panic!("{plan:?}: {}", broken.0),
    }
}

#[test]
fn a_stream_survives_two_cuts() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { cuts: 2, ..plan(opener) });
    }
}

#[test]
fn several_messages_survive_two_cuts() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { messages: [vec![1, 2, 1], vec![]], window: 3, cuts: 2, ..plan(opener) });
        holds(Plan { messages: [vec![], vec![1, 2, 1]], window: 3, cuts: 2, ..plan(opener) });
        holds(Plan { messages: [vec![1, 2], vec![3, 1]], ..plan(opener) });
    }
}

#[test]
fn a_reset_at_any_point_ends_the_stream_at_both_ends() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { resets: 1, ..plan(opener) });
    }
}

#[test]
fn a_refusal_at_any_point_ends_the_stream_at_both_ends() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { messages: [vec![1], vec![]], refusals: 1, cuts: 2, ..plan(opener) });
    }
}

#[test]
fn positions_over_another_lane_do_no_harm_however_late() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { elsewhere: 1, ..plan(opener) });
    }
}

#[test]
fn no_credit_is_lost_or_doubled_by_a_cut() {
    for opener in [ADAPTOR, AGENT] {
        let plan = Plan { window: 1, reads_at_once: false, ..plan(opener) };
        holds(Plan { messages: [vec![1, 1], vec![]], ..plan.clone() });
        holds(Plan { messages: [vec![], vec![1, 1]], ..plan });
    }
}

/// An end that has sent two messages and its end of file, of which the other end has said that it has the first.
fn sent() -> StreamState {
    let mut end = StreamState::default();
    for len in [10, 20] {
        end.push(&Bytes::from(vec![0; len]));
    }
    end.end();
    while end.next_transmit().is_some() {}
    assert_eq!(end.acknowledge(10), Ok(512));
    end
}

#[test]
fn a_position_beyond_what_was_sent_is_a_lie() {
    for received in [32, 33, u64::MAX] {
        assert_eq!(sent().acknowledge(received), Err(Lie::Beyond { received, sent: 31 }));
        assert_eq!(sent().attach(received), Err(Lie::Beyond { received, sent: 31 }));
    }
    // The end of file counts only once it was sent.
    let mut end = StreamState::default();
    end.end();
    assert_eq!(end.acknowledge(1), Err(Lie::Beyond { received: 1, sent: 0 }));
}

#[test]
fn a_position_before_an_earlier_one_is_a_lie_on_an_open_only() {
    assert_eq!(sent().attach(0), Err(Lie::Before { received: 0, acknowledged: 10 }));
    assert_eq!(sent().acknowledge(0), Ok(0));
}

#[test]
fn a_position_inside_a_message_is_a_lie() {
    for received in [11, 29] {
        assert_eq!(sent().acknowledge(received), Err(Lie::Inside(received)));
        assert_eq!(sent().attach(received), Err(Lie::Inside(received)));
    }
}

#[test]
fn anything_after_an_end_of_file_is_a_lie() {
    let mut end = StreamState::default();
    assert_eq!((end.on_data(7), end.on_eof()), (Ok(()), Ok(())));
    assert_eq!((end.on_data(0), end.on_eof()), (Err(Lie::AfterEof), Err(Lie::AfterEof)));
    assert_eq!(end.received(), 8);
}

#[test]
fn a_position_that_comes_after_a_close_changes_nothing() {
    let mut end = sent();
    assert_eq!(end.on_close(), 512);
    let closed = end.clone();
    assert_eq!((end.acknowledge(30), end.acknowledge(31)), (Ok(0), Ok(0)));
    assert_eq!(end, closed);
    assert_eq!(end.acknowledge(32), Err(Lie::Beyond { received: 32, sent: 31 }));
}

/// Lengths of the messages of one end, of 1 byte to 32 KiB.
fn messages() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1..600_usize, 1..=MESSAGE_MAX, Just(MESSAGE_MAX)], 0..40)
}

fn plans() -> impl Strategy<Value = Plan> {
    (0..2_usize, [messages(), messages()], 1..20_u32, any::<bool>(), 0..8_u8, 0..2_u8, 0..2_u8, 0..20_u8)
        .prop_map(|(opener, messages, window, reads_at_once, cuts, resets, refusals, elsewhere)| Plan {
            opener,
            messages,
            window,
            reads_at_once,
            cuts,
            resets,
            refusals,
            elsewhere,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_peer_that_lies_is_found_out(moves in prop::collection::vec(any::<u8>(), 0..300)) {
        lies::exercise(lies::Numbers(&moves));
    }
}

proptest! {
    #[test]
    fn long_streams_are_unbroken_pipes(plan in plans(), choices in prop::collection::vec(any::<u8>(), 0..600)) {
        drive(plan, &choices).map_err(TestCaseError::fail)?;
    }
}
