//! One pod, from prepared to stopped, against a simulated agent.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::pod::{LOST, PodState};
use secure_comms_adaptor::store::Store;
use secure_comms_adaptor::{AdaptorError, Deadline};
use secure_comms_keys::{PodKey, WorkerNodeKey};
use support::agent::{Agent, Mode};
use support::{PATIENCE, World, addresses, echoes, pod};
use tokio::net::TcpListener;

/// For a start that fails at its deadline: also on a machine under load, an SSH handshake is done by then.
const SOON: Duration = Duration::from_secs(5);

impl World {
    async fn latched(&self) -> Mode {
        Mode::kubernetes(self.pod_key().await, self.node_key().await)
    }

    async fn start(&self, at: &[Address], deadline: Duration) -> Result<(), AdaptorError> {
        self.adaptor.start(&pod(), at, Deadline::after(deadline)).await
    }
}

#[tokio::test]
async fn a_new_pod_needs_one_handshake_in_each_phase() {
    let world = World::new("BOTH_PHASES:KBS:127.0.0.1:9").await;
    let agent = Agent::start(Mode::attestation()).await;
    let local = world.prepare().await;
    assert_eq!(world.prepare().await, local, "a second prepare changes nothing");
    assert_eq!(
        world.published.all(),
        ["POST /kbs/v0/resource/default/pp-pod-1/keys", "POST /kbs/v0/resource/default/pp-pod-1/keys"]
    );
    let latched = world.latched().await;
    let at = addresses(&[agent.address]);
    let guest = async {
        agent.seen.wait("hello", 1).await;
        agent.keys(1, "api-server-rest: \x1b[31mconnection refused");
        world.events.wait("keys:", 1).await;
        assert!(!agent.seen.all().iter().any(|line| line.contains("kubernetes")));
        agent.upgrade(latched);
    };
    let (started, ()) = tokio::join!(world.start(&at, PATIENCE), guest);
    started.unwrap();
    echoes(&local).await;
    let address = agent.address;
    assert_eq!(
        world.happened(),
        [
            "keys published to the KBS".to_owned(),
            "keys published to the KBS".to_owned(),
            format!("attestation: connected to {address}"),
            "tunnel KATAAGENT, Attestation phase: the agent serves it, but no --inbounds tag here listens for it".to_owned(),
            "keys: attempt 1: api-server-rest: \\u{1b}[31mconnection refused".to_owned(),
            format!("attestation done at {address}; reconnecting for the Kubernetes phase"),
            "the VM has its keys: deleted from the KBS".to_owned(),
            format!("kubernetes phase up at {address}"),
        ]
    );
    assert_eq!(agent.seen.count("connection"), 2 + agent.seen.count("connection refused"));
    assert_eq!(agent.seen.count("hello pod-1 out [\"KBS\"]"), 2);
    assert_eq!(agent.seen.count("forward KBS:9"), 2);
    assert_eq!(world.state(), PodState::Up { instance: "cafe".into() });
}

#[tokio::test]
async fn a_dead_first_address_does_not_hold_up_the_second() {
    let world = World::new("").await;
    // It accepts connections and sends nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    let start = Instant::now();
    let at = addresses(&[silent.local_addr().unwrap(), agent.address]);
    world.start(&at, PATIENCE).await.unwrap();
    assert!(start.elapsed() < 2 * SOON, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_start_past_its_deadline_reports_the_last_error() {
    let world = World::new("").await;
    world.prepare().await;
    let agent = Agent::start(Mode::attestation()).await;
    let at = addresses(&[agent.address]);
    let guest = async {
        agent.seen.wait("hello", 1).await;
        agent.keys(7, "the KBS says no");
    };
    let (started, ()) = tokio::join!(world.start(&at, SOON), guest);
    assert_eq!(
        started.unwrap_err().to_string(),
        "start pod pod-1: not up within 5 s; last seen: keys: attempt 7: the KBS says no; check that the VM runs and its \
         agent can be reached, or allow more time (--deadline)"
    );
    agent.seen.wait("gone", 1).await;
    // An address where nothing listens: the error has the address and the cause.
    let unused = std::net::SocketAddr::from(([127, 0, 0, 1], support::own_port()));
    let error = world.start(&addresses(&[unused]), Duration::from_secs(3)).await.unwrap_err().to_string();
    assert!(
        error.contains(&format!("connecting: {unused}: attestation: TCP connect: Connection refused")),
        "{error}"
    );
    let reported = world.events.all().iter().filter(|line| line.starts_with("connecting: ")).count();
    assert_eq!(reported, 1, "a failure that repeats is reported once: {:?}", world.events.all());
}

#[tokio::test]
async fn a_lost_vm_fails_the_start_before_its_deadline_and_keeps_the_keys() {
    let world = World::new("").await;
    world.prepare().await;
    assert!(!world.adaptor.was_answered(&pod()));
    let strangers =
        Mode::kubernetes(PodKey::generate().unwrap(), WorkerNodeKey::generate().unwrap().public().unwrap());
    let agent = Agent::start(strangers).await;
    // It takes at least 10 s, and a third of the deadline.
    let error = world.start(&addresses(&[agent.address]), 3 * PATIENCE).await.unwrap_err();
    assert_eq!(error.to_string(), format!("start pod pod-1: {LOST}"));
    assert!(agent.seen.count("auth attestation") >= 3, "{:?}", agent.seen.all());
    let shown = format!("connecting: {LOST}; nothing of it is proven");
    assert_eq!(world.events.all().iter().filter(|line| line.starts_with(&shown)).count(), 1);
    assert!(world.adaptor.was_answered(&pod()));
    assert!(world.store.known_pod_key(&pod()).await.unwrap().is_some());
    assert_eq!(world.published.count("DELETE"), 0);
    assert_eq!(agent.seen.count("auth kubernetes"), 0);
    assert!(matches!(error, AdaptorError::StartFailed { .. }));
}

#[tokio::test]
async fn an_agent_that_gets_its_keys_between_two_tries_is_not_lost() {
    let world = World::new("").await;
    world.prepare().await;
    let agent = Agent::start(Mode::attestation()).await;
    // Attestation; then, as kubernetes, its host key of that phase still; then it has moved on.
    agent.script([Mode::attestation(), Mode::attestation(), world.latched().await]);
    let guest = async {
        agent.seen.wait("hello", 1).await;
        agent.cut();
    };
    let at = addresses(&[agent.address]);
    let (started, ()) = tokio::join!(world.start(&at, PATIENCE), guest);
    started.unwrap();
    assert_eq!(agent.seen.count("connection"), 4);
    assert_eq!(world.times("connecting: "), 0, "it is one round: {:?}", world.events.all());
}

#[tokio::test]
async fn a_rejected_worker_node_key_is_reported_with_advice() {
    let world = World::new("").await;
    world.prepare().await;
    let other = WorkerNodeKey::generate().unwrap().public().unwrap();
    let agent = Agent::start(Mode::kubernetes(world.pod_key().await, other)).await;
    let stop = async {
        world.events.wait("rejects this worker node's (SHA256:", 1).await;
        world.events.wait("its keys were published with another worker-node key", 1).await;
        world.adaptor.suspend(&pod()).await;
    };
    let at = addresses(&[agent.address]);
    let (started, ()) = tokio::join!(world.start(&at, PATIENCE), stop);
    assert!(matches!(started, Err(AdaptorError::Stopped(_))), "{started:?}");
}

#[tokio::test]
async fn local_clients_wait_while_the_pod_reconnects() {
    let world = World::new("").await;
    let local = world.prepare().await;
    let latched = world.latched().await;
    let agent = Agent::start(latched.clone()).await;
    world.start(&addresses(&[agent.address]), PATIENCE).await.unwrap();
    // While the agent at the address attests, clients of KATAAGENT wait.
    agent.become_(Mode::attestation());
    agent.cut();
    world.events.wait("channel down: ", 1).await;
    let client = tokio::spawn(async move { echoes(&local).await });
    agent.seen.wait("hello", 2).await;
    assert!(!client.is_finished());
    assert_eq!(agent.seen.count("opens KATAAGENT in Attestation"), 0);
    agent.upgrade(latched);
    world.events.wait("kubernetes phase up", 2).await;
    client.await.unwrap();
    assert_eq!(agent.seen.count("opens KATAAGENT in Attestation"), 0);
    assert_eq!(agent.seen.count("opens KATAAGENT in Kubernetes"), 1);
}

#[tokio::test]
async fn a_vm_lost_after_the_start_is_reported_and_retried() {
    let world = World::new("").await;
    world.prepare().await;
    let latched = world.latched().await;
    let agent = Agent::start(latched.clone()).await;
    world.start(&addresses(&[agent.address]), PATIENCE).await.unwrap();
    agent.become_(Mode::kubernetes(PodKey::generate().unwrap(), world.node_key().await));
    agent.cut();
    world.events.wait("it is lost to this pod", 1).await;
    agent.become_(latched);
    world.events.wait("kubernetes phase up", 2).await;
}

#[tokio::test]
async fn a_stopped_pod_says_bye_and_leaves_nothing() {
    let world = World::new("").await;
    let local = world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&addresses(&[agent.address]), PATIENCE).await.unwrap();
    let pod_now = world.adaptor.subscribe(&pod()).unwrap();
    world.adaptor.stop(&pod()).await.unwrap();
    assert_eq!(pod_now.borrow().state, PodState::Stopped);
    assert!(pod_now.borrow().endpoints.is_empty());
    assert_eq!(agent.seen.count("the peer said bye: the pod is being deleted"), 1);
    // Once it was up, and at its end to be sure.
    assert_eq!(world.published.count("DELETE /kbs/v0/resource/default/pp-pod-1/keys"), 2);
    assert!(world.store.known_pod_key(&pod()).await.unwrap().is_none());
    assert!(world.adaptor.snapshot(&pod()).is_none());
    assert!(tokio::net::TcpStream::connect(local).await.is_err());
    agent.seen.wait("gone", 2).await;
}

#[tokio::test]
async fn a_pod_whose_key_the_kbs_cannot_delete_is_kept() {
    let world = World::new("").await;
    world.prepare().await;
    let key = world.pod_key().await.public();
    world.kbs_full.store(true, Ordering::Relaxed);
    let error = world.adaptor.stop(&pod()).await.unwrap_err().to_string();
    assert!(
        error.contains("401 PluginInternalError Plugin internal error; the KBS cannot use its storage"),
        "{error}"
    );
    assert_eq!(world.store.known_pod_key(&pod()).await.unwrap().unwrap().public(), key);
    // Once there is room, the stop is completed.
    world.kbs_full.store(false, Ordering::Relaxed);
    world.adaptor.stop(&pod()).await.unwrap();
    assert!(world.store.known_pod_key(&pod()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_new_process_resumes_its_pods_without_new_keys() {
    let world = World::new("").await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&addresses(&[agent.address]), PATIENCE).await.unwrap();
    let key = world.pod_key().await.public().unwrap();
    let published = world.published.all().len();
    let world = world.restart("");
    let before = agent.seen.count("auth attestation");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    world.events.wait("kubernetes phase up", 1).await;
    assert_eq!(agent.seen.count("auth attestation"), before, "Kubernetes comes first");
    assert_eq!(world.pod_key().await.public().unwrap(), key);
    assert_eq!(world.published.all().len(), published);
    let endpoints = world.adaptor.snapshot(&pod()).unwrap().endpoints;
    echoes(&endpoints[0].local).await;
}

#[tokio::test]
async fn without_trustee_there_is_no_attestation() {
    let world = World::user_data().await;
    let local = world.prepare().await;
    let agent = Agent::start(Mode::attestation()).await;
    let latched = world.latched().await;
    let vm = async {
        world.events.wait("host key", 1).await;
        agent.become_(latched);
    };
    let at = addresses(&[agent.address]);
    let (started, ()) = tokio::join!(world.start(&at, PATIENCE), vm);
    started.unwrap();
    echoes(&local).await;
    assert_eq!(agent.seen.count("attestation"), 0);
    assert_eq!(world.published.all().len(), 0);
    assert_eq!(world.times("check that the VM got this pod's user data"), 1);
}

#[tokio::test]
async fn a_start_needs_a_prepared_pod_and_an_address() {
    let world = World::new("").await;
    let at = addresses(&["127.0.0.1:1".parse().unwrap()]);
    let error = |result: Result<(), AdaptorError>| result.unwrap_err().to_string();
    assert_eq!(error(world.start(&[], SOON).await), "start pod pod-1: no address: give at least one");
    assert!(error(world.start(&at, SOON).await).contains("prepare it first"));
    assert!(world.store.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_expected_pod_is_preferred_to_a_stranger_that_attests() {
    let world = World::new("").await;
    world.prepare().await;
    let stranger = Agent::start(Mode::attestation()).await;
    let agent = Agent::start(world.latched().await).await;
    let latched = world.latched().await;
    stranger.become_(latched.clone());
    let at = addresses(&[stranger.address, agent.address]);
    world.start(&at, PATIENCE).await.unwrap();
    // The address that the pod was reached at is another VM's now.
    stranger.become_(Mode::attestation());
    stranger.cut();
    agent.cut();
    world.events.wait(&format!("kubernetes phase up at {}", agent.address), 1).await;
}

#[tokio::test]
async fn a_pod_can_be_started_again_after_a_failed_start() {
    let world = World::new("").await;
    world.prepare().await;
    let latched = world.latched().await;
    let agent = Agent::start(Mode { hangs_up: true, ..latched.clone() }).await;
    let at = addresses(&[agent.address]);
    let error = world.start(&at, SOON).await.unwrap_err().to_string();
    assert!(error.contains("attestation: authenticate: the other end closed the connection"), "{error}");
    agent.become_(latched);
    world.start(&at, PATIENCE).await.unwrap();
    let again = world.start(&at, PATIENCE).await.unwrap_err().to_string();
    assert_eq!(again, "pod pod-1: already started: stop it first");
}
