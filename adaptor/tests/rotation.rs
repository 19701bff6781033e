//! Worker-node keys that are rotated while pods run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test fail loudly")]

mod support;

use std::fs;

use secure_comms_adaptor::Deadline;
use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::{DirectoryStore, Store, StoreError};
use secure_comms_keys::WorkerNodeKey;
use secure_comms_protocol::PodId;
use support::agent::{Agent, Mode};
use support::{PATIENCE, World, addresses, echoes, pod};
use tokio::time::timeout;

fn prints(keys: &[WorkerNodeKey]) -> Vec<String> {
    keys.iter().map(WorkerNodeKey::fingerprint).collect()
}

fn id(text: &str) -> PodId {
    text.parse().unwrap()
}

fn opened(directory: &tempfile::TempDir) -> DirectoryStore {
    DirectoryStore::open(directory.path().join("store")).unwrap()
}

#[tokio::test]
async fn a_pod_keeps_its_key_over_rotations() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    let first = store.worker_node_key().await.unwrap().fingerprint();
    store.pod_key(&id("old")).await.unwrap();
    let second = store.rotate_worker_node_key().await.unwrap().fingerprint();
    store.pod_key(&id("new")).await.unwrap();
    let third = opened(&directory).rotate_worker_node_key().await.unwrap().fingerprint();
    let store = opened(&directory);
    assert_eq!(store.worker_node_key().await.unwrap().fingerprint(), third);
    let keys = prints(&store.worker_node_keys().await.unwrap());
    assert_eq!(keys, [third.clone(), second.clone(), first.clone()]);
    let old = store.pod_worker_nodes(&id("old")).await.unwrap();
    assert_eq!((old.own.fingerprint(), prints(&old.others)), (first, vec![third, second.clone()]));
    assert_eq!(store.pod_worker_nodes(&id("new")).await.unwrap().own.fingerprint(), second);
}

#[tokio::test]
async fn a_record_of_before_has_the_oldest_key() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    store.pod_key(&id("a")).await.unwrap();
    fs::remove_file(directory.path().join("store/pods/a/worker-nodes.json")).unwrap();
    let first = store.worker_node_key().await.unwrap().fingerprint();
    store.rotate_worker_node_key().await.unwrap();
    store.rotate_worker_node_key().await.unwrap();
    assert_eq!(store.pod_worker_nodes(&id("a")).await.unwrap().own.fingerprint(), first);
    let pruned = store.prune().await.unwrap();
    assert_eq!(pruned.needed, [(first.clone(), vec![id("a")])]);
    store.save_given(&id("a"), &["SHA256:x".to_owned()]).await.unwrap();
    let nodes = store.pod_worker_nodes(&id("a")).await.unwrap();
    assert_eq!((nodes.own.fingerprint(), nodes.given), (first, vec!["SHA256:x".to_owned()]));
}

#[tokio::test]
async fn only_keys_that_no_pod_needs_are_pruned() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    store.pod_key(&id("a")).await.unwrap();
    let first = store.worker_node_key().await.unwrap().fingerprint();
    let second = store.rotate_worker_node_key().await.unwrap().fingerprint();
    let third = store.rotate_worker_node_key().await.unwrap().fingerprint();
    let pruned = store.prune().await.unwrap();
    assert_eq!((pruned.removed, pruned.needed), (vec![second], vec![(first.clone(), vec![id("a")])]));
    assert_eq!(prints(&store.worker_node_keys().await.unwrap()), [third.clone(), first.clone()]);
    store.forget(&id("a")).await.unwrap();
    let pruned = store.prune().await.unwrap();
    assert_eq!((pruned.removed, pruned.needed), (vec![first], vec![]));
    assert_eq!(prints(&store.worker_node_keys().await.unwrap()), [third]);
}

#[tokio::test]
async fn a_damaged_record_keeps_all_keys() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    store.pod_key(&id("a")).await.unwrap();
    store.rotate_worker_node_key().await.unwrap();
    fs::write(directory.path().join("store/pods/a/worker-nodes.json"), "{").unwrap();
    assert!(matches!(store.prune().await, Err(StoreError::BrokenRecord(_))));
    assert_eq!(store.worker_node_keys().await.unwrap().len(), 2);
}

#[tokio::test]
async fn an_interrupted_rotation_loses_no_key() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    let first = store.worker_node_key().await.unwrap().fingerprint();
    let root = directory.path().join("store");
    // Killed after the copy.
    fs::copy(root.join("worker-node.key"), root.join("worker-node.1.key")).unwrap();
    assert_eq!(prints(&store.worker_node_keys().await.unwrap()), std::slice::from_ref(&first));
    let second = store.rotate_worker_node_key().await.unwrap().fingerprint();
    assert_eq!(prints(&store.worker_node_keys().await.unwrap()), [second, first]);
}

#[tokio::test]
async fn a_missing_key_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    store.pod_key(&id("a")).await.unwrap();
    let first = store.worker_node_key().await.unwrap().fingerprint();
    store.rotate_worker_node_key().await.unwrap();
    fs::remove_file(directory.path().join("store/worker-node.1.key")).unwrap();
    let error = store.pod_worker_nodes(&id("a")).await.unwrap_err().to_string();
    assert!(error.contains(&format!("its worker-node key {first} is missing")), "{error}");
}

#[tokio::test]
async fn rotations_prunings_and_new_pods_race_safely() {
    let directory = tempfile::tempdir().unwrap();
    let store = opened(&directory);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..24 {
        let store = store.clone();
        tasks.spawn(async move {
            match number % 3 {
                0 => drop(store.rotate_worker_node_key().await.unwrap()),
                1 => drop(store.prune().await.unwrap()),
                _ => drop(store.pod_key(&id(&format!("p{number}"))).await.unwrap()),
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for pod in store.pods().await.unwrap() {
        store.pod_worker_nodes(&pod).await.unwrap();
    }
}

/// A pod that runs goes on with the key it was prepared with, over a rotation and a restart.
#[tokio::test]
async fn a_running_pod_is_resumed_with_its_key_after_a_rotation() {
    let world = World::new("").await;
    let local = world.prepare().await;
    // The agent lets in the first key only.
    let agent = Agent::start(Mode::kubernetes(world.pod_key().await, world.node_key().await)).await;
    let deadline = Deadline::after(PATIENCE);
    world.adaptor.start(&pod(), &addresses(&[agent.address]), deadline).await.unwrap();
    echoes(&local).await;
    let new = world.store.rotate_worker_node_key().await.unwrap().fingerprint();
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    let up = now.wait_for(|now| matches!(now.state, PodState::Up { .. }));
    timeout(PATIENCE, up).await.unwrap().unwrap();
    // A new pod gets the new key first, and lets in the earlier one, too.
    world.store.pod_key(&id("pod-2")).await.unwrap();
    let nodes = world.store.pod_worker_nodes(&id("pod-2")).await.unwrap();
    assert_eq!((nodes.own.fingerprint(), nodes.others.len()), (new, 1));
}
