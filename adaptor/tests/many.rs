//! Many pods of one adaptor: started at once, and resumed after its process was killed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test fail loudly")]

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secure_comms_adaptor::pod::PodState;
use secure_comms_adaptor::store::Store;
use secure_comms_adaptor::{Deadline, PodSpec};
use secure_comms_protocol::PodId;
use secure_comms_protocol::tag::parse_list;
use support::agent::{Agent, Mode};
use support::{World, addresses, kbs};
use tokio::task::JoinSet;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(120);

/// The times of `work` for each pod, sorted.
async fn timed<F: Future<Output = ()> + Send + 'static>(
    ids: &[PodId],
    work: impl Fn(PodId) -> F,
) -> Vec<Duration> {
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for id in ids {
        let work = work(id.clone());
        tasks.spawn(async move {
            work.await;
            begin.elapsed()
        });
    }
    let mut times = tasks.join_all().await;
    times.sort();
    times
}

fn shown(what: &str, times: &[Duration]) {
    let at = |part: usize| times.get((times.len() - 1) * part / 100).unwrap();
    println!("{what}: median {:?}, p99 {:?}, slowest {:?}", at(50), at(99), at(100));
}

/// Prepares, starts and resumes this number of pods. Agents and adaptor share the process.
async fn life_of(count: usize) {
    let sockets = tempfile::tempdir().unwrap();
    let tag = format!("KUBERNETES_PHASE:KATAAGENT:{}/{{pod}}.sock", sockets.path().display());
    let inbounds = parse_list(&tag).unwrap();
    let (url, _) = kbs().await;
    let world = World::configured(url, |config| config.inbounds = inbounds.clone()).await;
    let world = Arc::new(world);
    let ids: Vec<PodId> = (0..count).map(|number| format!("pod-{number}").parse().unwrap()).collect();
    let prepared = timed(&ids, |id| {
        let world = Arc::clone(&world);
        async move { drop(world.adaptor.prepare(&id, PodSpec::default(), Deadline::after(LIMIT)).await.unwrap()) }
    });
    shown("prepared", &prepared.await);
    let node = world.node_key().await;
    let mut agents = HashMap::new();
    for id in &ids {
        let key = world.store.pod_key(id).await.unwrap();
        agents.insert(id.clone(), Agent::start(Mode::kubernetes(key, node)).await);
    }
    let started = timed(&ids, |id| {
        let (world, at) = (Arc::clone(&world), addresses(&[agents.get(&id).unwrap().address]));
        async move { world.adaptor.start(&id, &at, Deadline::after(LIMIT)).await.unwrap() }
    });
    shown("up", &started.await);
    // As after a kill: nothing is said to the agents.
    let world = Arc::into_inner(world).unwrap().restart_configured(|config| config.inbounds = inbounds);
    let begin = Instant::now();
    let mut resumed = world.adaptor.resume_all().await.unwrap();
    println!("resume_all: {:?}", begin.elapsed());
    resumed.sort();
    let mut all = ids.clone();
    all.sort();
    assert_eq!(resumed, all);
    for id in &ids {
        let mut now = world.adaptor.subscribe(id).unwrap();
        let up = now.wait_for(|now| matches!(now.state, PodState::Up { .. }));
        timeout(LIMIT, up).await.unwrap().unwrap();
    }
    println!("all up again: {:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_pods_come_up_and_are_resumed() {
    life_of(30).await;
}

/// `cargo test --release -p secure-comms-adaptor --test many -- --ignored --nocapture` shows the times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement of a minute, run by name"]
async fn two_hundred_and_fifty_pods_come_up_and_are_resumed() {
    life_of(250).await;
}
