//! The end of a pod whose keys cannot be deleted at once: marked in the store, retried, shown, and never resumed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test fail loudly")]

mod support;

use std::sync::Mutex;

use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::{Store, StoreError};
use secure_comms_adaptor::{AdaptorError, Deadline, PodSpec, Stopped};
use support::agent::{Agent, Mode};
use support::{KATAAGENT, KbsMode, PATIENCE, World, addresses, kbs_in, pod};
use tokio::time::timeout;

const DELETE: &str = "DELETE /kbs/v0/resource/default/pp-pod-1/keys";

fn change(mode: &Mutex<KbsMode>, to: KbsMode) {
    *mode.lock().unwrap() = to;
}

/// A pod that was up, and whose keys an agent needs again, so that they are at the KBS.
async fn prepared() -> (World, support::Lines, std::sync::Arc<Mutex<KbsMode>>) {
    let (url, requests, mode) = kbs_in(KbsMode::Accepts).await;
    let world = World::custom(url, KATAAGENT).await;
    world.prepare().await;
    (world, requests, mode)
}

async fn end(world: &World) -> Result<Stopped, AdaptorError> {
    timeout(PATIENCE, world.adaptor.end(&pod())).await.unwrap()
}

/// Waits until the pod has no task: it is deleted.
async fn gone(world: &World) {
    let Some(mut now) = world.adaptor.subscribe(&pod()) else { return };
    let closed = timeout(PATIENCE, async { while now.changed().await.is_ok() {} });
    assert!(closed.await.is_ok(), "{:?}", world.adaptor.snapshot(&pod()));
}

async fn records(world: &World) -> usize {
    world.store.pods().await.unwrap().len()
}

#[tokio::test]
async fn a_deletion_that_fails_is_shown_and_retried() {
    let (world, requests, mode) = prepared().await;
    change(&mode, KbsMode::Fails);
    let stopped = end(&world).await.unwrap();
    assert!(matches!(stopped, Stopped::Retried(AdaptorError::NotDeleted { .. })), "{stopped:?}");
    let PodState::Ending { last_error: Some(error) } = world.state() else { panic!("{:?}", world.state()) };
    assert!(error.starts_with("default/pp-pod-1/keys may still be in the KBS: KBS at"), "{error}");
    assert!(world.store.ending_since(&pod()).await.unwrap().is_some());
    let asked = requests.count(DELETE);
    change(&mode, KbsMode::Accepts);
    gone(&world).await;
    assert!(requests.count(DELETE) > asked);
    assert_eq!(records(&world).await, 0);
    assert_eq!(world.events.count("are deleted"), 1);
    assert_eq!(world.events.count("; retrying"), 1);
}

#[tokio::test]
async fn a_new_process_continues_a_deletion() {
    let (world, requests, mode) = prepared().await;
    let agent = Agent::start(Mode::kubernetes(world.pod_key().await, world.node_key().await)).await;
    let deadline = Deadline::after(PATIENCE);
    world.adaptor.start(&pod(), &addresses(&[agent.address]), deadline).await.unwrap();
    change(&mode, KbsMode::Fails);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Retried(_)));
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), []);
    assert!(matches!(world.state(), PodState::Ending { .. }), "{:?}", world.state());
    assert_eq!(world.adaptor.restore_listeners(&pod()).await.unwrap(), None);
    let before = requests.all().len();
    change(&mode, KbsMode::Accepts);
    gone(&world).await;
    assert_eq!(records(&world).await, 0);
    assert!(requests.all().split_off(before).iter().any(|line| line.as_str() == DELETE));
}

#[tokio::test]
async fn a_process_killed_in_a_stop_resumes_nothing() {
    let (world, requests, mode) = prepared().await;
    let agent = Agent::start(Mode::kubernetes(world.pod_key().await, world.node_key().await)).await;
    let deadline = Deadline::after(PATIENCE);
    world.adaptor.start(&pod(), &addresses(&[agent.address]), deadline).await.unwrap();
    change(&mode, KbsMode::Hangs("pp-pod-1"));
    let asked = requests.count(DELETE);
    // The stop has only begun when the adaptor is dropped.
    let cut = async { requests.wait(DELETE, asked + 1).await };
    let id = pod();
    tokio::select! {
        stopped = world.adaptor.end(&id) => panic!("{stopped:?}"),
        () = cut => {}
    }
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), []);
    change(&mode, KbsMode::Accepts);
    gone(&world).await;
    assert_eq!(records(&world).await, 0);
}

#[tokio::test]
async fn a_prepare_completes_the_deletion_first() {
    let (world, requests, mode) = prepared().await;
    let earlier = world.pod_key().await.public().unwrap();
    change(&mode, KbsMode::Fails);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Retried(_)));
    let short = Deadline::after(std::time::Duration::from_millis(300));
    let refused = world.adaptor.prepare(&pod(), PodSpec::default(), short).await;
    assert!(matches!(refused, Err(AdaptorError::Ending { .. })), "{refused:?}");
    assert!(matches!(world.state(), PodState::Ending { .. }), "{:?}", world.state());
    let before = requests.all().len();
    change(&mode, KbsMode::Accepts);
    world.prepare().await;
    let since = requests.all().split_off(before);
    let at = |part: &str| since.iter().position(|line| line.starts_with(part));
    assert!(at("DELETE") < at("POST"), "{since:?}");
    assert_eq!(world.state(), PodState::Prepared);
    assert_ne!(world.pod_key().await.public().unwrap(), earlier);
    assert_eq!(world.store.ending_since(&pod()).await.unwrap(), None);
    // The new record is locked.
    let other = world.second().stop(&pod()).await;
    assert!(matches!(other, Err(AdaptorError::Store(StoreError::Locked { .. }))), "{other:?}");
}

#[tokio::test]
async fn a_second_stop_tries_again_at_once() {
    let (world, _requests, mode) = prepared().await;
    change(&mode, KbsMode::Fails);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Retried(_)));
    change(&mode, KbsMode::Accepts);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Done));
    assert_eq!(world.adaptor.snapshot(&pod()), None);
}

#[tokio::test]
async fn a_suspend_leaves_the_deletion_to_a_later_process() {
    let (world, _requests, mode) = prepared().await;
    change(&mode, KbsMode::Fails);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Retried(_)));
    timeout(PATIENCE, world.adaptor.suspend(&pod())).await.unwrap();
    assert_eq!(world.adaptor.snapshot(&pod()), None);
    assert!(world.store.ending_since(&pod()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_forgotten_pod_leaves_its_resource_and_says_which() {
    let (world, requests, mode) = prepared().await;
    change(&mode, KbsMode::Fails);
    assert!(matches!(end(&world).await.unwrap(), Stopped::Retried(_)));
    let asked = requests.all().len();
    let left = timeout(PATIENCE, world.adaptor.forget(&pod())).await.unwrap().unwrap();
    assert_eq!(left, ["default/pp-pod-1/keys"]);
    assert_eq!((records(&world).await, world.adaptor.snapshot(&pod())), (0, None));
    assert_eq!(requests.all().len(), asked);
    assert_eq!(world.adaptor.forget(&pod()).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn an_unknown_pod_is_not_retried() {
    let (url, _requests, _mode) = kbs_in(KbsMode::Fails).await;
    let world = World::custom(url, KATAAGENT).await;
    let stopped = end(&world).await;
    assert!(matches!(stopped, Err(AdaptorError::NotDeleted { .. })), "{stopped:?}");
    assert_eq!(world.adaptor.snapshot(&pod()), None);
}
