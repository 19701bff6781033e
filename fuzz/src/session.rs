//! One stream of a session: any plan and any order of steps gives what an unbroken pipe gives, and any lie of a peer is found
//! out. The model is that of the tunnel crate's tests.

#[path = "../../tunnel/tests/model/lies.rs"]
mod lies;
#[path = "../../tunnel/tests/model/stream.rs"]
mod stream;
#[path = "../../tunnel/tests/model/world.rs"]
mod world;

use secure_comms_protocol::limits::MESSAGE_MAX;

/// Most messages of one end, and most steps: each input takes less than a few milliseconds.
const MESSAGES_MAX: u8 = 48;
const STEPS_MAX: usize = 1000;

/// Bytes that a plan is made of, before the lengths of its messages.
const HEAD: usize = 9;

/// The first byte selects: the lies of a peer, or a plan and its steps.
pub(crate) fn exercise(data: &[u8]) {
    match data.split_first() {
        Some((0, moves)) => lies::exercise(lies::Numbers(moves)),
        Some((1, rest)) => follow(rest),
        _ => {}
    }
}

fn follow(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<HEAD>() else { return };
    let [opener, window, reads, cuts, resets, refusals, elsewhere, ours, theirs] = *head;
    let (ours, theirs) = (usize::from(ours % MESSAGES_MAX), usize::from(theirs % MESSAGES_MAX));
    let Some((ours, rest)) = rest.split_at_checked(ours) else { return };
    let Some((theirs, choices)) = rest.split_at_checked(theirs) else { return };
    let plan = stream::Plan {
        opener: if opener % 2 == 0 { stream::ADAPTOR } else { stream::AGENT },
        messages: [ours, theirs].map(|lens| lens.iter().map(|len| message(*len)).collect()),
        window: u32::from(window).max(1),
        reads_at_once: reads % 2 == 0,
        cuts,
        resets: resets % 2,
        refusals: refusals % 2,
        elsewhere,
    };
    let choices = choices.get(..STEPS_MAX).unwrap_or(choices);
    if let Err(fault) = stream::drive(plan, choices) {
        panic!("{fault}");
    }
}

/// Length of a message, from 1 byte to the longest.
fn message(len: u8) -> usize {
    match usize::from(len) {
        len @ 0..128 => len + 1,
        len => MESSAGE_MAX - (len - 128) * 200,
    }
}
