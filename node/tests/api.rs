//! The API: pods are prepared, started, watched and ended over it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod api_support;
#[path = "../../adaptor/tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use api_support::{Node, id, node};
use secure_comms_adaptor::Deadline;
use secure_comms_adaptor::store::Store as _;
use secure_comms_node::api::client::{ClientError, Ended, StreamItem};
use secure_comms_node::api::types::{
    Launcher, Phase, PodRef, PodSpec, Prepared, Problem, RuntimeState, StartOrder,
};
use secure_comms_node::pods::{self, Launch};
use support::agent::{Agent, Mode};
use support::{KbsMode, PATIENCE};
use tokio::task::JoinSet;
use tokio::time::timeout;

fn named(name: &str) -> PodSpec {
    let pod_ref = PodRef { namespace: "default".into(), name: name.into() };
    PodSpec { pod_ref: Some(pod_ref), ..PodSpec::default() }
}

fn at(agent: &Agent, wait: bool) -> StartOrder {
    StartOrder { addresses: vec![agent.address.to_string()], deadline_seconds: Some(20), wait }
}

fn problem<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("no problem: {other:?}"),
    }
}

/// An agent that has the pod's keys, as after the attestation.
async fn agent(node: &Node, pod: &str) -> Agent {
    let key = node.store.pod_key(&id(pod)).await.unwrap();
    let worker = node.store.worker_node_key().await.unwrap().public().unwrap();
    Agent::start(Mode::kubernetes(key, worker)).await
}

#[tokio::test]
async fn a_pod_lives_over_the_api() {
    let (kbs, requests) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    let prepared = node.client.prepare(&id("p1"), &named("web-1"), None).await.unwrap().pod;
    assert_eq!((prepared.phase, prepared.launcher), (Phase::Prepared, Some(Launcher::Api)));
    assert_eq!((prepared.namespace.as_deref(), prepared.name.as_deref()), (Some("default"), Some("web-1")));
    assert_eq!(prepared.endpoints[0].tunnel, "KATAAGENT");
    assert!(prepared.endpoints[0].local.ends_with("/p1/a.sock"));
    assert_eq!(prepared.runtime.state, RuntimeState::None);

    let agent = agent(&node, "p1").await;
    let up = node.client.start(&id("p1"), &at(&agent, true)).await.unwrap();
    assert_eq!((up.phase, &up.addresses), (Phase::Up, &vec![agent.address.to_string()]));
    assert!(up.instance.is_some() && up.created == prepared.created);
    assert_eq!(node.client.pods().await.unwrap(), [node.client.pod(&id("p1")).await.unwrap()]);
    let status = node.client.status().await.unwrap();
    assert_eq!((status.pods, status.pods_by_phase[&Phase::Up], status.stop_cost.pods_at_risk), (1, 1, 1));
    assert!(status.ready);

    assert_eq!(node.client.stop(&id("p1"), false).await.unwrap(), Ended::Gone);
    assert_eq!(node.client.stop(&id("p1"), false).await.unwrap(), Ended::Gone);
    assert_eq!(problem(node.client.pod(&id("p1")).await).word(), "not-found");
    assert!(node.client.pods().await.unwrap().is_empty());
    assert!(requests.count("DELETE") > 0);
}

#[tokio::test]
async fn the_same_put_again_changes_nothing() {
    let (kbs, _) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    let body = r#"{"podRef": {"namespace": "default", "name": "web-1"}}"#;
    let first = node.ask("PUT", "/v1/pods/p1", body).await;
    let second = node.ask("PUT", "/v1/pods/p1", body).await;
    assert_eq!((first.status, second.status), (201, 200));
    let read = |body: &str| serde_json::from_str::<Prepared>(body).unwrap().pod;
    let (first, second) = (read(&first.body), read(&second.body));
    assert_eq!((&first.endpoints, first.created), (&second.endpoints, second.created));
    assert!(first.created.is_some() && second.user_data_is_absent());
    // Another body changes what may change.
    let digest = "0A".repeat(32);
    let third = node.ask("PUT", "/v1/pods/p1", &format!(r#"{{"initDataDigest": "{digest}"}}"#)).await;
    let third = read(&third.body);
    assert_eq!((third.init_data_digest, third.name), (Some(digest.to_lowercase()), None));
    assert_eq!((third.created, third.endpoints), (first.created, first.endpoints));
}

trait UserData {
    fn user_data_is_absent(&self) -> bool;
}

impl UserData for secure_comms_node::api::types::Pod {
    fn user_data_is_absent(&self) -> bool {
        !serde_json::to_string(self).unwrap().contains("userData")
    }
}

#[tokio::test]
async fn a_hundred_puts_at_once_make_one_pod() {
    let (kbs, _) = support::kbs().await;
    let node = std::sync::Arc::new(node(Some(&kbs)).await);
    let mut requests = JoinSet::new();
    for _ in 0..100 {
        let node = node.clone();
        requests.spawn(async move { node.ask("PUT", "/v1/pods/p1", "{}").await });
    }
    let answers = requests.join_all().await;
    let count = |status| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(201), count(200)), (1, 99));
    let read = |body: &str| serde_json::from_str::<Prepared>(body).unwrap().pod;
    let pods: Vec<_> = answers.iter().map(|answer| read(&answer.body)).collect();
    assert!(pods.iter().all(|pod| pod.created == pods[0].created && pod.endpoints == pods[0].endpoints));
    assert_eq!(node.client.pods().await.unwrap().len(), 1);
    assert_eq!(node.store.pods().await.unwrap(), [id("p1")]);
}

#[tokio::test]
async fn a_start_that_does_not_wait_goes_on() {
    let (kbs, _) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    node.client.prepare(&id("p1"), &PodSpec::default(), None).await.unwrap();
    let mut changes = node.pods.subscribe(&id("p1")).unwrap();
    let agent = agent(&node, "p1").await;
    let started = node.client.start(&id("p1"), &at(&agent, false)).await.unwrap();
    assert_ne!(started.phase, Phase::Prepared);
    let up = changes.wait_for(|now| Phase::from(&now.state) == Phase::Up);
    assert!(timeout(PATIENCE, up).await.unwrap().is_ok());
    for wait in [false, true] {
        let again = problem(node.client.start(&id("p1"), &at(&agent, wait)).await);
        assert_eq!((again.status, again.word()), (409, "already-started"));
        let unknown = problem(node.client.start(&id("p2"), &at(&agent, wait)).await);
        assert_eq!((unknown.status, unknown.word()), (404, "not-found"));
    }
}

#[tokio::test]
async fn a_start_that_fails_says_why() {
    let (kbs, _) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    node.client.prepare(&id("p1"), &PodSpec::default(), None).await.unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = vec![silent.local_addr().unwrap().to_string()];
    let order = StartOrder { addresses, deadline_seconds: Some(1), wait: true };
    let failed = problem(node.client.start(&id("p1"), &order).await);
    assert_eq!((failed.status, failed.word()), (504, "deadline"));
    assert_eq!(failed.instance.as_deref(), Some("/v1/pods/p1/start"));
    assert!(failed.advice.unwrap().contains("deadlineSeconds"));
    let pod = node.client.pod(&id("p1")).await.unwrap();
    assert_eq!(pod.phase, Phase::Failed);
    assert_eq!(pod.reason.as_deref(), Some("no answer yet"));
}

#[tokio::test]
async fn a_request_that_is_dropped_goes_on() {
    let (kbs, requests, mode) = support::kbs_in(KbsMode::Hangs("")).await;
    let node = node(Some(&kbs)).await;
    let client = node.client.clone();
    let put = tokio::spawn(async move { client.prepare(&id("p1"), &PodSpec::default(), None).await });
    requests.wait("POST", 1).await;
    put.abort();
    assert!(put.await.unwrap_err().is_cancelled());
    let mut changes = node.pods.subscribe(&id("p1")).unwrap();
    *mode.lock().unwrap() = KbsMode::Accepts;
    let prepared = changes.wait_for(|now| Phase::from(&now.state) == Phase::Prepared);
    assert!(timeout(PATIENCE, prepared).await.unwrap().is_ok());
    // The pod is known: it is not new.
    assert_eq!(node.ask("PUT", "/v1/pods/p1", "{}").await.status, 200);
}

#[tokio::test]
async fn a_delete_ends_a_put_that_waits() {
    let (kbs, requests, mode) = support::kbs_in(KbsMode::Hangs("")).await;
    let node = node(Some(&kbs)).await;
    let client = node.client.clone();
    let put = tokio::spawn(async move { client.prepare(&id("p1"), &PodSpec::default(), None).await });
    requests.wait("POST", 1).await;
    let client = node.client.clone();
    let delete = tokio::spawn(async move { client.stop(&id("p1"), false).await });
    let stopped = problem(timeout(PATIENCE, put).await.unwrap_or_else(|_| panic!("the PUT waits")).unwrap());
    assert_eq!((stopped.status, stopped.word()), (409, "stopped"));
    *mode.lock().unwrap() = KbsMode::Accepts;
    timeout(PATIENCE, delete).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_deletion_that_fails_is_retried_and_shown() {
    let (kbs, _, mode) = support::kbs_in(KbsMode::Accepts).await;
    let node = node(Some(&kbs)).await;
    for pod in ["p1", "p2"] {
        node.client.prepare(&id(pod), &PodSpec::default(), None).await.unwrap();
    }
    *mode.lock().unwrap() = KbsMode::Fails;
    let Ended::Deleting(deletion) = node.client.stop(&id("p1"), false).await.unwrap() else {
        panic!("deleted by a KBS that fails");
    };
    assert!(deletion.resource.unwrap().contains("p1"));
    assert!(deletion.reason.contains("500"), "{}", deletion.reason);
    let pod = node.client.pod(&id("p1")).await.unwrap();
    assert_eq!(pod.phase, Phase::Ending);
    let put = problem(node.client.prepare(&id("p1"), &named("a"), Some(Duration::from_secs(1))).await);
    assert!([409, 503, 504].contains(&put.status), "{put:?}");

    let forgotten = node.client.forget(&id("p2"), false).await.unwrap();
    assert!(forgotten.resources.iter().any(|resource| resource.contains("p2")), "{forgotten:?}");
    assert_eq!(node.client.pods().await.unwrap().len(), 1);

    let mut changes = node.pods.subscribe(&id("p1")).unwrap();
    *mode.lock().unwrap() = KbsMode::Accepts;
    // The channel closes once the pod is gone.
    timeout(PATIENCE, async { while changes.changed().await.is_ok() {} }).await.unwrap();
    assert!(node.client.pods().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_pod_of_cloud_api_adaptor_is_looked_at_only() {
    let (kbs, _) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    let launch = Launch::now(pods::Launcher::Caa, Some("default/web-1".parse().unwrap()));
    node.pods.prepare(&id("p1"), &launch, None, Deadline::after(PATIENCE)).await.unwrap();
    assert_eq!(node.client.pod(&id("p1")).await.unwrap().launcher, Some(Launcher::Caa));
    let order = StartOrder { addresses: vec!["127.0.0.1".into()], deadline_seconds: None, wait: false };
    for refused in [
        problem(node.client.prepare(&id("p1"), &named("a"), None).await),
        problem(node.client.start(&id("p1"), &order).await),
        problem(node.client.stop(&id("p1"), false).await),
        problem(node.client.forget(&id("p1"), false).await),
    ] {
        assert_eq!((refused.status, refused.word()), (409, "owned-by-caa"), "{refused:?}");
    }
    assert_eq!(node.client.stop(&id("p1"), true).await.unwrap(), Ended::Gone);
}

#[tokio::test]
async fn without_trustee_the_answer_has_the_user_data() {
    let node = node(None).await;
    let answer = node.ask("PUT", "/v1/pods/p1", "{}").await;
    assert_eq!(answer.status, 201);
    assert!(answer.head.contains("cache-control: no-store"), "{}", answer.head);
    let prepared: Prepared = serde_json::from_str(&answer.body).unwrap();
    let secret = prepared.user_data.clone().unwrap();
    assert!(!format!("{prepared:?}").contains("sc-pp-prv"));
    let fragment: serde_json::Value = serde_json::from_str(secret.expose()).unwrap();
    assert_eq!(fragment["sc-inbounds"], "KUBERNETES_PHASE:LOG:7000");
    assert!(fragment["sc-pp-prv"].as_str().unwrap().len() > 100);
    let again = node.client.prepare(&id("p1"), &PodSpec::default(), None).await.unwrap();
    assert_eq!(again.user_data, Some(secret));
}

#[tokio::test]
async fn events_come_in_their_order_and_are_found_again() {
    let (kbs, _) = support::kbs().await;
    let node = node(Some(&kbs)).await;
    let (mut all, mut one) = (
        node.client.events(None, None).await.unwrap(),
        node.client.events(Some(&id("p1")), None).await.unwrap(),
    );
    for pod in ["p1", "p2"] {
        node.client.prepare(&id(pod), &named(pod), None).await.unwrap();
    }
    let agent = agent(&node, "p1").await;
    node.client.start(&id("p1"), &at(&agent, true)).await.unwrap();
    node.client.stop(&id("p1"), false).await.unwrap();
    let mut seen = Vec::new();
    let mut first = None;
    while seen.last().is_none_or(|(_, reason)| reason != "Stopped") {
        let Ok(Ok(Some(StreamItem::Event(event)))) = timeout(PATIENCE, all.next()).await else {
            panic!("the stream ended after {seen:?}");
        };
        // On a machine under load a prepare takes longer than a second, and says what it waits for: also before the pod has its
        // name.
        if event.reason != "Waiting" {
            assert_eq!((event.namespace.as_deref(), event.name), (Some("default"), Some(event.pod.clone())));
        }
        first = first.or_else(|| all.last_id().map(str::to_owned));
        seen.push((event.pod, event.reason));
    }
    let of = |pod: &str| -> Vec<String> {
        seen.iter().filter(|(of, _)| of == pod).map(|(_, reason)| reason.clone()).collect()
    };
    let p2: Vec<_> = of("p2").into_iter().filter(|reason| reason != "Waiting").collect();
    assert_eq!(p2, ["Published"]);
    let p1 = of("p1");
    let places: Vec<_> = ["Published", "Withdrawn", "Up", "Stopped"]
        .map(|word| p1.iter().position(|reason| reason == word))
        .into();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{p1:?}");

    // A reader of one pod sees that pod only.
    let mut of_one = Vec::new();
    while of_one.last().is_none_or(|reason| reason != "Stopped") {
        let Some(StreamItem::Event(event)) = timeout(PATIENCE, one.next()).await.unwrap().unwrap() else {
            panic!("the stream ended after {of_one:?}");
        };
        assert_eq!(event.pod, "p1");
        of_one.push(event.reason);
    }
    assert_eq!(of_one, p1);

    // A reader that comes again misses nothing.
    let mut again = node.client.events(None, first.as_deref()).await.unwrap();
    for expected in &seen[1..] {
        let Some(StreamItem::Event(event)) = timeout(PATIENCE, again.next()).await.unwrap().unwrap() else {
            panic!("the stream ended before {expected:?}");
        };
        assert_eq!((event.pod, event.reason), *expected);
    }
    let ids: BTreeSet<_> = [first, again.last_id().map(str::to_owned)].into();
    assert_eq!(ids.len(), 2);
}

#[tokio::test]
async fn a_list_of_250_pods_that_start_is_quick() {
    const PODS: usize = 250;
    let node = node(None).await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let order = StartOrder {
        addresses: vec![silent.local_addr().unwrap().to_string()],
        deadline_seconds: Some(300),
        wait: false,
    };
    let mut starts = JoinSet::new();
    for number in 0..PODS {
        let (client, order) = (node.client.clone(), order.clone());
        starts.spawn(async move {
            let pod = id(&format!("{number:064x}"));
            client.prepare(&pod, &named("web"), None).await.unwrap();
            client.start(&pod, &order).await.unwrap()
        });
    }
    let mut times = Vec::new();
    while starts.try_join_next().is_some() || !starts.is_empty() || times.len() < 300 {
        let began = std::time::Instant::now();
        let listed = node.client.pods().await.unwrap();
        times.push((began.elapsed(), listed.len()));
    }
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100];
    // For people: a busy machine is no fault.
    println!("{} lists: p50 {:?}, p99 {:?}, slowest {:?}", times.len(), at(50), at(99), times.last());
    let listed = node.client.pods().await.unwrap();
    assert_eq!(listed.iter().filter(|pod| pod.phase == Phase::Connecting).count(), PODS);
    drop(silent);
}

#[tokio::test]
async fn a_pod_that_is_ended_by_force_is_taken_from_its_launcher() {
    let node = node(None).await;
    let mut taken_away = node.pods.taken_away();
    node.pods.set_obstacle(&id("p1"), &Launch::now(pods::Launcher::Caa, None), Some("it waits".to_owned()));
    for (method, path, status) in [
        ("DELETE", "/v1/pods/p1", 409),
        ("POST", "/v1/pods/p1/forget", 409),
        ("DELETE", "/v1/pods/p1?force=true", 204),
        ("POST", "/v1/pods/p1/forget?force=true", 200),
    ] {
        assert_eq!(node.ask(method, path, "").await.status, status, "{method} {path}");
        assert_eq!(taken_away.try_recv().is_ok(), status != 409, "{method} {path}");
    }
}
