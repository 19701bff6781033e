//! The fragment of `apf.json` that gives a pod VM its keys where there is no Trustee.

use std::fmt;

use base64ct::{Base64, Encoding};
use secure_comms_keys::{KeyError, PodKey, WorkerNodeKey, WorkerNodePublic};
use secure_comms_protocol::{InboundTag, OutboundTag, PodId};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::store::{Store, StoreError};

/// Error of making the fragment.
#[derive(Debug, thiserror::Error)]
pub enum UserDataError {
    /// A key could not be encoded.
    #[error("user data")]
    Key(#[from] KeyError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The JSON could not be written.
    #[error("user data")]
    Json(#[from] serde_json::Error),
}

#[derive(Serialize)]
struct Fragment<'a> {
    sc: bool,
    #[serde(rename = "sc-pp-prv")]
    pod_private: &'a str,
    #[serde(rename = "sc-wn-pub")]
    worker_node_public: &'a str,
    #[serde(rename = "sc-inbounds")]
    inbounds: &'a str,
    #[serde(rename = "sc-outbounds")]
    outbounds: &'a str,
}

/// The fragment of a pod: one JSON object and a newline. Makes the keys that are missing. The VM lets in every worker-node key
/// that is valid now, and the pod's record says so. It is secret; wiped on drop.
///
/// # Errors
/// The store failed, or a key could not be encoded.
///
/// # Cancellation
/// Keys that were made stay.
pub async fn of_pod(
    store: &dyn Store,
    id: &PodId,
    inbounds: &[InboundTag],
    outbounds: &[OutboundTag],
) -> Result<Zeroizing<Vec<u8>>, UserDataError> {
    let pod = store.pod_key(id).await?;
    let nodes = store.pod_worker_nodes(id).await?;
    let given: Vec<String> = nodes.all().map(WorkerNodeKey::fingerprint).collect();
    store.save_given(id, &given).await?;
    let nodes: Result<Vec<_>, _> = nodes.all().map(WorkerNodeKey::public).collect();
    fragment(&pod, &nodes?, inbounds, outbounds)
}

/// The fragment: one JSON object and a newline, with the worker nodes that may log in. It is secret, because it holds the pod's private key; wiped on drop.
///
/// # Errors
/// A key could not be encoded.
fn fragment(
    pod: &PodKey,
    worker_nodes: &[WorkerNodePublic],
    inbounds: &[InboundTag],
    outbounds: &[OutboundTag],
) -> Result<Zeroizing<Vec<u8>>, UserDataError> {
    let pod_private = Zeroizing::new(Base64::encode_string(pod.to_pem()?.as_bytes()));
    let lines: Result<Vec<String>, _> =
        worker_nodes.iter().map(WorkerNodePublic::authorized_keys_line).collect();
    let lines = lines?.join("\n");
    let (inbounds, outbounds) = (list(inbounds), list(outbounds));
    let fragment = Fragment {
        sc: true,
        pod_private: &pod_private,
        worker_node_public: &Base64::encode_string(lines.as_bytes()),
        inbounds: &inbounds,
        outbounds: &outbounds,
    };
    // The whole capacity at once: a vector that grows leaves copies behind that are not wiped. JSON escapes at most sixfold.
    let room = 4096 + pod_private.len() + 2 * lines.len() + 6 * (inbounds.len() + outbounds.len());
    let mut json = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *json, &fragment)?;
    json.push(b'\n');
    Ok(json)
}

fn list<T: fmt::Display>(tags: &[T]) -> String {
    tags.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use secure_comms_protocol::tag::parse_list;

    #[test]
    fn the_fragment_has_the_keys_that_the_agent_reads() {
        let pod = PodKey::generate().unwrap();
        let node = WorkerNodeKey::generate().unwrap().public().unwrap();
        let inbounds = parse_list("KUBERNETES_PHASE:LOG:podns:7000, KUBERNETES_PHASE:B:0").unwrap();
        let json = fragment(&pod, &[node], &inbounds, &[]).unwrap();
        assert_eq!(json.last(), Some(&b'\n'));
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(value["sc"], true);
        assert_eq!(value["sc-inbounds"], "KUBERNETES_PHASE:LOG:podns:7000,KUBERNETES_PHASE:B:0");
        assert_eq!(value["sc-outbounds"], "");
        let decode = |key: &str| Base64::decode_vec(value[key].as_str().unwrap()).unwrap();
        assert_eq!(PodKey::from_pem(&decode("sc-pp-prv")).unwrap().public().unwrap(), pod.public().unwrap());
        assert_eq!(decode("sc-wn-pub"), node.authorized_keys_line().unwrap().into_bytes());
    }
}
