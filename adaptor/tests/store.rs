//! The directory store: keys are made once and never replaced silently, and nothing is left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::store::{DirectoryStore, Store, StoreError};
use secure_comms_protocol::PodId;

fn open(root: &Path) -> DirectoryStore {
    DirectoryStore::open(root).unwrap()
}

fn pod(id: &str) -> PodId {
    id.parse().unwrap()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[tokio::test]
async fn a_key_is_made_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = open(&root);
    assert!(store.known_pod_key(&pod("a")).await.unwrap().is_none());
    let (node, a) = (store.worker_node_key().await.unwrap(), store.pod_key(&pod("a")).await.unwrap());
    let again = open(&root);
    assert_eq!(again.worker_node_key().await.unwrap().public().unwrap(), node.public().unwrap());
    assert_eq!(again.pod_key(&pod("a")).await.unwrap().public().unwrap(), a.public().unwrap());
    assert!(again.known_pod_key(&pod("a")).await.unwrap().is_some());
    assert_ne!(again.pod_key(&pod("b")).await.unwrap().public().unwrap(), a.public().unwrap());
    for (path, mode) in
        [("", 0o700), ("pods", 0o700), ("pods/a", 0o700), ("pods/a/key", 0o600), ("worker-node.key", 0o600)]
    {
        assert_eq!(fs::metadata(root.join(path)).unwrap().mode() & 0o7777, mode, "{path}");
    }
}

#[tokio::test]
async fn callers_that_race_for_a_key_get_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let pod = pod(&format!("pod{round}"));
        let racers = (0..8).map(|_| {
            let (store, pod) = (open(dir.path()), pod.clone());
            tokio::spawn(async move {
                (
                    store.pod_key(&pod).await.unwrap().public().unwrap(),
                    store.worker_node_key().await.unwrap().public().unwrap(),
                )
            })
        });
        let mut keys = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            keys.push(racer.await.unwrap());
        }
        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    }
}

#[tokio::test]
async fn a_pod_can_be_forgotten_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let key = store.pod_key(&pod("a")).await.unwrap();
    store.pod_key(&pod("b")).await.unwrap();
    store.save_addresses(&pod("a"), &["vm".parse().unwrap()]).await.unwrap();
    assert_eq!(store.pods().await.unwrap(), [pod("a"), pod("b")]);
    store.forget(&pod("a")).await.unwrap();
    store.forget(&pod("a")).await.unwrap();
    assert_eq!(store.pods().await.unwrap(), [pod("b")]);
    assert_eq!(fs::read_dir(dir.path().join("pods")).unwrap().count(), 1);
    assert_eq!(store.addresses(&pod("a")).await.unwrap(), []);
    assert_ne!(store.pod_key(&pod("a")).await.unwrap().public().unwrap(), key.public().unwrap());
}

#[tokio::test]
async fn addresses_are_kept_for_a_known_pod_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let addresses: Vec<Address> = ["vm:1", "[::1]:2", "10.0.0.1"].map(|text| text.parse().unwrap()).into();
    let error = store.save_addresses(&pod("a"), &addresses).await.unwrap_err();
    assert_eq!(error.to_string(), "key store: pod a is not known: prepare it first");
    store.pod_key(&pod("a")).await.unwrap();
    assert_eq!(store.addresses(&pod("a")).await.unwrap(), []);
    store.save_addresses(&pod("a"), &addresses).await.unwrap();
    assert_eq!(open(dir.path()).addresses(&pod("a")).await.unwrap(), addresses);
    let file = dir.path().join("pods/a/addresses.json");
    for broken in ["", "{}", "[1]", "[\"a b\"]"] {
        fs::write(&file, broken).unwrap();
        let error = store.addresses(&pod("a")).await.unwrap_err().to_string();
        assert!(error.contains("addresses.json: not a JSON list of addresses: delete the file"), "{error}");
    }
}

#[tokio::test]
async fn a_stray_entry_keeps_no_pod_down() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    open(&root).pod_key(&pod("a")).await.unwrap();
    let (pods, elsewhere) = (root.join("pods"), dir.path().join("elsewhere"));
    fs::write(pods.join("file"), "x").unwrap();
    fs::write(pods.join(".nfs0001"), "x").unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join(".tmp-1"), "not ours").unwrap();
    std::os::unix::fs::symlink(&elsewhere, pods.join("link")).unwrap();
    let store = open(&root);
    assert_eq!(store.pods().await.unwrap(), [pod("a")]);
    assert!(elsewhere.join(".tmp-1").exists(), "something outside of the store was removed");
}

#[tokio::test]
async fn leftovers_of_a_crash_are_ignored_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.pod_key(&pod("a")).await.unwrap();
    let pods = dir.path().join("pods");
    for leftover in [dir.path().join(".tmp-1"), pods.join(".tmp-2"), pods.join("a/.tmp-3")] {
        fs::write(leftover, "half a ke").unwrap();
    }
    for directory in [pods.join("halfway"), pods.join(".gone-1")] {
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(".tmp-4"), "half a ke").unwrap();
    }
    assert_eq!(store.pods().await.unwrap(), [pod("a")]);
    let store = open(dir.path());
    assert_eq!(store.pods().await.unwrap(), [pod("a")]);
    let left = std::process::Command::new("find")
        .arg(dir.path())
        .args(["-name", ".tmp-*", "-o", "-name", ".gone-*"])
        .output();
    assert_eq!(String::from_utf8(left.unwrap().stdout).unwrap(), "");
    store.pod_key(&pod("halfway")).await.unwrap();
}

#[tokio::test]
async fn a_broken_key_is_reported_and_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.pod_key(&pod("a")).await.unwrap();
    store.worker_node_key().await.unwrap();
    let files = [dir.path().join("pods/a/key"), dir.path().join("worker-node.key")];
    for (broken, fault) in [("", "it is empty"), ("garbage", "not PEM: no '-----BEGIN' line")] {
        for file in &files {
            fs::write(file, broken).unwrap();
        }
        let expected = |file: &Path, role: &str| {
            format!(
                "key store: {}: no usable key: restore the file from a backup; without one, delete it: a new key is made, and running VMs are lost: \
                 reading {role}: {fault}; give an unencrypted Ed25519 key (ssh-keygen -t ed25519 -N '')",
                file.display()
            )
        };
        let pod_key = "the pod's private key";
        assert_eq!(chain(&store.pod_key(&pod("a")).await.unwrap_err()), expected(&files[0], pod_key));
        assert_eq!(chain(&store.known_pod_key(&pod("a")).await.unwrap_err()), expected(&files[0], pod_key));
        assert_eq!(
            chain(&store.worker_node_key().await.unwrap_err()),
            expected(&files[1], "the worker node's private key")
        );
        assert_eq!(fs::read_to_string(&files[0]).unwrap(), broken);
    }
}

#[tokio::test]
async fn files_that_others_may_access_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = open(&root);
    store.pod_key(&pod("a")).await.unwrap();
    let key = root.join("pods/a/key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    let error = store.pod_key(&pod("a")).await.unwrap_err();
    assert!(matches!(error, StoreError::File(_)));
    assert!(
        chain(&error).contains("key: others may access it (mode 0640): run chmod 0600 on it"),
        "{}",
        chain(&error)
    );
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    let error = DirectoryStore::open(&root).unwrap_err();
    assert!(
        chain(&error).contains("store: others may access it (mode 0777): run chmod 0700 on it"),
        "{}",
        chain(&error)
    );
}

#[tokio::test]
async fn a_pod_has_one_lock_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (open(dir.path()), open(dir.path()));
    assert!(a.lock_pod(&pod("a")).await.unwrap().is_none(), "no record, no lock");
    assert_eq!(fs::read_dir(dir.path().join("pods")).unwrap().count(), 0);
    for id in ["a", "b"] {
        a.pod_key(&pod(id)).await.unwrap();
    }
    let held = a.lock_pod(&pod("a")).await.unwrap().unwrap();
    let refused = b.lock_pod(&pod("a")).await.unwrap_err();
    assert!(
        matches!(&refused, StoreError::Locked { pid: Some(pid), .. } if *pid == std::process::id()),
        "{refused}"
    );
    let other = b.lock_pod(&pod("b")).await.unwrap().unwrap();
    // Whatever is in the file: it only names the holder.
    for broken in ["", "x", "-1", "99999999999999999999"] {
        fs::write(dir.path().join("pods/a/adaptor.pid"), broken).unwrap();
        let refused = b.lock_pod(&pod("a")).await.unwrap_err().to_string();
        assert_eq!(refused, "another adaptor drives pod a: end it first, or use another --store");
    }
    // What needs no lock.
    b.pod_key(&pod("a")).await.unwrap();
    assert_eq!(b.pods().await.unwrap(), [pod("a"), pod("b")]);
    drop(held);
    drop(b.lock_pod(&pod("a")).await.unwrap().unwrap());
    drop(other);
}

#[tokio::test]
async fn the_lock_of_a_pod_does_not_outlive_its_record() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (open(dir.path()), open(dir.path()));
    a.pod_key(&pod("a")).await.unwrap();
    let held = a.lock_pod(&pod("a")).await.unwrap().unwrap();
    a.forget(&pod("a")).await.unwrap();
    assert_eq!(fs::read_dir(dir.path().join("pods")).unwrap().count(), 0);
    // Another pod of the same id.
    b.pod_key(&pod("a")).await.unwrap();
    let again = b.lock_pod(&pod("a")).await.unwrap().unwrap();
    drop(held);
    assert!(matches!(a.lock_pod(&pod("a")).await, Err(StoreError::Locked { .. })));
    drop(again);
}

#[tokio::test]
async fn a_key_file_that_was_removed_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = open(&root);
    let pod = pod("a");
    let first = store.pod_key(&pod).await.unwrap().public().unwrap();
    let paths = ["default/pp-a/keys".to_owned()];
    store.save_published(&pod, &paths).await.unwrap();
    fs::remove_file(root.join("pods/a/key")).unwrap();
    assert_ne!(store.pod_key(&pod).await.unwrap().public().unwrap(), first);
    // The earlier key may still be there.
    assert_eq!(store.published(&pod).await.unwrap().unwrap(), paths);
}
