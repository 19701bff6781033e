//! The store and the KBS client take every text of a key that the other readers take, and give the same reasons.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../../keys/testdata/variants.rs"]
#[allow(dead_code, reason = "shared; here are no lists of public keys")]
mod variants;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Duration;

use secure_comms_adaptor::kbs::{AdminSettings, KbsClient, KbsSettings};
use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_protocol::PodId;
use variants::{no_private_keys, private_keys};

/// The causes of an error.
fn chain(error: &dyn Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {}", chain(cause)))
}

/// What each reader makes of a text: a fingerprint, or an error.
async fn read_all(dir: &Path, pod: &PodId, text: &[u8]) -> [Result<String, String>; 4] {
    let [node_file, pod_file, admin_file] =
        ["worker-node.key", "pods/a/key", "admin.pem"].map(|file| dir.join(file));
    for file in [&node_file, &pod_file, &admin_file] {
        fs::write(file, text).unwrap();
    }
    let store = DirectoryStore::open(dir).unwrap();
    let admin = AdminSettings { key_file: admin_file, issuer: "me".into(), role: "admin".into() };
    let settings = KbsSettings { url: "http://kbs:8080".parse().unwrap(), ca: None, admin: Some(admin) };
    [
        store.worker_node_key().await.map(|key| key.fingerprint()).map_err(|error| chain(&error)),
        store.pod_key(pod).await.map(|key| key.fingerprint()).map_err(|error| chain(&error)),
        store.known_pod_key(pod).await.map(|key| key.unwrap().fingerprint()).map_err(|error| chain(&error)),
        KbsClient::new(&settings, Duration::ZERO)
            .map(|kbs| format!("{kbs:?}"))
            .map_err(|error| chain(&error)),
    ]
}

#[tokio::test]
async fn every_reader_of_a_private_key_takes_the_same_texts() {
    let dir = tempfile::tempdir().unwrap();
    let pod: PodId = "a".parse().unwrap();
    let store = DirectoryStore::open(dir.path()).unwrap();
    store.worker_node_key().await.unwrap();
    store.pod_key(&pod).await.unwrap();
    for (what, text) in private_keys() {
        let [node, own, known, admin] = read_all(dir.path(), &pod, &text).await;
        let fingerprint = node.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((own.unwrap(), known.unwrap()), (fingerprint.clone(), fingerprint.clone()), "{what}");
        // That it is the same key, keys/tests/formats.rs checks.
        assert!(admin.is_ok(), "{what}: {admin:?}");
    }
    for (text, part) in no_private_keys() {
        for result in read_all(dir.path(), &pod, &text).await {
            let error = result.unwrap_err();
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}
