//! Failover: replaces a silent connection by a new one, opened while the old one still exists.
//!
//! A connection falls silent when the VM's address changes, and when the network pauses. After an address change only a
//! new connection helps. After a pause the old connection recovers, but not soon: TCP's backoff may have grown to minutes.
//!
//! A lane of a session ([`await_lane_end`]) is replaced by the first new connection that gets through: its streams go on
//! there. Without a session ([`await_failover`]) a replacement would reset all streams. So then the old connection is
//! replaced only if a new one is ready and the old one had the time to recover, too.

use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::Duration;

use secure_comms_protocol::{Kubernetes, PhaseName};
use secure_comms_tunnel::account::Traffic;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::connect::{Connected, connect_any};
use super::plan::{LaneLimits, Plan};
use super::redial::Redial;
use crate::transport::agent_connection::{AgentConnection, ConnectionEnd, Liveness};
use crate::transport::ssh::{AuthHold, AuthLock};

/// Why the connection to `address` was replaced.
pub(super) fn failover_reason(from: SocketAddr, to: SocketAddr) -> String {
    format!("connection to {from} timed out; failed over to {to}")
}

/// The interval at which unanswered traffic is checked for, and the pause between failed attempts.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A connection without a session is silent if nothing arrives for this long although the agent owes an answer.
const SILENCE_MIN: Duration = Duration::from_millis(750);
/// The same in round trips; the longer of the two counts.
const SILENCE_ROUND_TRIPS: u32 = 3;
/// The interval at which a silent connection is checked for recovery.
const RECOVERY_CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// The longest that a new connection can be held before authentication. After `KEEPALIVE` (5 s) the agent's russh sends
/// a keepalive, and ours ends an unauthenticated connection that receives one.
const HOLD_MAX: Duration = Duration::from_secs(4);
/// The timeout of the first attempt's handshake; it doubles with each attempt. An attempt that takes longer is repeated,
/// because one address may still refuse connections while another drops packets.
const HANDSHAKE_TIMEOUT_MIN: Duration = Duration::from_secs(2);

/// The interval at which the silence of a lane is checked: while the agent owes no answer, and while it does.
const LANE_CHECK_IDLE: Duration = Duration::from_millis(250);
const LANE_CHECK: Duration = Duration::from_millis(100);
/// The interval at which the agent is asked for a sign of life while the pod's streams move bytes: what it has sent may wait
/// in its TCP's backoff, and nothing that we sent would be unanswered. Without, there are the pings of each `KEEPALIVE`.
const LANE_PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// The part of the threshold after which a silent lane is asked for a sign of life.
const LANE_PROBE_PART: u32 = 3;

/// What becomes of a connection of a lane.
pub(super) enum LaneEnd {
    Lost(ConnectionEnd),
    /// Another connection has taken its place, which leads there.
    Replaced(SocketAddr, Box<AgentConnection<Kubernetes>>),
}

/// Waits until the connection of a lane has ended, or is silent and another one has taken its place.
///
/// A lane on which bytes move is asked for signs of life more often; `traffic` is what the pod's streams have moved, or none if
/// the lane has no stream. An old connection that answers before the agent has heard of the new one stays.
///
/// Dropping the future drops the new connection.
pub(super) async fn await_lane_end(
    connection: &AgentConnection<Kubernetes>,
    limits: LaneLimits,
    traffic: impl Fn() -> Option<Traffic>,
    redial: impl Fn() -> Redial,
) -> LaneEnd {
    let (liveness, mut ended) = (connection.liveness(), pin!(connection.ended()));
    loop {
        tokio::select! {
            end = &mut ended => return LaneEnd::Lost(end),
            () = until_lane_silent(&liveness, limits, &traffic) => {}
        }
        let redial = redial();
        let mut connected = pin!(redial.connect());
        let end = tokio::select! {
            (address, connection) = &mut connected => return LaneEnd::Replaced(address, Box::new(connection)),
            end = &mut ended => end,
            () = until_kept(&liveness, limits, &redial) => continue,
        };
        // The agent cuts the old connection as soon as it has heard the hello of a new one: that one is nearly there.
        tokio::select! {
            biased;
            (address, connection) = &mut connected => return LaneEnd::Replaced(address, Box::new(connection)),
            () = until_no_hello(&redial) => return LaneEnd::Lost(end),
        }
    }
}

async fn until_lane_silent(liveness: &Liveness, limits: LaneLimits, traffic: impl Fn() -> Option<Traffic>) {
    let threshold = || silent_after(liveness, limits.silence);
    let mut moves = Moves::start(traffic());
    loop {
        if liveness.unanswered().is_some() {
            sleep(LANE_CHECK).await;
        } else {
            sleep_until(next_idle_check(Instant::now())).await;
        }
        let silence = liveness.unanswered().unwrap_or_default();
        if silence >= threshold() {
            return;
        }
        if moves.probe_is_due(Instant::now(), traffic()) || silence >= threshold() / LANE_PROBE_PART {
            liveness.probe();
        }
    }
}

/// The idle lanes of all pods are checked at the same moments: a process with hundreds of pods wakes up once for all of them.
fn next_idle_check(now: Instant) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let since = now.saturating_duration_since(*FIRST.get_or_init(|| now));
    let interval = LANE_CHECK_IDLE.as_millis();
    let rest = interval - since.as_millis() % interval;
    now + Duration::from_millis(u64::try_from(rest).unwrap_or_default())
}

/// When a lane whose streams move bytes is to be asked for a sign of life, as its checks see it.
#[derive(Debug)]
struct Moves {
    traffic: Option<Traffic>,
    /// When bytes were first seen moved since the last probe.
    since: Option<Instant>,
}

impl Moves {
    fn start(traffic: Option<Traffic>) -> Self {
        Self { traffic, since: None }
    }

    /// Called at each check. A probe is due an interval after bytes have moved: the answer to a call may be stuck.
    fn probe_is_due(&mut self, now: Instant, traffic: Option<Traffic>) -> bool {
        let moved = (traffic.is_some() && traffic != self.traffic).then_some(now);
        self.traffic = traffic;
        self.since = self.since.or(moved);
        let is_due = self.since.is_some_and(|since| now - since >= LANE_PROBE_INTERVAL);
        if is_due {
            self.since = moved;
        }
        is_due
    }
}

/// Waits until the old connection answers and no new one says its hello.
async fn until_kept(liveness: &Liveness, limits: LaneLimits, redial: &Redial) {
    while is_lane_silent(liveness, limits) || redial.says_hello() {
        sleep(RECOVERY_CHECK_INTERVAL).await;
    }
}

async fn until_no_hello(redial: &Redial) {
    while redial.says_hello() {
        sleep(RECOVERY_CHECK_INTERVAL).await;
    }
}

/// Waits until a connection without a session is silent and a new one has replaced it.
///
/// `first` is the phase to try first, and `lock` that of the other attempts at the pod's addresses. Dropping the future
/// drops the new connection.
pub(super) async fn await_failover(
    plan: &Plan,
    liveness: &Liveness,
    first: PhaseName,
    lock: &AuthLock,
) -> Connected {
    loop {
        until_silent(liveness).await;
        tracing::debug!("pod {}: failover: the agent is silent; opening a new connection", plan.id);
        let (mut deadline, mut handshake_timeout) = (None, HANDSHAKE_TIMEOUT_MIN);
        while is_silent(liveness) {
            let hold = AuthHold::closed();
            let result = tokio::select! {
                result = connect_any(plan, first, &hold, lock) => result,
                () = hold_until_primary_is_dead(liveness, &hold, handshake_timeout, &mut deadline) => {
                    handshake_timeout *= 2;
                    continue;
                }
            };
            match result {
                Ok(connected) => return connected,
                Err(failures) => {
                    failures
                        .iter()
                        .for_each(|failure| tracing::debug!("pod {}: failover: {failure}", plan.id));
                    sleep(CHECK_INTERVAL).await;
                }
            }
        }
    }
}

/// Holds the new connection before authentication until the old (primary) connection had its chance to recover: until
/// `deadline`, which is set when the first handshake completes. Then lets it authenticate, and never returns, because
/// the agent may have replaced the old connection already.
///
/// Returns if the old connection recovers, if no handshake completes within `handshake_timeout`, or if the deadline is
/// further away than a connection can be held.
async fn hold_until_primary_is_dead(
    liveness: &Liveness,
    hold: &AuthHold,
    handshake_timeout: Duration,
    deadline: &mut Option<Instant>,
) {
    let primary_had_its_chance = async {
        if timeout(handshake_timeout, hold.handshake_done()).await.is_err() {
            return false;
        }
        // TCP doubles its retransmission interval (RFC 6298 5.5): a packet that has been unanswered for some time is sent
        // again within that time. A third of the threshold is added for the first interval and the reply's travel time.
        let chance = liveness.unanswered().unwrap_or_default() + silence_threshold(liveness) / 3;
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + chance);
        timeout(HOLD_MAX, sleep_until(deadline)).await.is_ok()
    };
    let dead = tokio::select! {
        biased;
        () = until_responsive(liveness) => return,
        dead = primary_had_its_chance => dead,
    };
    if dead && is_silent(liveness) {
        hold.open();
        pending().await
    }
}

async fn until_silent(liveness: &Liveness) {
    loop {
        sleep(CHECK_INTERVAL).await;
        if liveness.unanswered().is_some() {
            liveness.probe();
            sleep(silence_threshold(liveness)).await;
            if is_silent(liveness) {
                return;
            }
        }
    }
}

async fn until_responsive(liveness: &Liveness) {
    while is_silent(liveness) {
        sleep(RECOVERY_CHECK_INTERVAL).await;
    }
}

fn is_silent(liveness: &Liveness) -> bool {
    liveness.unanswered().is_some_and(|silence| silence >= silence_threshold(liveness))
}

fn silence_threshold(liveness: &Liveness) -> Duration {
    silent_after(liveness, SILENCE_MIN)
}

/// Whether a lane is silent.
pub(super) fn is_lane_silent(liveness: &Liveness, limits: LaneLimits) -> bool {
    liveness.unanswered().is_some_and(|silence| silence >= silent_after(liveness, limits.silence))
}

fn silent_after(liveness: &Liveness, at_least: Duration) -> Duration {
    at_least.max(liveness.round_trip() * SILENCE_ROUND_TRIPS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many probes a lane has in 20 s of checks, if bytes move at these checks.
    fn probes(moves_at: impl Fn(u32) -> bool) -> usize {
        let start = Instant::now();
        let mut traffic = Traffic::default();
        let mut moves = Moves::start(Some(traffic));
        let due = (1..=80).filter(|check| {
            traffic.received += u64::from(moves_at(*check));
            moves.probe_is_due(start + LANE_CHECK_IDLE * *check, Some(traffic))
        });
        due.count()
    }

    #[test]
    fn a_lane_at_rest_needs_no_probe() {
        assert_eq!(probes(|_| false), 0);
    }

    #[test]
    fn each_call_is_followed_by_one_probe() {
        // The last of the four is followed by it after the 20 s.
        assert_eq!(probes(|check| check % 20 == 0), 3);
        assert_eq!(probes(|check| check <= 3), 1);
    }

    #[test]
    fn a_lane_that_moves_bytes_is_probed_every_second() {
        assert_eq!(probes(|_| true), 19);
        assert_eq!(probes(|check| check % 2 == 0), 19);
        assert!(probes(|check| check % 3 == 0) >= 10);
    }

    #[test]
    fn a_lane_is_probed_after_its_last_bytes() {
        // Bytes move for 2 s: the probes are at 1.25 s and at 2.25 s.
        assert_eq!(probes(|check| check <= 8), 2);
    }

    #[test]
    fn a_lane_without_streams_needs_no_probe() {
        let start = Instant::now();
        let mut moves = Moves::start(None);
        assert!((1..=80).all(|check| !moves.probe_is_due(start + LANE_CHECK_IDLE * check, None)));
    }

    #[test]
    fn idle_lanes_are_checked_at_the_same_moments() {
        let now = Instant::now();
        let first = next_idle_check(now);
        assert!(first > now && first <= now + LANE_CHECK_IDLE);
        let second = next_idle_check(now + LANE_CHECK_IDLE / 5);
        let apart = (second - first.min(second)).max(first - first.min(second));
        // Whole intervals, but for the parts of a millisecond.
        assert!(apart.as_millis().is_multiple_of(LANE_CHECK_IDLE.as_millis()), "{apart:?}");
    }
}
