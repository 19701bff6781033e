//! The end: requests under way are finished, and pods are suspended. The next process resumes them.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Parts, flat};
use crate::pods::Pods;

/// Time of the parts. The API has requests under way for 5 s.
const PARTS: Duration = Duration::from_secs(8);
/// Time of all pods together: their streams have 3 s, and the agents get a bye.
const PODS: Duration = Duration::from_secs(8);

/// Waits for the parts, which were asked to stop, and suspends all pods: at most 16 s.
pub(super) async fn drain(pods: &Pods, parts: &mut Parts) {
    let ended = timeout(PARTS, async {
        while let Some(ended) = parts.join_next().await {
            if let Err(error) = flat(ended) {
                tracing::error!("serve: at the end: {error:#}");
            }
        }
    });
    if ended.await.is_err() {
        tracing::warn!(
            "serve: parts that did not end within {} s are cut off: {}",
            PARTS.as_secs(),
            parts.len()
        );
        parts.abort_all();
    }
    let mut suspensions = JoinSet::new();
    for pod in pods.list() {
        let pods = pods.clone();
        suspensions.spawn(async move { pods.adaptor().suspend(&pod.id).await });
    }
    let all = timeout(PODS, async { while suspensions.join_next().await.is_some() {} });
    if all.await.is_err() {
        let left = suspensions.len();
        tracing::warn!(
            "serve: pods whose streams did not end within {} s are cut off: {left}",
            PODS.as_secs()
        );
    }
}
