//! A pod's task: commands that cross, callers that leave, a KBS that does not answer, and an unexpected end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test fail loudly")]

mod support;

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::{Store, StoreError};
use secure_comms_adaptor::{Adaptor, AdaptorError, Deadline, Endpoint, PodSpec};
use secure_comms_protocol::PodId;
use support::agent::{Agent, Mode};
use support::{KATAAGENT, KbsMode, PATIENCE, World, addresses, echoes, kbs_in, own_port, pod, refused};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Nothing that "returns at once" takes longer, also on a machine under load.
const AT_ONCE: Duration = Duration::from_secs(5);

fn soon() -> Deadline {
    Deadline::after(PATIENCE)
}

impl World {
    async fn agent(&self) -> Agent {
        Agent::start(Mode::kubernetes(self.pod_key().await, self.node_key().await)).await
    }

    async fn prepared(&self, deadline: Deadline) -> Result<Vec<Endpoint>, AdaptorError> {
        self.adaptor.prepare(&pod(), PodSpec::default(), deadline).await
    }

    async fn stop(&self) -> Result<(), AdaptorError> {
        self.adaptor.stop(&pod()).await
    }

    async fn suspend(&self) {
        self.adaptor.suspend(&pod()).await;
    }

    async fn start(&self, agent: &Agent) -> Result<(), AdaptorError> {
        self.adaptor.start(&pod(), &addresses(&[agent.address]), soon()).await
    }

    /// A pod that is up, and the address of its KATAAGENT inbound.
    async fn up(&self) -> (Agent, String) {
        let local = self.prepare().await;
        let agent = self.agent().await;
        self.start(&agent).await.unwrap();
        (agent, local)
    }

    fn keys_events(&self) -> Vec<String> {
        self.events.all().into_iter().filter(|line| line.starts_with("keys: ")).collect()
    }

    /// The pod can be used from the beginning to the end.
    async fn works(&self) {
        let (_agent, local) = self.up().await;
        echoes(&local).await;
        self.stop().await.unwrap();
        self.nothing_is_left(&local).await;
    }

    async fn nothing_is_left(&self, local: &str) {
        assert_eq!(self.adaptor.snapshot(&pod()), None);
        assert!(self.adaptor.snapshots().is_empty());
        assert!(self.store.pods().await.unwrap().is_empty());
        assert!(TcpStream::connect(local).await.is_err());
    }
}

/// A local client whose stream is open: it makes a stop drain for 3 s.
async fn hold_stream(local: &str) -> TcpStream {
    let mut client = TcpStream::connect(local).await.unwrap();
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    client
}

/// Polls the future at most `polls` times, and drops it then. Its result, if there was one.
async fn polled<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

async fn at_once<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(AT_ONCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} did not return within {AT_ONCE:?}"),
    }
}

#[tokio::test]
async fn a_start_during_a_stop_is_refused_at_once() {
    let world = World::new("").await;
    let (agent, local) = world.up().await;
    let client = hold_stream(&local).await;
    let second = async {
        sleep(Duration::from_millis(200)).await;
        at_once("start", world.start(&agent)).await
    };
    let (stopped, started) = tokio::join!(world.stop(), second);
    stopped.unwrap();
    assert!(matches!(started, Err(AdaptorError::NotPrepared(_))), "{started:?}");
    drop(client);
    world.nothing_is_left(&local).await;
    world.works().await;
}

#[tokio::test]
async fn a_start_after_a_prepare_during_a_stop_waits_for_both() {
    let world = World::new("").await;
    let (agent, local) = world.up().await;
    let _client = hold_stream(&local).await;
    let earlier = world.pod_key().await.public().unwrap();
    let host = async {
        sleep(Duration::from_millis(200)).await;
        let prepare = async {
            world.prepared(soon()).await.unwrap();
            // It is a new pod with a new key, which the agent gets only now.
            let key = world.pod_key().await;
            assert_ne!(key.public().unwrap(), earlier);
            agent.become_(Mode::kubernetes(key, world.node_key().await));
        };
        tokio::join!(prepare, world.start(&agent)).1
    };
    let (stopped, started) = tokio::join!(world.stop(), host);
    stopped.unwrap();
    started.unwrap();
    world.stop().await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_a_start_that_is_under_way() {
    let world = World::new("").await;
    world.prepare().await;
    // It never gets its keys.
    let agent = Agent::start(Mode::attestation()).await;
    let stop = async {
        agent.seen.wait("hello", 1).await;
        assert!(matches!(world.start(&agent).await, Err(AdaptorError::AlreadyStarted(_))));
        at_once("stop", world.stop()).await
    };
    let (started, stopped) = tokio::join!(world.start(&agent), stop);
    assert!(matches!(started, Err(AdaptorError::Stopped(_))), "{started:?}");
    stopped.unwrap();
    world.works().await;
}

#[tokio::test]
async fn a_stop_is_not_held_up_by_a_prepare_whose_kbs_is_dead() {
    let world = World::custom(refused(), "KUBERNETES_PHASE:KATAAGENT:0").await;
    let stop = async {
        sleep(Duration::from_millis(300)).await;
        let local = world.adaptor.snapshot(&pod()).unwrap();
        assert_eq!(local.state, PodState::Preparing);
        at_once("stop", world.stop()).await
    };
    let (prepared, stopped) = tokio::join!(world.prepared(soon()), stop);
    assert!(matches!(prepared, Err(AdaptorError::Stopped(_))), "{prepared:?}");
    // The pod's key never left, so there was nothing to delete.
    stopped.unwrap();
    assert!(world.adaptor.snapshot(&pod()).is_none());
    assert!(world.store.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_stop_reports_a_key_that_may_be_in_a_dead_kbs() {
    let (kbs, requests, mode) = kbs_in(KbsMode::Hangs("pp-pod-1")).await;
    let world = World::custom(kbs, KATAAGENT).await;
    let stop = async {
        requests.wait("POST /kbs/v0/resource/default/pp-pod-1/keys", 1).await;
        let start = Instant::now();
        let stopped = world.stop().await;
        assert!(start.elapsed() < 3 * AT_ONCE, "{:?}", start.elapsed());
        stopped
    };
    let (prepared, stopped) = tokio::join!(world.prepared(soon()), stop);
    assert!(matches!(prepared, Err(AdaptorError::Stopped(_))), "{prepared:?}");
    let error = stopped.unwrap_err();
    assert!(matches!(error, AdaptorError::NotDeleted { .. }));
    let error = error.to_string();
    let begin = "stop pod pod-1: default/pp-pod-1/keys may still be in the KBS: KBS at http://127.0.0.1:";
    assert!(error.starts_with(begin), "{error}");
    assert!(error.ends_with("; then stop the pod again, or delete it from the KBS by hand"), "{error}");
    *mode.lock().unwrap() = KbsMode::Accepts;
    world.stop().await.unwrap();
    world.works().await;
}

#[tokio::test]
async fn a_suspend_and_a_start_do_not_wait_for_a_stop_in_a_dead_kbs() {
    let (kbs, requests, mode) = kbs_in(KbsMode::Accepts).await;
    let world = World::custom(kbs, KATAAGENT).await;
    let (agent, local) = world.up().await;
    *mode.lock().unwrap() = KbsMode::Hangs("");
    let others = async {
        requests.wait("DELETE", 1).await;
        at_once("suspend", world.suspend()).await;
        let started = at_once("start", world.start(&agent)).await;
        assert!(matches!(started, Err(AdaptorError::NotPrepared(_))), "{started:?}");
        assert!(TcpStream::connect(&local).await.is_err());
        // A prepare waits for the stop, and a second stop cancels it.
        let prepare = world.prepared(soon());
        let stop = async {
            sleep(Duration::from_millis(100)).await;
            *mode.lock().unwrap() = KbsMode::Accepts;
            world.stop().await
        };
        let (prepared, stopped) = tokio::join!(prepare, stop);
        assert!(matches!(prepared, Err(AdaptorError::Stopped(_))), "{prepared:?}");
        stopped.unwrap();
    };
    let (stopped, ()) = tokio::join!(world.stop(), others);
    stopped.unwrap();
    world.nothing_is_left(&local).await;
}

#[tokio::test]
async fn a_dropped_future_drops_the_wait_only() {
    let world = World::new("").await;
    for polls in 0.. {
        let prepared = polled(polls, world.prepared(soon())).await;
        let done = prepared.is_some();
        let (agent, local) = world.up().await;
        echoes(&local).await;
        assert!(matches!(world.start(&agent).await, Err(AdaptorError::AlreadyStarted(_))));
        world.stop().await.unwrap();
        if done {
            break;
        }
        assert!(polls < 10);
    }
    for polls in 0.. {
        let local = world.prepare().await;
        let agent = world.agent().await;
        let done = polled(polls, world.start(&agent)).await.is_some();
        if polls > 0 {
            // The start goes on without its caller.
            agent.seen.wait("hello", 1).await;
            echoes(&local).await;
            assert!(matches!(world.state(), PodState::Up { .. }), "{:?}", world.state());
        }
        world.stop().await.unwrap();
        world.nothing_is_left(&local).await;
        if done {
            break;
        }
        assert!(polls < 10);
    }
    world.works().await;
}

#[tokio::test]
async fn a_dropped_stop_or_suspend_goes_on() {
    for stops in [true, false] {
        let world = World::new("").await;
        for polls in 0.. {
            let (_agent, local) = world.up().await;
            // Dropped while the streams drain.
            let _client = if polls == 1 { Some(hold_stream(&local).await) } else { None };
            let end = async {
                if stops {
                    world.stop().await.unwrap();
                } else {
                    world.suspend().await;
                }
            };
            let mut now = world.adaptor.subscribe(&pod()).unwrap();
            let done = polled(polls, end).await.is_some();
            if polls > 0 {
                let ended = timeout(PATIENCE, now.wait_for(|now| now.state == PodState::Stopped)).await;
                ended.unwrap().unwrap();
            } else {
                assert!(matches!(world.state(), PodState::Up { .. }));
            }
            world.stop().await.unwrap();
            world.nothing_is_left(&local).await;
            if done {
                break;
            }
            assert!(polls < 10);
        }
        world.works().await;
    }
}

#[tokio::test]
async fn a_dropped_resume_or_restore_goes_on() {
    let mut world = World::new("").await;
    let (agent, _) = world.up().await;
    let mut calls = (0, 0);
    for polls in 0..20 {
        world = world.restart("");
        if polled(polls, world.adaptor.resume_all()).await.is_none() {
            calls.0 += 1;
        }
        // Whatever was dropped: a second call completes it.
        world.adaptor.resume_all().await.unwrap();
        world.events.wait("kubernetes phase up", 1).await;
        world = world.restart("");
        if polled(polls, world.adaptor.restore_listeners(&pod())).await.is_none() {
            calls.1 += 1;
        }
        let endpoints = world.adaptor.restore_listeners(&pod()).await.unwrap().unwrap();
        polled(polls, world.adaptor.publish_keys(&pod())).await.transpose().unwrap();
        world.start(&agent).await.unwrap();
        echoes(&endpoints[0].local).await;
        if polls > calls.0.max(calls.1) + 1 {
            break;
        }
    }
    assert!(calls.0 > 1 && calls.1 > 1, "no call was dropped in the middle: {calls:?}");
    world.stop().await.unwrap();
    world.works().await;
}

/// A fixed sequence of pseudo-random numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Knuth's MMIX generator; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

async fn random_command(adaptor: Arc<Adaptor>, command: u64, agent: Agent, polls: usize) {
    let at = addresses(&[agent.address]);
    let deadline = Deadline::after(Duration::from_millis(700));
    let call = async {
        let result = match command {
            0 | 1 => adaptor.prepare(&pod(), PodSpec::default(), deadline).await.map(drop),
            2 | 3 => adaptor.start(&pod(), &at, deadline).await,
            4 => adaptor.restore_listeners(&pod()).await.map(drop),
            5 => adaptor.publish_keys(&pod()).await,
            6 => adaptor.resume_all().await.map(drop),
            7 => {
                adaptor.suspend(&pod()).await;
                Ok(())
            }
            _ => adaptor.stop(&pod()).await,
        };
        assert!(!matches!(result, Err(AdaptorError::TaskEnded(_))), "{result:?}");
    };
    // Some callers leave early.
    polled(polls, call).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_that_cross_leave_a_pod_that_works() {
    for seed in 1..=3 {
        let mut world = World::new("").await;
        let (agent, _) = world.up().await;
        let mut dice = Dice(seed);
        let adaptor = Arc::new(world.second());
        // The second adaptor can use the pod once the first one is gone.
        world = world.restart("");
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let polls = if dice.roll(3) == 0 { 1 } else { usize::MAX };
            calls.spawn(random_command(adaptor.clone(), dice.roll(9), agent.clone(), polls));
            match dice.roll(4) {
                0 => sleep(Duration::from_millis(dice.roll(40))).await,
                1 => tokio::task::yield_now().await,
                _ => {}
            }
        }
        let all = timeout(2 * PATIENCE, async {
            while let Some(call) = calls.join_next().await {
                call.unwrap()
            }
        });
        all.await.unwrap_or_else(|_| panic!("seed {seed}: a call did not return"));
        adaptor.stop(&pod()).await.unwrap();
        assert_eq!(adaptor.snapshot(&pod()), None, "seed {seed}");
        drop(adaptor);
        world.works().await;
    }
}

#[tokio::test]
async fn a_task_that_panics_says_so_and_can_be_replaced() {
    let world = World::panicking("kubernetes phase up").await;
    let local = world.prepare().await;
    let agent = world.agent().await;
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    let started = at_once("start", world.start(&agent)).await;
    assert!(matches!(started, Err(AdaptorError::TaskEnded(_))), "{started:?}");
    let snapshot = world.adaptor.snapshot(&pod()).unwrap();
    assert!(
        matches!(&snapshot.state, PodState::Failed { reason } if reason.contains("ended unexpectedly")),
        "{snapshot:?}"
    );
    assert!(snapshot.endpoints.is_empty());
    assert!(matches!(now.borrow_and_update().state, PodState::Failed { .. }));
    agent.seen.wait("gone", 1).await;
    // Aborted tasks end a little later than the one that owned them.
    sleep(Duration::from_millis(50)).await;
    assert!(TcpStream::connect(&local).await.is_err());
    world.prepare().await;
    assert_eq!(now.borrow_and_update().state, PodState::Prepared, "subscribers stay subscribed");
    world.stop().await.unwrap();
    assert!(world.adaptor.snapshot(&pod()).is_none());
}

#[test]
fn a_runtime_that_is_gone_ends_its_pods() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let world = first.block_on(async {
        let world = World::new("").await;
        world.up().await;
        world
    });
    drop(first);
    assert!(matches!(world.state(), PodState::Failed { .. }), "{:?}", world.state());
    // The KBS was the first runtime's. The VM has its keys, so it is not needed.
    runtime().block_on(async {
        world.prepared(soon()).await.unwrap();
        world.adaptor.suspend(&pod()).await;
        let restored = world.adaptor.restore_listeners(&pod()).await.unwrap();
        assert_eq!(restored.unwrap().len(), 1);
    });
}

#[tokio::test]
async fn a_dropped_adaptor_stops_its_pods() {
    let world = World::new("").await;
    let (agent, local) = world.up().await;
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    let world = world.restart("");
    timeout(PATIENCE, now.wait_for(|now| now.state == PodState::Stopped)).await.unwrap().unwrap();
    agent.seen.wait("gone", 1).await;
    assert!(TcpStream::connect(&local).await.is_err());
    assert_eq!(world.adaptor.resume_all().await.unwrap(), [pod()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fixed_port_is_free_once_the_pod_is_stopped() {
    let ports: Vec<_> = (0..16).map(|_| own_port()).collect();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut tags = format!("KUBERNETES_PHASE:KATAAGENT:{}", socket.display());
    for (index, port) in ports.iter().enumerate() {
        tags += &format!(",KUBERNETES_PHASE:X{index}:{port}");
    }
    let are_free = || {
        for port in &ports {
            std::net::TcpListener::bind(("127.0.0.1", *port)).unwrap();
        }
        assert!(!socket.exists());
    };
    let (kbs, _, _) = kbs_in(KbsMode::Accepts).await;
    let world = World::custom(kbs, &tags).await;
    for round in 0..20 {
        let endpoints = world.prepared(soon()).await.unwrap_or_else(|error| panic!("{round}: {error}"));
        assert_eq!(endpoints.len(), 17);
        if round % 2 == 0 {
            world.stop().await.unwrap();
        } else {
            world.suspend().await;
        }
        are_free();
    }
    // After a prepare that failed, too.
    let (refuses, _, _) = kbs_in(KbsMode::Refuses).await;
    let failing = World::custom(refuses, &tags).await;
    for _ in 0..3 {
        let prepared = failing.prepared(soon()).await;
        assert!(matches!(prepared, Err(AdaptorError::Kbs(_))), "{prepared:?}");
        are_free();
    }
}

#[tokio::test]
async fn a_second_adaptor_is_refused_until_the_first_one_ends() {
    let world = World::new("").await;
    let (agent, local) = world.up().await;
    let second = world.second();
    let at = addresses(&[agent.address]);
    let refused = [
        second.prepare(&pod(), PodSpec::default(), soon()).await.map(drop),
        second.restore_listeners(&pod()).await.map(drop),
        second.publish_keys(&pod()).await,
        second.stop(&pod()).await,
    ];
    let expected = format!(
        "another adaptor (pid {}) drives pod pod-1: end it first, or use another --store",
        std::process::id()
    );
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(matches!(error, AdaptorError::Store(StoreError::Locked { .. })), "{error}");
        assert_eq!(error.to_string(), expected);
    }
    assert!(second.resume_all().await.unwrap().is_empty());
    assert!(matches!(second.start(&pod(), &at, soon()).await, Err(AdaptorError::NotPrepared(_))));
    second.suspend(&pod()).await;
    // The first one has lost nothing: not its connection, its key, or its record.
    echoes(&local).await;
    assert_eq!(agent.seen.count("auth kubernetes proves a key"), 1);
    assert_eq!(world.published.count("DELETE"), 1, "its own, once it was up");
    assert_eq!(world.store.pods().await.unwrap(), [pod()]);
    world.suspend().await;
    assert_eq!(second.resume_all().await.unwrap(), [pod()]);
    assert!(matches!(world.stop().await, Err(AdaptorError::Store(StoreError::Locked { .. }))));
    second.stop(&pod()).await.unwrap();
    world.works().await;
}

#[tokio::test]
async fn two_adaptors_that_race_for_a_new_pod_share_nothing() {
    for _ in 0..5 {
        let world = World::new("").await;
        let second = world.second();
        let id = pod();
        let (a, b) = tokio::join!(world.prepared(soon()), second.prepare(&id, PodSpec::default(), soon()));
        assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1, "{a:?} {b:?}");
        // The loser has not deleted the winner's key.
        assert_eq!(world.store.pods().await.unwrap(), [pod()]);
        let winner = if a.is_ok() { &world.adaptor } else { &second };
        winner.stop(&pod()).await.unwrap();
        assert!(world.store.pods().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn without_trustee_a_pod_needs_a_key_first() {
    let world = World::user_data().await;
    world.store.forget(&pod()).await.unwrap();
    let error = world.prepared(soon()).await.unwrap_err();
    assert_eq!(error.to_string(), "pod pod-1 has no key here: run user-data first (wrong --store?)");
    assert!(world.store.pods().await.unwrap().is_empty());
    assert!(world.adaptor.snapshot(&pod()).is_none());
    world.store.pod_key(&pod()).await.unwrap();
    world.prepared(soon()).await.unwrap();
}

#[tokio::test]
async fn keys_that_the_kbs_lost_are_published_again() {
    let world = World::new("").await;
    world.prepare().await;
    let agent = Agent::start(Mode::attestation()).await;
    let latched = Mode::kubernetes(world.pod_key().await, world.node_key().await);
    let published = || world.published.count("POST /kbs/v0/resource/default/pp-pod-1/keys");
    let guest = async {
        agent.seen.wait("hello", 1).await;
        assert_eq!(published(), 1);
        // The KBS has lost the keys. The agent tries again and again.
        let failed = Instant::now();
        for attempt in 1..40 {
            agent.keys(attempt, "the KBS has no such resource");
            sleep(Duration::from_millis(250)).await;
            if published() > 1 {
                break;
            }
        }
        assert_eq!(published(), 2, "after {:?}", failed.elapsed());
        world.events.wait("keys published to the KBS again", 1).await;
        agent.keys(50, "the KBS has no such resource");
        sleep(Duration::from_millis(500)).await;
        assert_eq!(published(), 2, "it is throttled");
        agent.upgrade(latched);
    };
    let (started, ()) = tokio::join!(world.start(&agent), guest);
    started.unwrap();
    assert_eq!(world.keys_events(), ["keys: attempt 1: the KBS has no such resource"], "reported once");
    // The VM reboots: its agent is back in the Attestation phase, and the KBS may have lost the keys since.
    agent.become_(Mode::attestation());
    agent.cut();
    world.events.wait("keys published to the KBS again", 2).await;
    assert_eq!(published(), 3);
}

#[tokio::test]
async fn keys_that_cannot_be_published_again_are_reported_once() {
    let (kbs, requests, mode) = kbs_in(KbsMode::Accepts).await;
    let world = World::custom(kbs, KATAAGENT).await;
    let (agent, _) = world.up().await;
    *mode.lock().unwrap() = KbsMode::Fails;
    let before = requests.all().len();
    agent.become_(Mode::attestation());
    agent.cut();
    // The KBS fails, and the connection goes on meanwhile.
    requests.wait("POST", before + 1).await;
    agent.seen.wait("hello", 2).await;
    let mut now = world.adaptor.subscribe(&pod()).unwrap();
    for (attempt, cause) in [(1, "one cause"), (2, "one cause"), (3, "another cause"), (4, "one cause")] {
        agent.keys(attempt, cause);
        let at =
            |state: &PodState| matches!(state, PodState::Attesting { attempt: at, .. } if *at == attempt);
        timeout(PATIENCE, now.wait_for(|now| at(&now.state))).await.unwrap().unwrap();
    }
    // When it starts and when it changes.
    assert_eq!(
        world.keys_events(),
        ["keys: attempt 1: one cause", "keys: attempt 3: another cause", "keys: attempt 4: one cause"]
    );
    at_once("stop", world.suspend()).await;
}

#[tokio::test]
async fn a_caller_that_waits_learns_what_for() {
    let (kbs, _, mode) = kbs_in(KbsMode::Hangs("")).await;
    let world = World::custom(kbs.clone(), KATAAGENT).await;
    let deadline = soon();
    let kbs_recovers = async {
        world.events.wait("waiting for the KBS", 1).await;
        *mode.lock().unwrap() = KbsMode::Accepts;
    };
    let (prepared, ()) = tokio::join!(world.prepared(deadline), kbs_recovers);
    prepared.unwrap();
    let kbs = kbs.as_str().trim_end_matches('/');
    // Before that, a machine under load may wait for the store.
    let mut events = world.events.all();
    events.retain(|line| !line.starts_with("waiting for the store"));
    assert!(events[0].starts_with(&format!("waiting for the KBS at {kbs} to take the keys (")), "{events:?}");
    assert!(events[0].ends_with(" s left)"), "{events:?}");
    assert_eq!(events[1..], ["keys published to the KBS"], "the next one comes after 15 s");
    // Nothing listens there.
    let (id, at) = (pod(), addresses(&["127.0.0.1:1".parse().unwrap()]));
    let stop = async {
        world.events.wait("waiting for the VM: connecting: 127.0.0.1:1", 1).await;
        world.stop().await.unwrap();
    };
    let (started, ()) = tokio::join!(world.adaptor.start(&id, &at, soon()), stop);
    assert!(matches!(started, Err(AdaptorError::Stopped(_))), "{started:?}");
}

#[tokio::test]
async fn one_deadline_bounds_the_publication_and_the_start() {
    let (kbs, _, mode) = kbs_in(KbsMode::Hangs("")).await;
    let world = World::custom(kbs, KATAAGENT).await;
    let begin = Instant::now();
    let deadline = Deadline::after(Duration::from_secs(2));
    let error = world.prepared(deadline).await.unwrap_err();
    assert!(matches!(error, AdaptorError::Kbs(_)), "{error}");
    let took = begin.elapsed();
    assert!(took >= Duration::from_secs(1) && took < 2 * AT_ONCE, "{took:?}");
    *mode.lock().unwrap() = KbsMode::Accepts;
    let deadline = Deadline::after(Duration::from_secs(4));
    world.prepared(deadline).await.unwrap();
    // The deadline passes.
    sleep(Duration::from_secs(4)).await;
    let begin = Instant::now();
    let agent = Agent::start(Mode::attestation()).await;
    let started = world.adaptor.start(&pod(), &addresses(&[agent.address]), deadline).await;
    assert!(matches!(started, Err(AdaptorError::Deadline { seconds: 4, .. })), "{started:?}");
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_lost_connection_without_a_session_says_what_it_cost() {
    let world = World::new("").await;
    let local = world.prepare().await;
    let mode = Mode::kubernetes(world.pod_key().await, world.node_key().await);
    let agent = Agent::start(Mode { version: 1, ..mode }).await;
    world.start(&agent).await.unwrap();
    let clients = [hold_stream(&local).await, hold_stream(&local).await];
    agent.cut();
    world.events.wait("channel down: ", 1).await;
    assert_eq!(world.events.count("; 2 streams are reset by the reconnect"), 1, "{:?}", world.events.all());
    drop(clients);
    world.events.wait("kubernetes phase up", 2).await;
    agent.cut();
    world.events.wait("channel down: ", 2).await;
    assert_eq!(world.events.count("by the reconnect"), 1, "{:?}", world.events.all());
}

#[tokio::test]
async fn a_stop_interrupts_a_publication_under_way() {
    let (kbs, requests, mode) = kbs_in(KbsMode::Accepts).await;
    let world = World::custom(kbs, KATAAGENT).await;
    let (agent, local) = world.up().await;
    let before = requests.count("POST");
    *mode.lock().unwrap() = KbsMode::Hangs("");
    agent.become_(Mode::attestation());
    agent.cut();
    requests.wait("POST", before + 1).await;
    let begin = Instant::now();
    let stopped = world.stop().await;
    assert!(begin.elapsed() < 3 * AT_ONCE, "{:?}", begin.elapsed());
    assert!(matches!(stopped, Err(AdaptorError::NotDeleted { .. })), "{stopped:?}");
    *mode.lock().unwrap() = KbsMode::Accepts;
    world.stop().await.unwrap();
    world.nothing_is_left(&local).await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_hides_no_other() {
    let world = World::new("").await;
    world.prepare().await;
    let other: PodId = "another-pod".parse().unwrap();
    world.store.pod_key(&other).await.unwrap();
    let labels = world.store_path().join("pods").join(other.as_str()).join("labels.json");
    std::os::unix::fs::symlink("/dev/null", labels).unwrap();
    assert!(world.adaptor.record(&other).await.is_err(), "it cannot be read");
    let ids: Vec<_> = world.adaptor.records().await.unwrap().into_iter().map(|record| record.id).collect();
    assert_eq!(ids, [pod()]);
}
