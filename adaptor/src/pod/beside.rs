//! A new connection beside one that has fallen silent.
//!
//! A VM whose address changes leaves its connection silent, and so does a network that pauses. The first is over when a new
//! connection is there; the second by itself, and a new connection would cost all streams. So the old one is given up only
//! when the agent has been reached anew, and the old one has stayed silent for long enough after that to hear of it too.

use std::future::pending;
use std::time::Duration;

use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::AUTHENTICATE;
use tokio::time::{Instant, sleep};

use super::Plan;
use super::reach::{self, Won};
use crate::session::Pulse;
use crate::ssh::Gate;

/// How often we look whether something is unanswered.
const LOOK: Duration = Duration::from_secs(1);
/// A connection on which nothing arrives for this long, though the agent was asked, is silent; or for so many round trips.
const SILENT: Duration = Duration::from_millis(750);
const SILENT_ROUND_TRIPS: u32 = 3;
/// How often we look whether a silent connection speaks again.
const LISTEN: Duration = Duration::from_millis(50);
/// From its start a new connection may wait for the old one for this long: it must authenticate in time.
const GATE_MAX: Duration = AUTHENTICATE.saturating_sub(LOOK);

/// Waits until the connection is silent and the agent is reached anew.
pub(super) async fn another(plan: &Plan, pulse: &Pulse, first: PhaseName) -> Won {
    loop {
        silent(pulse).await;
        tracing::debug!("pod {}: the agent is silent; trying a new connection", plan.id);
        let gate = Gate::shut();
        let reached = tokio::select! {
            reached = reach::anywhere(plan, first, &gate) => reached,
            () = until_it_speaks(pulse, &gate) => continue,
        };
        match reached {
            Ok(won) => return won,
            Err(failures) => {
                failures.iter().for_each(|failure| tracing::debug!("pod {}: {failure}", plan.id))
            }
        }
    }
}

/// Opens the gate once somebody has waited before it for so long that the old connection could have spoken too. Ends if it does
/// before that, or if there is no time to wait for it; afterwards the agent may have let the new one in.
async fn until_it_speaks(pulse: &Pulse, gate: &Gate) {
    let start = Instant::now();
    let last_chance = async {
        gate.knocked().await;
        // TCP repeats itself after twice as long each time (RFC 6298 5.5): what has waited for an answer for some time is repeated
        // within that time again, and a little for the first wait and the way.
        let wanted = pulse.unanswered().unwrap_or_default() + patience(pulse) / 3;
        let left = GATE_MAX.saturating_sub(start.elapsed());
        sleep(wanted.min(left)).await;
        left * 2 >= wanted
    };
    let was_long_enough = tokio::select! {
        biased;
        () = speaks(pulse) => return,
        enough = last_chance => enough,
    };
    if was_long_enough && is_silent(pulse) {
        gate.open();
        pending().await
    }
}

async fn silent(pulse: &Pulse) {
    loop {
        sleep(LOOK).await;
        if pulse.unanswered().is_some() {
            pulse.probe();
            sleep(patience(pulse)).await;
            if is_silent(pulse) {
                return;
            }
        }
    }
}

async fn speaks(pulse: &Pulse) {
    while is_silent(pulse) {
        sleep(LISTEN).await;
    }
}

fn is_silent(pulse: &Pulse) -> bool {
    pulse.unanswered().is_some_and(|silence| silence >= patience(pulse))
}

fn patience(pulse: &Pulse) -> Duration {
    SILENT.max(pulse.round_trip() * SILENT_ROUND_TRIPS)
}
