//! What happens to the pods, for everyone who wants to know.

use std::sync::Arc;
use std::time::SystemTime;

use secure_comms_adaptor::pod::{Observer, PodEvent};
use secure_comms_protocol::PodId;
use tokio::sync::broadcast;

use crate::logging::names;

/// Events that a slow receiver may be behind before it loses the oldest.
const BACKLOG: usize = 1024;

/// Something that happened to a pod.
#[derive(Clone, Debug)]
pub struct Happening {
    /// When.
    pub at: SystemTime,
    /// The pod.
    pub pod: PodId,
    /// What.
    pub event: Arc<PodEvent>,
}

/// Hands the events of all pods to any number of receivers. A clone is the same.
#[derive(Clone, Debug)]
pub struct Events(broadcast::Sender<Happening>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(BACKLOG))
    }
}

impl Events {
    /// The observer for the adaptor's configuration. It never blocks.
    pub fn observer(&self) -> Observer {
        let events = self.0.clone();
        Arc::new(move |pod: &PodId, event: &PodEvent| {
            if matches!(event, PodEvent::Deleted) {
                names::remove(pod);
            }
            let happening =
                Happening { at: SystemTime::now(), pod: pod.clone(), event: Arc::new(event.clone()) };
            // An error means that nothing receives.
            drop(events.send(happening));
        })
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Happening> {
        self.0.subscribe()
    }
}
