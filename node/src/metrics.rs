//! What a monitoring system reads: `/metrics`, `/healthz` and `/readyz`.
//!
//! ```text
//! orders and events of pods --> starts: counters, durations --\
//! caa, api, rules ---------------------------------> counters --> text --> server
//! pods and process, as they are now ---------------> scrape  --/
//! ```

mod process;
mod scrape;
mod server;
mod starts;
mod text;

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_protocol::PodId;

pub use self::server::{MetricsSettings, run};
pub use self::text::Form;

use self::starts::Starts;
use crate::pods::{Order, Pods};

/// The counters of the service. A clone is the same.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    refused_dials: Family<Reason, Counter>,
    rules_put_back: Counter,
    api_requests: Family<Answered, Counter>,
    starts: Starts,
    released_dials: Counter,
    parked_dials: Counter,
    failed_checks: Counter,
}

/// Why something was done.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// How a request of the API was answered.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    method: &'static str,
    status: u16,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("secure_comms");
        let refused_dials = Family::default();
        registry.register(
            "refused_dials",
            "Connections to the port of the pod VMs that were refused",
            Family::clone(&refused_dials),
        );
        let rules_put_back = Counter::default();
        registry.register(
            "rules_put_back",
            "Times that our nftables rules were gone or changed, and were put back",
            rules_put_back.clone(),
        );
        let api_requests = Family::default();
        registry.register(
            "api_requests",
            "Requests to the API that were answered",
            Family::clone(&api_requests),
        );
        let mut counter = |name, help| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let released_dials = counter(
            "released_dials",
            "Connections of cloud-api-adaptor whose handshake ended because the pod can be used",
        );
        let parked_dials = counter(
            "parked_dials",
            "Connections kept open without use: a younger pod has the address, or theirs was ended by force",
        );
        let failed_checks =
            counter("failed_checks", "Times that a kata agent did not answer before the handshake ended");
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", version);
        let starts = Starts::new(&mut registry);
        Self(Arc::new(Inner {
            registry,
            refused_dials,
            rules_put_back,
            api_requests,
            starts,
            released_dials,
            parked_dials,
            failed_checks,
        }))
    }
}

impl Metrics {
    /// A connection to the port that cloud-api-adaptor dials was refused. `reason` is a word of a fixed list.
    pub fn dial_refused(&self, reason: &'static str) {
        self.0.refused_dials.get_or_create(&Reason { reason }).inc();
    }

    /// Our nftables rules were put back.
    pub fn rules_put_back(&self) {
        self.0.rules_put_back.inc();
    }

    /// A request to the API was answered with this status. A method that the API does not know counts as `other`.
    pub fn api_answered(&self, method: &str, status: u16) {
        let known = ["GET", "HEAD", "PUT", "POST", "DELETE"].into_iter().find(|known| *known == method);
        let labels = Answered { method: known.unwrap_or("other"), status };
        self.0.api_requests.get_or_create(&labels).inc();
    }

    /// Something happened to a pod.
    pub fn happened(&self, pod: &PodId, event: &PodEvent) {
        self.0.starts.happened(pod, event);
    }

    /// A launcher has ordered something of a pod.
    pub fn ordered(&self, pod: &PodId, order: &Order<'_>) {
        self.0.starts.ordered(pod, order);
    }

    /// The handshake of a connection of cloud-api-adaptor has ended.
    pub fn dial_released(&self) {
        self.0.released_dials.inc();
    }

    /// A connection is kept open without use.
    pub fn dial_parked(&self) {
        self.0.parked_dials.inc();
    }

    /// A kata agent did not answer before the handshake of the runtime's connection.
    pub fn check_failed(&self) {
        self.0.failed_checks.inc();
    }

    /// The counters alone.
    ///
    /// # Errors
    /// A metric cannot be formatted.
    pub fn counters(&self, form: Form) -> Result<String, std::fmt::Error> {
        text::encode(form, &[&self.0.registry])
    }

    /// All metrics: the counters, and the pods and the process as they are now. `each_pod`: of each pod as well.
    ///
    /// # Errors
    /// A metric cannot be formatted.
    pub fn encode(&self, form: Form, pods: &Pods, each_pod: bool) -> Result<String, std::fmt::Error> {
        let (list, adaptor) = (pods.list(), pods.adaptor());
        let streams = scrape::streams(adaptor.traffic(), adaptor.memory_used());
        text::encode(form, &[&self.0.registry, &scrape::pods(&list, each_pod), &streams, &process::now()])
    }
}
