//! The keys at the KBS: under which path, from when on, until when, and what a KBS that is slow or fails changes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Method, StatusCode, Uri};
use secure_comms_adaptor::kbs::KbsError;
use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::Store;
use secure_comms_adaptor::{AdaptorError, Deadline, PodSpec};
use secure_comms_keys::{PodKeys, WorkerNodeKey, WorkerNodeKeys};
use secure_comms_protocol::InitDataDigest;
use support::agent::{Agent, Mode};
use support::{KATAAGENT, Lines, PATIENCE, World, addresses, echoes, pod};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const KEYS: &str = "default/pp-pod-1/keys";
const SEPARATE: &str = "default/pp-pod-1/privateKey";
const GONE: &str = "the VM has its keys: deleted from the KBS";

/// A KBS that keeps what it gets.
#[derive(Clone, Debug, Default)]
struct Keeping {
    requests: Lines,
    resources: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    /// How late it stores a publication, also if the client has gone.
    late: Arc<Mutex<Duration>>,
    /// What it answers a DELETE, if it does not do it.
    refuses: Arc<Mutex<Option<StatusCode>>>,
}

impl Keeping {
    async fn start() -> (url::Url, Self) {
        let kbs = Self::default();
        let serving = kbs.clone();
        let app = axum::Router::new()
            .fallback(move |method: Method, uri: Uri, body: Bytes| serving.clone().answer(method, uri, body));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (url, kbs)
    }

    async fn answer(self, method: Method, uri: Uri, body: Bytes) -> StatusCode {
        let path = uri.path().trim_start_matches("/kbs/v0/resource/").to_owned();
        self.requests.push(format!("{method} {path}"));
        if method == Method::DELETE {
            if let Some(status) = *self.refuses.lock().unwrap() {
                return status;
            }
            self.resources.lock().unwrap().remove(&path);
            return StatusCode::OK;
        }
        let late = *self.late.lock().unwrap();
        tokio::spawn(async move {
            sleep(late).await;
            self.resources.lock().unwrap().insert(path.clone(), body.to_vec());
            self.requests.push(format!("stored {path}"));
        })
        .await
        .unwrap();
        StatusCode::OK
    }

    fn set_late(&self, late: Duration) {
        *self.late.lock().unwrap() = late;
    }

    fn refuse(&self, status: Option<StatusCode>) {
        *self.refuses.lock().unwrap() = status;
    }

    fn paths(&self) -> Vec<String> {
        self.resources.lock().unwrap().keys().cloned().collect()
    }

    fn text(&self, path: &str) -> String {
        String::from_utf8(self.resources.lock().unwrap()[path].clone()).unwrap()
    }
}

async fn world() -> (World, Keeping) {
    let (url, kbs) = Keeping::start().await;
    (World::custom(url, KATAAGENT).await, kbs)
}

fn soon() -> Deadline {
    Deadline::after(PATIENCE)
}

fn digest(byte: &str) -> InitDataDigest {
    byte.repeat(32).parse().unwrap()
}

fn path_of(digest: &InitDataDigest) -> String {
    format!("default/pp-pod-1/{digest}")
}

impl World {
    async fn latched(&self) -> Mode {
        let init_data = self.adaptor.snapshot(&pod()).and_then(|pod| pod.init_data);
        let init_data = init_data.map(|digest| digest.to_string());
        Mode { init_data, ..Mode::kubernetes(self.pod_key().await, self.node_key().await) }
    }

    async fn prepare_bound(&self, digest: Option<&InitDataDigest>) -> Result<(), AdaptorError> {
        self.adaptor.prepare(&pod(), PodSpec::bound_to(digest.cloned()), soon()).await.map(drop)
    }

    async fn start(&self, agent: &Agent) -> Result<(), AdaptorError> {
        self.adaptor.start(&pod(), &addresses(&[agent.address]), soon()).await
    }

    /// Its VM reboots: the agent attests again.
    async fn reboot(&self, agent: &Agent) {
        let seen = agent.seen.count("hello");
        agent.become_(Mode::attestation());
        agent.restart();
        agent.seen.wait("hello", seen + 1).await;
    }
}

#[tokio::test]
async fn one_resource_holds_the_pods_key_and_its_worker_nodes() {
    let (url, kbs) = Keeping::start().await;
    let other = WorkerNodeKey::generate().unwrap().public().unwrap();
    let others = WorkerNodeKeys::parse(other.authorized_keys_line().unwrap().as_bytes()).unwrap();
    let world = World::configured(url, |config| config.worker_nodes = Some(others.clone())).await;
    world.prepare().await;
    assert_eq!(kbs.paths(), [KEYS]);
    let keys = PodKeys::from_text(&kbs.text(KEYS)).unwrap();
    assert_eq!(keys.pod_key().public().unwrap(), world.pod_key().await.public().unwrap());
    let nodes = keys.worker_node_keys();
    assert!(nodes.matches(&world.node_key().await.ssh()) && nodes.matches(&other.ssh()));
    assert_eq!(nodes.fingerprints().count(), 2);
}

#[tokio::test]
async fn old_agents_get_their_two_resources_as_well() {
    let (url, kbs) = Keeping::start().await;
    let world = World::configured(url, |config| config.old_agents = true).await;
    world.prepare().await;
    assert_eq!(kbs.paths(), [KEYS, SEPARATE, "default/sshclient/publicKey"]);
    assert_eq!(kbs.text(SEPARATE), *world.pod_key().await.to_pem().unwrap());
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    // Nothing private is left.
    assert_eq!(kbs.paths(), ["default/sshclient/publicKey"]);
}

#[tokio::test]
async fn the_key_is_gone_before_the_first_client_and_back_on_a_fallback() {
    let (world, kbs) = world().await;
    let local = world.prepare().await;
    let first = tokio::spawn(async move { echoes(&local).await });
    let agent = Agent::start(world.latched().await).await;
    kbs.refuse(Some(StatusCode::SERVICE_UNAVAILABLE));
    let start = async {
        kbs.requests.wait("DELETE", 2).await;
        assert!(!first.is_finished() && agent.seen.count("opens KATAAGENT") == 0);
        kbs.refuse(None);
        first.await.unwrap();
        assert_eq!(kbs.paths(), [""; 0]);
    };
    let (started, ()) = tokio::join!(world.start(&agent), start);
    started.unwrap();
    for round in 1..3 {
        world.reboot(&agent).await;
        world.events.wait("keys published to the KBS again", round).await;
        assert_eq!(kbs.paths(), [KEYS]);
        agent.upgrade(world.latched().await);
        world.events.wait("kubernetes phase up", round + 1).await;
        assert_eq!(kbs.paths(), [""; 0]);
    }
    assert_eq!(world.events.count(GONE), 3);
}

#[tokio::test]
async fn a_pod_that_is_up_publishes_nothing() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    let requests = kbs.requests.all();
    world.adaptor.publish_keys(&pod()).await.unwrap();
    world.prepare().await;
    agent.cut();
    world.events.wait("kubernetes phase up", 2).await;
    assert_eq!(kbs.requests.all(), requests, "neither a call nor a reconnect asks the KBS");
    // Nor does a new process, whatever it calls.
    let world = world.restart("");
    world.prepare().await;
    world.start(&agent).await.unwrap();
    assert_eq!(kbs.requests.all(), requests);
    // But a VM that is new gets its keys.
    world.reboot(&agent).await;
    world.events.wait("keys published to the KBS again", 1).await;
    assert_eq!(kbs.paths(), [KEYS]);
}

#[tokio::test]
async fn a_key_that_cannot_be_deleted_is_reported_and_no_client_is_served() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    kbs.refuse(Some(StatusCode::FORBIDDEN));
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    let said = async {
        let why = |state: &PodState| match state {
            PodState::Connecting { last_error: Some(why) } => {
                why.starts_with("the pod's key could not be deleted from the KBS: ")
            }
            _ => false,
        };
        timeout(PATIENCE, now.wait_for(|now| why(&now.state))).await.unwrap().unwrap();
        kbs.requests.wait("DELETE", 3).await;
        let said = world.times("the pod's key could not be deleted from the KBS: ");
        assert_eq!(said, 1, "once for one cause: {:?}", world.events.all());
        // The connection may break meanwhile.
        agent.cut();
        kbs.refuse(None);
    };
    let (started, ()) = tokio::join!(world.start(&agent), said);
    started.unwrap();
    assert_eq!(kbs.paths(), [""; 0]);
    assert_eq!(agent.seen.count("opens KATAAGENT"), 0);
}

#[tokio::test]
async fn a_stop_is_not_held_up_by_a_key_that_cannot_be_deleted() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    kbs.refuse(Some(StatusCode::FORBIDDEN));
    let stop = async {
        kbs.requests.wait("DELETE", 1).await;
        world.adaptor.stop(&pod()).await
    };
    let (started, stopped) = tokio::join!(world.start(&agent), stop);
    assert!(matches!(started, Err(AdaptorError::Stopped(_))), "{started:?}");
    assert!(matches!(stopped, Err(AdaptorError::NotDeleted { .. })), "{stopped:?}");
    kbs.refuse(None);
    world.adaptor.stop(&pod()).await.unwrap();
    assert_eq!(kbs.paths(), [""; 0]);
}

#[tokio::test]
async fn the_expected_init_data_is_in_the_path_also_after_a_restart() {
    let (world, kbs) = world().await;
    let (one, two) = (digest("1a"), digest("2b"));
    world.prepare_bound(Some(&one)).await.unwrap();
    assert_eq!(kbs.paths(), [path_of(&one)]);
    assert_eq!(world.adaptor.snapshot(&pod()).unwrap().init_data, Some(one.clone()));
    // Other init-data: the old path goes first.
    world.prepare_bound(Some(&two)).await.unwrap();
    let requests = kbs.requests.all();
    assert_eq!(requests[2..4], [format!("DELETE {}", path_of(&one)), format!("POST {}", path_of(&two))]);
    world.prepare_bound(None).await.unwrap();
    assert_eq!(kbs.paths(), [KEYS]);
    world.prepare_bound(Some(&two)).await.unwrap();
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    world.events.wait("kubernetes phase up", 1).await;
    assert_eq!(world.adaptor.snapshot(&pod()).unwrap().init_data, Some(two.clone()));
    world.reboot(&agent).await;
    world.events.wait("keys published to the KBS again", 1).await;
    assert_eq!(kbs.paths(), [path_of(&two)]);
    let world = world.restart("");
    world.adaptor.restore_listeners(&pod()).await.unwrap().unwrap();
    world.adaptor.publish_keys(&pod()).await.unwrap();
    assert_eq!(kbs.paths(), [path_of(&two)]);
    world.adaptor.stop(&pod()).await.unwrap();
    assert_eq!(kbs.paths(), [""; 0]);
}

#[tokio::test]
async fn other_init_data_waits_until_the_old_path_is_deleted() {
    let (world, kbs) = world().await;
    let (one, two) = (digest("1a"), digest("2b"));
    world.prepare_bound(Some(&one)).await.unwrap();
    kbs.refuse(Some(StatusCode::FORBIDDEN));
    let error = world.prepare_bound(Some(&two)).await.unwrap_err();
    assert!(matches!(error, AdaptorError::Kbs(KbsError::Refused { .. })), "{error}");
    assert_eq!((kbs.paths(), world.store.init_data(&pod()).await.unwrap()), (vec![path_of(&one)], Some(one)));
}

#[tokio::test]
async fn the_record_of_an_older_version_is_brought_up_to_date() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    world.adaptor.suspend(&pod()).await;
    // As version 0.1 leaves it: nothing is recorded, and its resource is there.
    let record = world.store_path().join("pods/pod-1");
    for file in ["published.json", "init-data"] {
        std::fs::remove_file(record.join(file))
            .or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })
            .unwrap();
    }
    kbs.resources.lock().unwrap().insert(SEPARATE.to_owned(), b"key".to_vec());
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    world.events.wait("kubernetes phase up", 1).await;
    assert_eq!(kbs.paths(), [""; 0]);
    assert_eq!(world.store.published(&pod()).await.unwrap(), Some(Vec::new()));
}

#[tokio::test]
async fn a_damaged_record_counts_as_published_wherever_it_can_be() {
    let (world, kbs) = world().await;
    let bound = digest("1a");
    world.prepare_bound(Some(&bound)).await.unwrap();
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    world.adaptor.suspend(&pod()).await;
    let record = world.store_path().join("pods/pod-1");
    std::fs::write(record.join("published.json"), "[\"default").unwrap();
    for path in [KEYS, SEPARATE, &path_of(&bound)] {
        kbs.resources.lock().unwrap().insert(path.to_owned(), b"key".to_vec());
    }
    let world = world.restart("");
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    world.events.wait("kubernetes phase up", 1).await;
    assert_eq!(kbs.paths(), [""; 0]);
    assert_eq!(world.store.published(&pod()).await.unwrap(), Some(Vec::new()));
    // Which init-data is expected cannot be guessed.
    world.adaptor.suspend(&pod()).await;
    std::fs::write(record.join("init-data"), "1a").unwrap();
    let error = world.prepare_bound(Some(&bound)).await.unwrap_err().to_string();
    assert!(error.contains("init-data: damaged") && error.contains("--init-data"), "{error}");
}

#[tokio::test]
async fn a_new_process_deletes_what_an_earlier_one_published() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    kbs.refuse(Some(StatusCode::FORBIDDEN));
    // Killed while it tries to delete.
    tokio::select! {
        started = world.start(&agent) => panic!("{started:?}"),
        () = kbs.requests.wait("DELETE", 1) => {}
    }
    let world = world.restart("");
    kbs.refuse(None);
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
    world.events.wait("kubernetes phase up", 1).await;
    assert_eq!(kbs.paths(), [""; 0]);
}

#[tokio::test]
async fn a_publication_stored_late_does_not_outlive_a_stop() {
    // Before the deletion, and between it and the end of its time.
    for late in [500, 2500] {
        let (world, kbs) = world().await;
        world.prepare().await;
        let agent = Agent::start(world.latched().await).await;
        world.start(&agent).await.unwrap();
        kbs.set_late(Duration::from_millis(late));
        world.reboot(&agent).await;
        kbs.requests.wait("POST", 2).await;
        world.adaptor.stop(&pod()).await.unwrap();
        kbs.requests.wait("stored", 2).await;
        assert_eq!(kbs.paths(), [""; 0], "{late} ms: {:?}", kbs.requests.all());
        // And a call after the stop makes no new key.
        let again = world.adaptor.publish_keys(&pod()).await;
        assert!(matches!(again, Err(AdaptorError::NotPrepared(_))), "{again:?}");
        assert!(world.store.pods().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_republication_under_way_does_not_outlive_the_withdrawal() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    // A handshake is quicker, also on a machine under load.
    kbs.set_late(Duration::from_secs(3));
    world.reboot(&agent).await;
    kbs.requests.wait("POST", 2).await;
    // The agent has its keys, from an attempt before the republication.
    agent.upgrade(world.latched().await);
    world.events.wait("kubernetes phase up", 2).await;
    assert_eq!(kbs.requests.count("stored"), 2, "it came up before the KBS had answered");
    assert_eq!(kbs.paths(), [""; 0], "{:?}", kbs.requests.all());
    assert_eq!(world.events.count("published to the KBS again"), 0, "{:?}", world.events.all());
}

#[tokio::test]
async fn a_key_published_for_a_stranger_is_gone_soon_after_a_resume() {
    let (world, kbs) = world().await;
    world.prepare().await;
    let agent = Agent::start(world.latched().await).await;
    world.start(&agent).await.unwrap();
    // Something at the pod's address attests. The agent has kept the session.
    agent.become_(Mode::attestation());
    agent.cut();
    world.events.wait("keys published to the KBS again", 1).await;
    assert_eq!(kbs.paths(), [KEYS]);
    agent.upgrade(world.latched().await);
    world.events.wait(GONE, 2).await;
    assert_eq!(kbs.paths(), [""; 0]);
    assert_eq!(world.events.count("session over"), 0, "{:?}", world.events.all());
}

#[tokio::test]
async fn a_publication_given_up_by_a_prepare_is_deleted_by_the_stop() {
    let (world, kbs) = world().await;
    kbs.set_late(Duration::from_millis(2500));
    let deadline = Deadline::after(Duration::from_millis(500));
    let prepared = world.adaptor.prepare(&pod(), PodSpec::default(), deadline).await;
    assert!(matches!(prepared, Err(AdaptorError::Kbs(KbsError::Unreachable { .. }))), "{prepared:?}");
    assert_eq!(world.store.pods().await.unwrap(), [pod()], "its key may be in the KBS");
    world.adaptor.stop(&pod()).await.unwrap();
    assert_eq!((kbs.requests.count("stored"), kbs.paths()), (1, Vec::new()), "{:?}", kbs.requests.all());
    assert!(world.store.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_publication_without_an_answer_keeps_the_pod_known() {
    let (world, kbs) = world().await;
    kbs.set_late(PATIENCE);
    let deadline = Deadline::after(Duration::from_millis(500));
    world.adaptor.prepare(&pod(), PodSpec::default(), deadline).await.unwrap_err();
    let error = world.adaptor.stop(&pod()).await.unwrap_err().to_string();
    assert!(
        error.contains("has not answered an earlier request to publish default/pp-pod-1/keys"),
        "{error}"
    );
    assert_eq!(world.store.pods().await.unwrap(), [pod()]);
}

#[tokio::test]
async fn a_kbs_that_cannot_be_reached_leaves_no_pod_behind() {
    let world = World::custom(support::refused(), KATAAGENT).await;
    let deadline = Deadline::after(Duration::from_millis(500));
    world.adaptor.prepare(&pod(), PodSpec::default(), deadline).await.unwrap_err();
    assert!(world.store.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_agent_with_other_init_data_is_named_once() {
    let (expected, others) = (digest("1a"), digest("2b"));
    for (expected, agents, part) in [
        (
            Some(&expected),
            Some(others.as_str()),
            format!("the agent has {others} and {expected} is expected"),
        ),
        (Some(&expected), None, format!("{expected} is expected and the agent knows of none")),
        (None, Some(others.as_str()), format!("the agent has {others} and none is expected")),
        (None, Some("no digest\n"), "the agent's digest is not one".to_owned()),
    ] {
        let (world, _kbs) = world().await;
        world.prepare_bound(expected).await.unwrap();
        let attests = || Mode { init_data: agents.map(Into::into), ..Mode::attestation() };
        let agent = Agent::start(attests()).await;
        let guest = async {
            world.events.wait(&part, 1).await;
            for attempt in 1..4 {
                agent.keys(attempt, &format!("the KBS denies it {attempt}"));
                world.events.wait(&format!("keys: attempt {attempt}: "), 1).await;
            }
            let PodState::Attesting { last_error: Some(error), .. } = world.state() else { panic!() };
            assert!(error.contains("denies it 3; init-data: ") && error.contains(&part), "{error}");
            agent.cut();
            agent.seen.wait("hello", 2).await;
            agent.upgrade(world.latched().await);
        };
        let (started, ()) = tokio::join!(world.start(&agent), guest);
        started.unwrap();
        assert_eq!(world.times(&part), 1, "{:?}", world.events.all());
    }
}

#[tokio::test]
async fn an_agent_with_the_expected_init_data_needs_no_advice() {
    let expected = digest("1a");
    for (expected, agents) in [(Some(&expected), Some(expected.to_string())), (None, None)] {
        let (world, _kbs) = world().await;
        world.prepare_bound(expected).await.unwrap();
        let agent = Agent::start(Mode { init_data: agents, ..Mode::attestation() }).await;
        let guest = async {
            agent.seen.wait("hello", 1).await;
            agent.keys(1, "not yet");
            world.events.wait("keys: ", 1).await;
            agent.upgrade(world.latched().await);
        };
        let (started, ()) = tokio::join!(world.start(&agent), guest);
        started.unwrap();
        assert_eq!(world.events.count("init-data"), 0, "{:?}", world.events.all());
    }
}

#[tokio::test]
async fn a_failed_deletion_does_not_keep_the_listeners() {
    let (world, kbs) = world().await;
    let local = world.prepare().await;
    kbs.refuse(Some(StatusCode::FORBIDDEN));
    world.adaptor.stop(&pod()).await.unwrap_err();
    assert!(TcpStream::connect(&local).await.is_err());
}
