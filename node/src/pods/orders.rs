//! What launchers order, for whoever counts it.

use std::fmt;
use std::sync::OnceLock;

use secure_comms_adaptor::AdaptorError;
use secure_comms_protocol::PodId;

/// An order of a launcher, or its result.
#[derive(Clone, Copy, Debug)]
pub enum Order<'a> {
    /// A pod is to be prepared that was not being served.
    Prepare,
    /// The result of an order to prepare.
    Prepared(Result<(), &'a AdaptorError>),
    /// The result of an order to start.
    Started(Result<(), &'a AdaptorError>),
    /// The pod is gone.
    Stopped,
}

type Observer = Box<dyn Fn(&PodId, &Order<'_>) + Send + Sync>;

/// Who learns of the orders; at most one.
#[derive(Default)]
pub(super) struct Orders(OnceLock<Observer>);

impl fmt::Debug for Orders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Orders").finish_non_exhaustive()
    }
}

impl Orders {
    /// A second observer is ignored.
    pub(super) fn observe(&self, observer: Observer) {
        // The error gives the observer back.
        drop(self.0.set(observer));
    }

    pub(super) fn happened(&self, pod: &PodId, order: &Order<'_>) {
        if let Some(observer) = self.0.get() {
            observer(pod, order);
        }
    }
}
