//! A pod's channel while its driver runs: the start that waits for it, and when its keys are published again.

use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::PodId;
use secure_comms_protocol::limits::SHUTDOWN_DRAIN;
use secure_comms_ssh::profile::KeyExchange;
use secure_comms_tunnel::Account;
use tokio::sync::watch;
use tokio::time::Instant;

use super::command::{Reply, StartOrder};
use super::error::AdaptorError;
use super::operation::{Served, Work};
use super::shared::Shared;
use crate::address::Address;
use crate::deadline::Deadline;
use crate::pod::{
    AttestationLimits, Driver, Ended, Entry, ExpectedAgent, LaneLimits, LostLimits, Plan, PodState,
    StatusReporter, Stop,
};
use crate::publication::Publication;
use crate::transport::agent_connection::Tunnels;
use crate::transport::routes::Routes;
use crate::transport::ssh::Flag;

/// The shortest time between two publications, so that neither a stranger in place of the agent nor an agent that never
/// gets its keys makes many.
const REPUBLISH_MIN: Duration = Duration::from_secs(5);
/// The longest time between two publications while the agent's attempts go on failing; it doubles up to this.
const REPUBLISH_MAX: Duration = Duration::from_secs(300);

/// The driver, and the start that waits for it.
pub(super) struct Channel {
    work: Work<Ended>,
    order: watch::Sender<Option<Stop>>,
    waiter: Option<(Deadline, Reply<()>)>,
    /// The result of a start that ran into its deadline, for when the driver has ended.
    verdict: Option<(Reply<()>, AdaptorError, String)>,
}

impl Channel {
    /// What the driver needs to know.
    pub(super) fn plan(
        id: &PodId,
        shared: &Shared,
        served: &Served,
        publication: Option<Arc<Publication>>,
        addresses: Vec<Address>,
    ) -> Plan {
        let config = &shared.config;
        let (inbounds, outbounds) = (&config.inbounds, &config.outbounds);
        let expected = ExpectedAgent::new(id, &served.node_key, &served.given, &config.agent)
            .with_old_agents(config.old_agents)
            .with_keys_from(&shared.key_source)
            .with_init_data(served.init_data.clone());
        Plan {
            id: id.clone(),
            addresses,
            node_key: served.node_key.clone(),
            pod_key: served.pod_key,
            expected: Arc::new(expected),
            publication,
            attestation: shared
                .key_source
                .as_ref()
                .map(|_| Tunnels::new(inbounds, outbounds, config.kbs_filter)),
            kubernetes: Tunnels::new(inbounds, outbounds, config.kbs_filter),
            rekey_bytes: config.rekey_bytes,
            kex: KeyExchange::post_quantum(config.require_pq),
            admission: shared.admission.clone(),
            attestation_limits: AttestationLimits::default(),
            // `open` sets these.
            lost_limits: LostLimits::for_start(Duration::ZERO),
            lane_limits: LaneLimits::default(),
            answered: Flag::default(),
            account: Account::unlimited(),
            session: None,
        }
    }

    /// Without a start, the pod was started by an earlier process.
    pub(super) fn open(
        mut plan: Plan,
        routes: Arc<Routes>,
        status: StatusReporter,
        start: Option<StartOrder>,
    ) -> Self {
        let entry = if start.is_some() { Entry::New } else { Entry::Restarted };
        if let Some(start) = &start {
            plan.lost_limits = LostLimits::for_start(start.deadline.total());
        }
        plan.answered = status.answered().clone();
        plan.account = status.account().clone();
        let (order, orders) = watch::channel(None);
        let driver = Driver::new(plan, routes, status, orders);
        let waiter = start.map(|order| (order.deadline, order.reply));
        Self { work: Box::pin(driver.run(entry)), order, waiter, verdict: None }
    }

    pub(super) fn work(&mut self) -> &mut Work<Ended> {
        &mut self.work
    }

    /// Orders the driver to end.
    pub(super) fn stop(&self, reason: &'static str) {
        self.order.send_replace(Some(Stop { reason, drain: SHUTDOWN_DRAIN }));
    }

    /// The start's caller, if it still waits for its result.
    pub(super) fn take_waiter(&mut self) -> Option<Reply<()>> {
        self.waiter.take().map(|(_, reply)| reply)
    }

    pub(super) fn start_deadline(&self) -> Option<Instant> {
        self.waiting_until().map(|deadline| deadline.at())
    }

    pub(super) fn waiting_until(&self) -> Option<Deadline> {
        self.waiter.as_ref().map(|(deadline, _)| *deadline)
    }

    /// The start ran into its deadline: the driver ends, and then the start's caller gets the error.
    pub(super) fn give_up(&mut self, id: &PodId, last_seen: String) {
        let Some((deadline, reply)) = self.waiter.take() else { return };
        let (pod, seconds) = (id.clone(), deadline.total_seconds());
        let error = AdaptorError::Deadline { pod, seconds, last_seen: last_seen.clone() };
        self.verdict = Some((reply, error, last_seen));
        self.stop("the adaptor gave up");
    }

    pub(super) fn take_verdict(&mut self) -> Option<(Reply<()>, AdaptorError, String)> {
        self.verdict.take()
    }
}

/// Decides when the keys of a pod are published again: the KBS may have lost them since.
#[derive(Debug)]
pub(super) struct Republish {
    /// Whether the VM had its keys before, so that an agent in the Attestation phase needs them a second time.
    had_keys: bool,
    wanted: bool,
    last: Option<Instant>,
    pause: Duration,
}

impl Default for Republish {
    fn default() -> Self {
        Self { had_keys: false, wanted: false, last: None, pause: REPUBLISH_MIN }
    }
}

impl Republish {
    pub(super) fn begin(&mut self, entry: Entry) {
        self.had_keys = entry == Entry::Restarted;
        self.forget();
    }

    /// The agent reported a failed attempt to get its keys, or is back in the Attestation phase. `gone` says
    /// whether the keys are not in the KBS; it is `None` if no VM needs them there.
    pub(super) fn on_state(&mut self, state: &PodState, gone: Option<bool>) {
        match (state, gone) {
            (PodState::Attesting { last_error, .. }, Some(gone)) => {
                self.wanted |= last_error.is_some() || self.had_keys || gone;
            }
            (PodState::Up { .. }, _) => {
                self.had_keys = true;
                self.forget();
                // The agent has proven itself: the next one that attests need not wait.
                self.last = None;
            }
            _ => self.wanted = false,
        }
    }

    pub(super) fn forget(&mut self) {
        (self.wanted, self.pause) = (false, REPUBLISH_MIN);
    }

    /// The keys are published, or are being published.
    pub(super) fn published(&mut self) {
        self.last = Some(Instant::now());
        if std::mem::take(&mut self.wanted) {
            self.pause = (self.pause * 2).min(REPUBLISH_MAX);
        }
    }

    /// When to publish again, if at all.
    pub(super) fn due(&self) -> Option<Instant> {
        self.wanted.then(|| self.last.map_or_else(Instant::now, |last| last + self.pause))
    }
}
