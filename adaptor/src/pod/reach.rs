//! Reaches the pod's agent: connects to all its addresses at once, until the Kubernetes phase is up at one.
//!
//! What answers in the Attestation phase is unproven. So every address attests on its own, nothing that is said there
//! ends the search, and only the Kubernetes phase, where the agent proves the pod's key, does.

use std::net::SocketAddr;

use secure_comms_protocol::{KeyProgress, PhaseName};

use super::advice::{explain, init_data_mismatch, lost_so_far};
use super::candidate::Report;
use super::candidates::{Candidates, Event, Reached};
use super::connect::Connected;
use super::driver::{Driver, Ended, stopped};
use super::status::PodEvent;

impl Driver {
    /// Returns once the Kubernetes phase is up at an address of the pod. `first` is the phase to try first at each, and
    /// `found` a connection in the Attestation phase that is there already.
    ///
    /// # Errors
    /// The channel was stopped, or a start failed because the VM is lost.
    pub(super) async fn reach(
        &mut self,
        first: PhaseName,
        found: Option<Connected>,
    ) -> Result<Reached, Ended> {
        let mut candidates = Candidates::new(&self.plan, first, found);
        self.show(&candidates);
        loop {
            let event = tokio::select! {
                stop = stopped(&mut self.stop) => {
                    self.routes.set_attestation(None);
                    candidates.end(stop.reason).await;
                    return Err(Ended::Stopped);
                }
                event = candidates.next() => event,
            };
            match event {
                Event::Report(address, report) => self.on_report(&mut candidates, address, report),
                Event::Resolved => self.show(&candidates),
                Event::Reached(reached) => {
                    self.routes.set_attestation(None);
                    self.end_others(candidates);
                    self.status.connected();
                    // The address that worked is tried first the next time.
                    if let Some(addresses) = self.plan.addresses.get_mut(..=reached.index) {
                        addresses.rotate_right(1);
                    }
                    return Ok(*reached);
                }
            }
            if self.starting && candidates.lost_for_good(self.plan.lost_limits) {
                candidates.end("the adaptor gave up").await;
                return Err(Ended::VmLost);
            }
        }
    }

    /// The connections elsewhere end on their own: the pod does not wait for what a stranger does.
    fn end_others(&mut self, candidates: Candidates) {
        while self.ending.try_join_next().is_some() {}
        self.ending.spawn(candidates.end("the Kubernetes phase is up on another connection"));
    }

    fn on_report(&mut self, candidates: &mut Candidates, address: SocketAddr, report: Report) {
        match report {
            Report::Failed(failure) => candidates.failed(address, failure),
            Report::Attesting { link, mismatches, init_data } => {
                candidates.attesting(address, link);
                self.status.connected();
                let expected = self.plan.expected.init_data.as_ref();
                self.status.init_data(init_data_mismatch(expected, init_data.as_deref()));
                self.status.emit(&PodEvent::Attesting(address));
                self.report_mismatches(PhaseName::Attestation, mismatches.as_deref());
                self.route(candidates);
            }
            Report::Keys(keys) => {
                let news = candidates.keys(address, keys.clone());
                let error = keys.error.map(|error| candidates.named(address, error));
                self.status.keys(KeyProgress { error, ..keys }, news);
            }
            Report::Upgrade => {
                candidates.upgrading(address);
                self.status.emit(&PodEvent::Upgrade(address));
                self.route(candidates);
            }
            Report::Ended(why) => {
                let why = candidates.named(address, why);
                candidates.ended(address);
                self.route(candidates);
                self.down(PhaseName::Attestation, why);
            }
        }
        self.show(candidates);
    }

    /// Routes the local clients of the Attestation phase.
    fn route(&self, candidates: &Candidates) {
        self.routes.set_attestation(candidates.newest_link());
    }

    /// Shows the most advanced connection; without one, why every address failed.
    fn show(&self, candidates: &Candidates) {
        let failures = candidates.failures();
        if let Some(state) = candidates.shown() {
            let others = (!failures.is_empty()).then(|| explain(&self.plan, &failures));
            self.status.others_failed(others);
            self.status.set_state(self.status.with_init_data(state));
            // Not before every address was tried: the pod's own agent may be at another one, and need no keys.
            if let Some(publication) = self.plan.publication.as_ref().filter(|_| candidates.all_tried())
                && publication.need()
            {
                self.status.keys_needed();
            }
        } else if candidates.all_failed() {
            let why = if candidates.all_lost() {
                lost_so_far(self.starting)
            } else {
                explain(&self.plan, &failures)
            };
            self.status.connect_failed(&why);
            self.set_degraded(why);
        }
    }
}
