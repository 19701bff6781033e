//! Sessions: the streams of a pod go on over the next connection, against a simulated agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use secure_comms_adaptor::Deadline;
use secure_comms_adaptor::pod::PodState;
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::{Event, Link, Receiver, Sender};
use support::agent::{Agent, Mode};
use support::talk::{Network, Talk};
use support::{PATIENCE, World, addresses, kbs, pod};
use tokio::time::timeout;

/// A pod that is up, with clients of both lanes.
struct Scene {
    world: World,
    agent: Agent,
    latched: Mode,
    kata: String,
    data: String,
}

impl Scene {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Mode)) -> Self {
        Self::at(change, |agent| agent.address).await
    }

    /// With an agent that is reached at another address than its own.
    async fn at(change: impl FnOnce(&mut Mode), address: impl FnOnce(&Agent) -> SocketAddr) -> Self {
        let inbounds = "KUBERNETES_PHASE:KATAAGENT:0,KUBERNETES_PHASE:DATA:0";
        let world = World::custom(kbs().await.0, inbounds).await;
        let endpoints = world
            .adaptor
            .prepare(&pod(), secure_comms_adaptor::PodSpec::default(), Deadline::after(PATIENCE))
            .await
            .unwrap();
        let local = |name: &str| {
            endpoints.iter().find(|endpoint| endpoint.name.as_str() == name).unwrap().local.clone()
        };
        let mut latched = Mode::kubernetes(world.pod_key().await, world.node_key().await);
        change(&mut latched);
        let agent = Agent::start(latched.clone()).await;
        let at = addresses(&[address(&agent)]);
        world.adaptor.start(&pod(), &at, Deadline::after(PATIENCE)).await.unwrap();
        Self { kata: local("KATAAGENT"), data: local("DATA"), world, agent, latched }
    }

    async fn happened(&self, what: &str, times: usize) {
        self.world.events.wait(what, times).await;
    }
}

#[tokio::test]
async fn a_stream_goes_on_after_a_reset() {
    let scene = Scene::new().await;
    let (mut kata, mut data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    for cut in 1..4 {
        kata.send().await;
        scene.agent.cut();
        scene.happened("channel down: ", cut).await;
        scene.happened("; 2 streams wait", cut).await;
        kata.hear().await;
        data.say().await;
        scene.happened("; 2 streams go on", cut).await;
    }
    let snapshot = scene.world.adaptor.snapshot(&pod()).unwrap();
    assert!(matches!(snapshot.state, PodState::Up { .. }), "{snapshot:?}");
    assert_eq!(snapshot.session.unwrap().resumed, 3);
    kata.end().await;
    data.end().await;
    assert_eq!(scene.agent.seen.count("lane main new"), 1, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.world.events.count("reset"), 0, "{:?}", scene.world.events.all());
}

#[tokio::test]
async fn a_stream_of_the_agent_goes_on() {
    let echo = support::echo().await;
    let world = World::new(&format!("KUBERNETES_PHASE:UP:{echo}")).await;
    world.prepare().await;
    let latched = Mode::kubernetes(world.pod_key().await, world.node_key().await);
    let agent = Agent::start(latched).await;
    let at = addresses(&[agent.address]);
    world.adaptor.start(&pod(), &at, Deadline::after(PATIENCE)).await.unwrap();
    let name: TunnelName = "UP".parse().unwrap();
    let mut stream = timeout(PATIENCE, agent.session().link().open(&name)).await.unwrap().unwrap();
    for (cut, said) in ["one", "two", "three"].into_iter().enumerate() {
        stream.sender.send(said.into()).await.unwrap();
        agent.cut();
        let mut heard = Vec::new();
        while heard.len() < said.len() {
            match timeout(PATIENCE, stream.receiver.recv()).await.unwrap() {
                Some(Event::Data(data)) => heard.extend_from_slice(&data),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(heard, said.as_bytes());
        world.events.wait("; 1 stream goes on", cut + 1).await;
    }
}

#[tokio::test]
async fn a_session_that_the_agent_lost_is_reset_with_the_reason() {
    let scene = Scene::new().await;
    let (kata, data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    scene.agent.restart();
    scene.happened("session over: the agent does not have it any more", 1).await;
    scene
        .happened("; 2 streams are reset, and with the runtime's connection the runtime ends the pod", 1)
        .await;
    kata.ends_with_a_reset().await;
    data.ends_with_a_reset().await;
    scene.happened("kubernetes phase up", 2).await;
    // The next session serves new clients.
    Talk::new(&scene.kata).await.end().await;
    assert_eq!(scene.agent.seen.count("lane main new"), 2, "{:?}", scene.agent.seen.all());
}

#[tokio::test]
async fn a_client_that_waits_during_a_cut_is_served_after_it() {
    let scene = Scene::new().await;
    let mut mode = scene.latched.clone();
    mode.hangs_up = true;
    scene.agent.become_(mode);
    scene.agent.cut();
    scene.happened("channel down: ", 1).await;
    let (kata, data) = (scene.kata.clone(), scene.data.clone());
    let kata = tokio::spawn(async move { Talk::new(&kata).await });
    let data = tokio::spawn(async move { Talk::new(&data).await });
    scene.agent.seen.wait("auth kubernetes", 3).await;
    assert!(!kata.is_finished() && !data.is_finished());
    scene.agent.become_(scene.latched.clone());
    kata.await.unwrap().end().await;
    data.await.unwrap().end().await;
    assert_eq!(scene.agent.seen.count("lane main new"), 1, "{:?}", scene.agent.seen.all());
}

#[tokio::test]
async fn a_session_waits_for_an_agent_that_attests() {
    let scene = Scene::new().await;
    let mut kata = Talk::new(&scene.kata).await;
    // A stranger at the address of the agent, for a while.
    scene.agent.become_(Mode::attestation());
    scene.agent.cut();
    scene.happened("attestation: connected to", 1).await;
    scene.agent.upgrade(scene.latched.clone());
    scene.happened("; 1 stream goes on", 1).await;
    kata.say().await;
    assert_eq!(scene.agent.seen.count("lane main new"), 1, "{:?}", scene.agent.seen.all());
}

#[tokio::test]
async fn an_agent_of_version_1_has_no_session() {
    let scene = Scene::with(|mode| mode.version = 1).await;
    let (kata, data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    assert_eq!(scene.world.adaptor.snapshot(&pod()).unwrap().session, None);
    scene.agent.cut();
    scene.happened("channel down: ", 1).await;
    scene.happened("; 2 streams are reset by the reconnect", 1).await;
    kata.ends_with_a_reset().await;
    data.ends_with_a_reset().await;
    scene.happened("kubernetes phase up", 2).await;
    Talk::new(&scene.data).await.end().await;
    assert_eq!(scene.agent.seen.count("lane "), 0, "{:?}", scene.agent.seen.all());
}

#[tokio::test]
async fn streams_without_their_lane_use_the_main_one() {
    let scene = Scene::with(|mode| mode.lanes = &[Lane::Main]).await;
    // A new stream waits for the lane for a second.
    let mut data = Talk::new(&scene.data).await;
    assert_eq!(scene.agent.seen.count("lane data"), 0, "{:?}", scene.agent.seen.all());
    scene.agent.cut();
    data.say().await;
    data.end().await;
    assert_eq!(scene.world.events.count("reset"), 0, "{:?}", scene.world.events.all());
}

#[tokio::test]
async fn a_stale_connection_that_comes_back_does_no_harm() {
    let network = Arc::new(Mutex::new(None));
    let made = network.clone();
    let scene = Scene::at(
        |_| {},
        move |agent| {
            let network = Network::before(agent.address);
            let address = network.address;
            *made.lock().unwrap() = Some(network);
            address
        },
    )
    .await;
    let network = network.lock().unwrap().clone().unwrap();
    let (mut kata, mut data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    let stopped = network.stop();
    kata.send().await;
    data.send().await;
    // The new connections go on where the old ones stand still.
    kata.hear().await;
    data.hear().await;
    scene.happened("failed over to", 1).await;
    stopped.send_replace(false);
    for _ in 0..10 {
        kata.say().await;
        data.say().await;
    }
    kata.end().await;
    data.end().await;
    assert_eq!(scene.agent.seen.count("lane main new"), 1, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.world.events.count("reset"), 0, "{:?}", scene.world.events.all());
}

#[tokio::test]
async fn a_stop_ends_the_session() {
    let scene = Scene::new().await;
    let data = Talk::new(&scene.data).await;
    scene.agent.seen.wait("lane data resumed", 1).await;
    let session = scene.agent.session();
    scene.world.adaptor.stop(&pod()).await.unwrap();
    assert_eq!(timeout(PATIENCE, session.ended()).await.unwrap(), "the pod is being deleted");
    data.ends_with_a_reset().await;
}

#[tokio::test]
async fn a_second_adaptor_ends_the_session_of_the_first() {
    let scene = Scene::new().await;
    let kata = Talk::new(&scene.kata).await;
    scene.agent.end_session("another worker node is here");
    scene
        .happened("channel down: the agent said bye: another worker node is here; the session is over; 1 stream is reset", 1)
        .await;
    kata.ends_with_a_reset().await;
    scene.happened("kubernetes phase up", 2).await;
    assert_eq!(scene.agent.seen.count("lane main new"), 2, "{:?}", scene.agent.seen.all());
}
