//! The lives of the sandboxes: what begins, readies and ends a pod of cloud-api-adaptor.
//!
//! ```text
//! dials, changes of the directory --> router: which sandbox --> actor: one task for each --> machine: what to do
//!                                       claims, parking                 \\--- world: adaptor, connections (node)
//! ```

mod actor;
mod claims;
mod machine;
mod node;
mod parking;
mod router;
mod world;

use std::net::IpAddr;

use secure_comms_adaptor::pod::PodSnapshot;
use secure_comms_adaptor::store::StoreError;
use secure_comms_protocol::PodId;
use secure_comms_protocol::tag::Host;
use tokio::sync::{mpsc, watch};

use self::machine::Times;
use self::node::Node;
use self::router::{Resumed, Router};
use super::CaaSettings;
use super::directory::Changes;
use super::front::Held;
use super::strict::Identities;
use crate::init_data::InitDataPolicy;
use crate::metrics::Metrics;
use crate::pods::{Launch, Launcher, Pods};

/// The lives of all sandboxes.
pub(super) struct Lives {
    router: Router<Node>,
    changes: Changes,
    taken_away: mpsc::UnboundedReceiver<PodId>,
}

impl Lives {
    /// The sandboxes in the store, each with the grace to be dialled.
    ///
    /// # Errors
    /// The store cannot be read.
    pub(super) async fn new(
        settings: &CaaSettings,
        init_data: InitDataPolicy,
        pods: Pods,
        (changes, identities): (Changes, Identities),
        metrics: Metrics,
    ) -> Result<Self, StoreError> {
        let taken_away = pods.taken_away();
        let times = Times { grace: settings.grace, first_dial: settings.start_deadline };
        let node =
            Node { pods: pods.clone(), init_data, identities, start_deadline: settings.start_deadline };
        let mut router = Router::new(node, times, metrics);
        for record in pods.adaptor().records().await? {
            let launch = Launch::of_labels(&record.labels);
            if launch.launcher == Some(Launcher::Caa) && record.ending.is_none() {
                let vm = pods.adaptor().snapshot(&record.id).as_ref().and_then(vm_of);
                router.resume(Resumed { id: record.id, vm, created: launch.created });
            }
        }
        Ok(Self { router, changes, taken_away })
    }

    /// Serves until `stop` becomes true; connections are cut when it returns.
    pub(super) async fn run(mut self, dials: mpsc::Receiver<Held>, stop: watch::Receiver<bool>) {
        self.router.run(dials, self.changes, self.taken_away, stop).await;
    }
}

fn vm_of(pod: &PodSnapshot) -> Option<IpAddr> {
    pod.addresses.iter().find_map(|address| match &address.host {
        Host::Ip(ip) => Some(*ip),
        Host::Name(_) => None,
    })
}

#[cfg(test)]
mod tests;
