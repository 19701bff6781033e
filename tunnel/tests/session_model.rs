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
fn a_stream_of_the_adaptor_survives_a_cut() {
    holds(Plan { cuts: 0, ..PLAN });
    holds(PLAN);
}

#[test]
fn a_stream_of_the_agent_survives_a_cut() {
    holds(Plan { opener: AGENT, ..PLAN });
}
