//! Sessions: the streams of a pod go on over the next connection, against a simulated agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use secure_comms_adaptor::Deadline;
use secure_comms_adaptor::pod::PodState;
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::{Event, Link, Receiver, Sender};
use support::agent::{Agent, Mode};
use support::{PATIENCE, World, addresses, kbs, pod};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
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

/// A conversation with the echo server behind a tunnel.
struct Talk {
    socket: TcpStream,
    said: u8,
}

impl Talk {
    async fn new(local: &str) -> Self {
        let mut talk = Self { socket: TcpStream::connect(local).await.unwrap(), said: 0 };
        talk.say().await;
        talk
    }

    /// Says something that was not said before, and hears it.
    async fn say(&mut self) {
        self.send().await;
        self.hear().await;
    }

    fn words(&self) -> Vec<u8> {
        (0..5000_u32).map(|n| (n % 251) as u8 ^ self.said).collect()
    }

    async fn send(&mut self) {
        self.said += 1;
        let words = self.words();
        self.socket.write_all(&words).await.unwrap();
    }

    async fn hear(&mut self) {
        let mut heard = vec![0; self.words().len()];
        timeout(PATIENCE, self.socket.read_exact(&mut heard)).await.unwrap().unwrap();
        assert!(heard == self.words(), "other bytes");
    }

    /// Ends it in good order, and hears nothing more.
    async fn end(mut self) {
        self.socket.shutdown().await.unwrap();
        let rest = timeout(PATIENCE, self.socket.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(rest.unwrap(), 0);
    }

    async fn ends_with_a_reset(mut self) {
        let end = timeout(PATIENCE, self.socket.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

/// A network whose connections can stand still. New ones are not affected.
#[derive(Clone)]
struct Network {
    address: SocketAddr,
    stands: Arc<Mutex<watch::Sender<bool>>>,
}

impl Network {
    fn before(agent: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let network = Self { address, stands: Arc::new(Mutex::new(watch::Sender::new(false))) };
        let (listener, own) = (TcpListener::from_std(listener).unwrap(), network.clone());
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let stands = own.stands.lock().unwrap().subscribe();
                tokio::spawn(carry(near, agent, stands));
            }
        });
        network
    }

    /// Stops the connections that exist; the returned value lets them go on.
    fn stop(&self) -> watch::Sender<bool> {
        let stopped = std::mem::replace(&mut *self.stands.lock().unwrap(), watch::Sender::new(false));
        stopped.send_replace(true);
        stopped
    }
}

async fn carry(near: TcpStream, to: SocketAddr, stands: watch::Receiver<bool>) {
    let far = TcpStream::connect(to).await.unwrap();
    let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = flow(from_near, to_far, stands.clone()) => {}
        () = flow(from_far, to_near, stands) => {}
    }
}

async fn flow(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut stands: watch::Receiver<bool>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        // An error: the connection can't be stopped any more.
        drop(stands.wait_for(|stands| !stands).await);
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
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
async fn each_lane_goes_on_by_itself() {
    let scene = Scene::new().await;
    let (mut kata, mut data) = (Talk::new(&scene.kata).await, Talk::new(&scene.data).await);
    scene.agent.seen.wait("lane data resumed", 1).await;
    scene.agent.cut_lane(Lane::Data);
    data.say().await;
    kata.say().await;
    scene.agent.seen.wait("lane data resumed", 2).await;
    assert_eq!(scene.world.events.count("channel down"), 0, "{:?}", scene.world.events.all());
    scene.agent.cut_lane(Lane::Main);
    kata.say().await;
    data.say().await;
    assert_eq!(scene.agent.seen.count("lane data resumed"), 2, "{:?}", scene.agent.seen.all());
    let lanes = scene.world.adaptor.snapshot(&pod()).unwrap().session.unwrap().lanes;
    assert_eq!(lanes.into_iter().collect::<Vec<_>>(), Lane::ALL);
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
async fn streams_of_a_lost_lane_go_on_over_the_main_one() {
    let scene = Scene::new().await;
    let mut data = Talk::new(&scene.data).await;
    scene.agent.seen.wait("lane data resumed", 1).await;
    let mut mode = scene.latched.clone();
    mode.lanes = &[Lane::Main];
    scene.agent.become_(mode);
    scene.agent.cut_lane(Lane::Data);
    data.say().await;
    assert_eq!(scene.agent.seen.count("lane data"), 1, "{:?}", scene.agent.seen.all());
    assert_eq!(scene.agent.seen.count("lane main"), 1, "{:?}", scene.agent.seen.all());
    data.end().await;
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
async fn a_pause_that_ends_soon_replaces_nothing() {
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
