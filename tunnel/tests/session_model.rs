//! Every state of small worlds: a stream goes on over other connections without a byte lost, doubled or reordered, and both
//! ends forget it in the end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod model {
    pub(crate) mod explore;
    pub(crate) mod world;
}

use model::explore::explore;
use model::world::{ADAPTOR, AGENT, Plan, Stream};

const PLAN: Plan = Plan {
    opener: ADAPTOR,
    messages: [&[1], &[1]],
    window: 2,
    reads_at_once: true,
    cuts: 1,
    resets: 0,
    refusals: 0,
    elsewhere: 0,
};

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
        holds(Plan { opener, cuts: 2, ..PLAN });
    }
}

#[test]
fn several_messages_survive_two_cuts() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { opener, messages: [&[1, 2, 1], &[]], window: 3, cuts: 2, ..PLAN });
        holds(Plan { opener, messages: [&[], &[1, 2, 1]], window: 3, cuts: 2, ..PLAN });
        holds(Plan { opener, messages: [&[1, 2], &[3, 1]], ..PLAN });
    }
}

#[test]
fn a_reset_at_any_point_ends_the_stream_at_both_ends() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { opener, resets: 1, ..PLAN });
    }
}

#[test]
fn a_refusal_at_any_point_ends_the_stream_at_both_ends() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { opener, messages: [&[1], &[]], refusals: 1, cuts: 2, ..PLAN });
    }
}

#[test]
fn positions_over_another_lane_do_no_harm_however_late() {
    for opener in [ADAPTOR, AGENT] {
        holds(Plan { opener, elsewhere: 1, ..PLAN });
    }
}

#[test]
fn no_credit_is_lost_or_doubled_by_a_cut() {
    for opener in [ADAPTOR, AGENT] {
        let plan = Plan { opener, window: 1, reads_at_once: false, ..PLAN };
        holds(Plan { messages: [&[1, 1], &[]], ..plan.clone() });
        holds(Plan { messages: [&[], &[1, 1]], ..plan });
    }
}
