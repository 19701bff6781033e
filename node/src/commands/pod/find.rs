//! Which pod a person means: by its id, the first digits of it, or its name in Kubernetes.

use anyhow::bail;
use secure_comms_protocol::PodId;

use crate::api::client::Client;
use crate::api::types::Pod;
use crate::commands::screen::clean;

/// Pods that an error names at most.
const NAMED_MAX: usize = 4;

/// The pod that `text` names.
///
/// # Errors
/// None or several have such an id, or the service does not answer.
pub(in crate::commands) async fn find(client: &Client, text: &str) -> anyhow::Result<Pod> {
    choose(client.pods().await?, text)
}

/// The pod's id.
///
/// # Errors
/// The service's answer has none that is valid.
pub(super) fn id_of(pod: &Pod) -> anyhow::Result<PodId> {
    pod.id
        .parse()
        .map_err(|_| anyhow::anyhow!("the service's answer has no valid pod id: '{}'", clean(&pod.id)))
}

/// The id of the pod that `text` names, or of an orphan with that very id.
///
/// # Errors
/// As [`find`].
pub(super) async fn find_or_orphan(client: &Client, text: &str) -> anyhow::Result<PodId> {
    let none = match find(client, text).await {
        Ok(pod) => return id_of(&pod),
        Err(error) => error,
    };
    let orphans = client.orphans().await?;
    match text.parse::<PodId>() {
        Ok(id) if orphans.iter().any(|orphan| orphan.id == text) => Ok(id),
        _ => Err(none),
    }
}

fn choose(pods: Vec<Pod>, text: &str) -> anyhow::Result<Pod> {
    let shown = clean(text);
    if text.is_empty() {
        bail!("the pod's id is empty: see secure-comms-adaptor pod list");
    }
    let named = |pod: &Pod| match text.split_once('/') {
        Some((namespace, name)) => {
            pod.namespace.as_deref() == Some(namespace) && pod.name.as_deref() == Some(name)
        }
        None => pod.id.starts_with(text),
    };
    let mut found: Vec<Pod> = pods.into_iter().filter(named).collect();
    // A whole id counts, also if it is the beginning of another one.
    if let Some(at) = found.iter().position(|pod| pod.id == text) {
        return Ok(found.swap_remove(at));
    }
    match found.len() {
        0 => bail!("no pod '{shown}' is here: see secure-comms-adaptor pod list"),
        1 => Ok(found.swap_remove(0)),
        count => {
            let ids: Vec<_> = found.iter().take(NAMED_MAX).map(|pod| clean(&pod.id)).collect();
            let more = if count > NAMED_MAX { ", ..." } else { "" };
            bail!("{count} pods are called '{shown}': {}{more}: give more of the id", ids.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::pod::list::tests::pod;

    #[test]
    fn a_pod_is_found_by_what_is_unique() {
        let pods =
            || vec![pod("3f2a11", "web-1"), pod("3f2a22", "web-2"), pod("3f2a", "web-3"), pod("77", "web-2")];
        let id = |text: &str| choose(pods(), text).map(|pod| pod.id).map_err(|error| error.to_string());
        assert_eq!(id("3f2a1"), Ok("3f2a11".to_owned()));
        assert_eq!(id("3f2a"), Ok("3f2a".to_owned()), "a whole id");
        assert_eq!(id("7"), Ok("77".to_owned()));
        assert_eq!(id("default/web-1"), Ok("3f2a11".to_owned()));
        let error = |text: &str| id(text).unwrap_err();
        assert!(error("3f2").starts_with("3 pods are called '3f2': 3f2a11, 3f2a22, 3f2a: give more"));
        assert!(error("default/web-2").starts_with("2 pods are called"));
        assert!(error("x\u{1b}").starts_with("no pod 'x\\u{1b}' is here"));
        assert!(error("").contains("is empty"));
    }
}
