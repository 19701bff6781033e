//! A new connection beside one that has fallen silent.
//!
//! A VM whose address changes leaves its connection silent, and so does a network that pauses. The first is over when a new
//! connection is there; the second by itself, and a new connection would cost all streams. So the old one is given up only
//! when the agent has been reached anew, and the old one has stayed silent for long enough after that to hear of it too.

use std::future::pending;
use std::time::Duration;

use secure_comms_protocol::PhaseName;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::connect::{self, Won};
use super::driver::Plan;
use crate::transport::session::Pulse;
use crate::transport::ssh::Gate;

/// How often we look whether something is unanswered.
const LOOK: Duration = Duration::from_secs(1);
/// A connection on which nothing arrives for this long, though the agent was asked, is silent; or for so many round trips.
const SILENT: Duration = Duration::from_millis(750);
const SILENT_ROUND_TRIPS: u32 = 3;
/// How often we look whether a silent connection speaks again.
const LISTEN: Duration = Duration::from_millis(50);
/// So long a new connection can wait: after `KEEPALIVE` (5 s) the agent's russh sends a keepalive, and ours ends a connection for that
/// if it has not authenticated.
const HELD_MAX: Duration = Duration::from_secs(4);
/// How soon the first attempt must reach an agent, each next one in twice that: one address may refuse us as yet, and another be dead.
const REACHED: Duration = Duration::from_secs(2);

/// Waits until the connection is silent and the agent is reached anew.
pub(super) async fn another(plan: &Plan, pulse: &Pulse, first: PhaseName) -> Won {
    loop {
        silent(pulse).await;
        tracing::debug!("pod {}: the agent is silent; trying a new connection", plan.id);
        let (mut deadline, mut limit) = (None, REACHED);
        while is_silent(pulse) {
            let gate = Gate::shut();
            let reached = tokio::select! {
                reached = connect::anywhere(plan, first, &gate) => reached,
                () = last_chance(pulse, &gate, limit, &mut deadline) => {
                    limit *= 2;
                    continue;
                }
            };
            match reached {
                Ok(won) => return won,
                Err(failures) => {
                    failures.iter().for_each(|failure| tracing::debug!("pod {}: {failure}", plan.id));
                    sleep(LOOK).await;
                }
            }
        }
    }
}

/// Opens the gate once somebody has waited before it for so long that the old connection could have spoken too; that is when the
/// `deadline` passes, which is set when somebody comes for the first time. Ends if the old connection speaks before that, if
/// nobody comes within `limit`, or if another attempt must wait on; once the gate is open the agent may have let the new one in.
async fn last_chance(pulse: &Pulse, gate: &Gate, limit: Duration, deadline: &mut Option<Instant>) {
    let opens = async {
        if timeout(limit, gate.knocked()).await.is_err() {
            return false;
        }
        // TCP repeats itself after twice as long each time (RFC 6298 5.5): what has waited for an answer for some time is repeated
        // within that time again, and a little for the first wait and the way.
        let more = pulse.unanswered().unwrap_or_default() + patience(pulse) / 3;
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + more);
        timeout(HELD_MAX, sleep_until(deadline)).await.is_ok()
    };
    let opens = tokio::select! {
        biased;
        () = speaks(pulse) => return,
        opens = opens => opens,
    };
    if opens && is_silent(pulse) {
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
