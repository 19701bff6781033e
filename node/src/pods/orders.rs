//! What launchers order, for their counters.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::Poll;

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

/// Waits for an order's result. It is seen through also if the caller does not wait for it: a result is always counted.
/// Orders of a pod keep the order in which their futures were first polled.
///
/// # Errors
/// Those of the order; its task has ended unexpectedly.
pub(super) async fn seen_through<T: Send + 'static>(
    pod: &PodId,
    order: impl Future<Output = Result<T, AdaptorError>> + Send + 'static,
) -> Result<T, AdaptorError> {
    let mut order: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(order);
    // Here, and not first in the task, which runs later.
    match poll_fn(|cx| Poll::Ready(order.as_mut().poll(cx))).await {
        Poll::Ready(result) => result,
        Poll::Pending => {
            tokio::spawn(order).await.unwrap_or_else(|_| Err(AdaptorError::TaskEnded(pod.clone())))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_order_that_is_not_waited_for_is_seen_through() {
        let (first, was_first) = oneshot::channel();
        let (go, gone) = oneshot::channel::<()>();
        let (seen, end) = oneshot::channel();
        let pod: PodId = "p".parse().unwrap();
        let order = seen_through(&pod, async move {
            first.send(()).unwrap();
            gone.await.unwrap();
            seen.send(()).unwrap();
            Ok(())
        });
        let mut order = Box::pin(order);
        assert!(timeout(std::time::Duration::ZERO, order.as_mut()).await.is_err());
        was_first.await.unwrap();
        drop(order);
        go.send(()).unwrap();
        end.await.unwrap();
    }
}
