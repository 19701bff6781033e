//! The lanes of a session against a simulated agent, where a test needs other limits than an adaptor sets.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::{Event, Inbound, Receiver, Sender};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::driver_tests::plan;
use super::{Driver, Entry, LaneLimits, Plan, PodSnapshot, StatusReporter, Stop};
use crate::support::agent::{Agent, Mode};
use crate::support::talk::{Network, Talk};
use crate::support::{Lines, PATIENCE, addresses, echo, pod};
use crate::transport::routes::Routes;

const LONG: Duration = Duration::from_secs(600);

/// Limits that no test reaches.
const PATIENT: LaneLimits = LaneLimits { silence: LONG, idle: LONG };

/// A pod that is up, with clients of both lanes.
struct Scene {
    agent: Agent,
    latched: Mode,
    events: Lines,
    now: watch::Receiver<PodSnapshot>,
    kata: String,
    data: String,
    /// Its driver and its inbounds. The driver ends once the order is gone.
    _tasks: JoinSet<()>,
    order: watch::Sender<Option<Stop>>,
}

impl Scene {
    async fn new(lane_limits: LaneLimits) -> Self {
        Self::at(lane_limits, |agent| agent.address).await
    }

    /// With an agent that is reached at another address than its own.
    async fn at(lane_limits: LaneLimits, address: impl FnOnce(&Agent) -> SocketAddr) -> Self {
        let inbounds = "KUBERNETES_PHASE:KATAAGENT:0,KUBERNETES_PHASE:DATA:0";
        let (plan, latched) = plan(inbounds, &format!("KUBERNETES_PHASE:UP:{}", echo().await));
        let agent = Agent::start(latched.clone()).await;
        let plan = Plan { addresses: addresses(&[address(&agent)]), lane_limits, ..plan };
        let events = Lines::default();
        let recorded = events.clone();
        let status = StatusReporter::new(pod(), Arc::new(move |_, event| recorded.push(event.to_string())));
        let (now, routes, mut tasks) = (status.subscribe(), Arc::<Routes>::default(), JoinSet::new());
        let mut local = Vec::new();
        for tag in &parse_list(inbounds).unwrap() {
            let inbound = Inbound::bind(tag).await.unwrap();
            local.push(inbound.local().to_owned());
            tasks.spawn(routes.serve(inbound));
        }
        let (order, orders) = watch::channel(None);
        let driver = Driver::new(plan, routes, status, orders);
        tasks.spawn(async move { drop(driver.run(Entry::Restarted).await) });
        events.wait("kubernetes phase up", 1).await;
        let [kata, data] = local.try_into().unwrap();
        Self { agent, latched, events, now, kata, data, _tasks: tasks, order }
    }

    /// Behind a network that can stand still.
    async fn behind_network(lane_limits: LaneLimits) -> (Self, Network) {
        let mut network = None;
        let scene = Self::at(lane_limits, |agent| network.insert(Network::before(agent.address)).address);
        let scene = scene.await;
        (scene, network.unwrap())
    }

    /// Waits until these lanes are connected, and no others.
    async fn until_lanes(&mut self, lanes: &[Lane]) {
        let lanes: BTreeSet<_> = lanes.iter().copied().collect();
        let are = |now: &PodSnapshot| now.session.as_ref().is_some_and(|session| session.lanes == lanes);
        let waited = timeout(PATIENCE, self.now.wait_for(are)).await.is_ok();
        assert!(waited, "not {lanes:?}: {:#?}", self.now.borrow().session);
    }
}

#[tokio::test]
async fn each_lane_goes_on_by_itself() {
    let mut scene = Scene::new(PATIENT).await;
    let (mut kata, mut data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    scene.agent.seen.wait("lane data resumed", 1).await;
    scene.agent.cut_lane(Lane::Data);
    data.say().await;
    kata.say().await;
    scene.agent.seen.wait("lane data resumed", 2).await;
    assert_eq!(scene.events.count("channel down"), 0, "{:?}", scene.events.all());
    scene.agent.cut_lane(Lane::Main);
    kata.say().await;
    data.say().await;
    assert_eq!(scene.agent.seen.count("lane data resumed"), 2, "{:?}", scene.agent.seen.all());
    scene.until_lanes(&Lane::ALL).await;
}

#[tokio::test]
async fn streams_of_a_lost_lane_go_on_over_the_main_one() {
    let scene = Scene::new(PATIENT).await;
    let mut data = Talk::new(&scene.data).await;
    scene.agent.seen.wait("lane data resumed", 1).await;
    scene.agent.become_(Mode { lanes: &[Lane::Main], ..scene.latched.clone() });
    scene.agent.cut_lane(Lane::Data);
    data.say().await;
    assert_eq!(scene.agent.seen.count("lane data"), 1, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.agent.seen.count("lane main"), 2, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.agent.seen.count("DATA on lane main"), 1, "{:?}", scene.agent.seen.all());
    data.end().await;
}

#[tokio::test]
async fn a_pause_that_ends_soon_replaces_nothing() {
    let (scene, network) = Scene::behind_network(PATIENT).await;
    let mut kata = Talk::new(&scene.kata).await;
    for _ in 0..3 {
        let stopped = network.stop();
        kata.send().await;
        stopped.send_replace(false);
        kata.hear().await;
    }
    assert_eq!(scene.agent.seen.count("lane main"), 1, "{:?}", scene.agent.seen.all());
}

#[tokio::test]
async fn a_stop_without_the_main_lane_ends_the_session() {
    let mut scene = Scene::new(PATIENT).await;
    let _data = Talk::new(&scene.data).await;
    scene.until_lanes(&Lane::ALL).await;
    let session = scene.agent.session();
    scene.agent.become_(Mode { hangs_up: true, ..scene.latched.clone() });
    scene.agent.cut_lane(Lane::Main);
    scene.until_lanes(&[Lane::Data]).await;
    scene.order.send_replace(Some(Stop { reason: "the pod is gone", drain: Duration::ZERO }));
    assert_eq!(timeout(PATIENCE, session.ended()).await.unwrap(), "the pod is gone");
}

#[tokio::test]
async fn a_network_that_carries_neither_lane_moves_no_stream() {
    let (mut scene, network) =
        Scene::behind_network(LaneLimits { idle: LONG, ..LaneLimits::default() }).await;
    let (mut kata, mut data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    scene.until_lanes(&Lane::ALL).await;
    network.block(true);
    kata.send().await;
    data.send().await;
    // The main lane counts as connected until another connection replaces it.
    scene.until_lanes(&[Lane::Main]).await;
    // Longer than the lane is waited for while the main one answers.
    sleep(Duration::from_secs(4)).await;
    network.block(false);
    data.hear().await;
    kata.hear().await;
    scene.agent.seen.wait("DATA on lane data", 1).await;
    assert_eq!(scene.agent.seen.count("DATA on lane main"), 0, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.agent.seen.count("lane main new"), 1, "{:?}", scene.agent.seen.all());
}

/// A time without use that a test can wait for.
const SOON: LaneLimits = LaneLimits { silence: LONG, idle: Duration::from_millis(100) };

#[tokio::test]
async fn a_lane_that_no_stream_needs_is_closed() {
    let mut scene = Scene::new(SOON).await;
    for times in 1..=2 {
        let data = Talk::new(&scene.data).await;
        scene.agent.seen.wait("lane data resumed", times).await;
        data.end().await;
        scene.agent.seen.wait("no stream needs the lane", times).await;
        scene.until_lanes(&[Lane::Main]).await;
    }
    Talk::new(&scene.kata).await.end().await;
    assert_eq!(scene.agent.seen.count("lane main "), 1, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.events.count("channel down"), 0, "{:?}", scene.events.all());
}

#[tokio::test]
async fn an_open_that_crosses_the_end_of_the_lane_is_served() {
    let scene = Scene::new(SOON).await;
    let opened = scene.agent.open_at_bye("UP".parse::<TunnelName>().unwrap());
    Talk::new(&scene.data).await.end().await;
    let mut stream = timeout(PATIENCE, opened).await.unwrap().unwrap().unwrap();
    // The connection that said bye is gone: the stream goes on over the next one.
    scene.agent.seen.wait("lane data resumed", 2).await;
    stream.sender.send("hello".into()).await.unwrap();
    let heard = timeout(PATIENCE, stream.receiver.recv()).await.unwrap();
    assert_eq!(heard, Some(Event::Data("hello".into())));
}
