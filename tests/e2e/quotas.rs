//! The clients of one tunnel can't take what the others need: thousands of them stay connected, and the runtime still reaches
//! the kata agent.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use secure_comms_protocol::limits::{CreditLimits, INBOUND_CLIENTS_MAX};
use secure_comms_tests::attackers::raw::{Key, Packet, Raw, message};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up, works,
};
use secure_comms_tests::simulators::kata::client::EchoSession;
use secure_comms_tests::simulators::kata::framed::Framed;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

struct Pod {
    scene: Scene,
    agent: Child,
    adaptor: Child,
}

impl Pod {
    async fn up() -> Result<Self> {
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.write_user_data().await?;
        let (agent, adaptor) = (scene.agent().await?, scene.adaptor()?);
        up(&adaptor).await?;
        let pod = Self { scene, agent, adaptor };
        works(&pod.scene, &pod.adaptor).await?;
        Ok(pod)
    }

    /// A new client of the kata agent that has been answered.
    async fn kata(&self) -> Result<EchoSession<Framed<TcpStream>>> {
        let answered = async {
            let stream = kata_client(endpoint(&self.adaptor, "KATAAGENT").await?).await?;
            let mut session = EchoSession::open(stream).await?;
            session.roundtrip(200, 1).await?;
            anyhow::Ok(session)
        };
        let logs = || format!("{}\n{}", self.agent.log(), self.adaptor.log());
        timeout(PATIENCE, answered).await.with_context(logs)?.with_context(logs)
    }

    /// A new client of another inbound, which has been answered.
    async fn echo(&self, address: SocketAddr) -> Result<EchoSession<TcpStream>> {
        let answered = async {
            let mut session = EchoSession::open(client(address).await?).await?;
            session.roundtrip(200, 1).await?;
            anyhow::Ok(session)
        };
        timeout(PATIENCE, answered).await.context("no answer")?
    }

    async fn inbound(&self, name: &str) -> Result<SocketAddr> {
        endpoint(&self.adaptor, name).await
    }
}

/// Clients of an inbound that come at the same time, and stay.
struct Crowd {
    served: watch::Sender<usize>,
    /// Why clients were closed.
    closed: Arc<Mutex<Vec<String>>>,
    clients: JoinSet<()>,
}

impl Crowd {
    fn of(number: usize, inbound: SocketAddr) -> Self {
        let (served, closed) = (watch::Sender::new(0), Arc::default());
        let mut clients = JoinSet::new();
        for seed in 0..number {
            let (served, closed) = (served.clone(), Arc::<Mutex<Vec<_>>>::clone(&closed));
            clients.spawn(async move {
                // One that waits in the kernel's queue need not be connected yet.
                if let Err(error) = stay(inbound, seed as u64, &served).await {
                    closed.lock().unwrap().push(format!("{error:#}"));
                }
            });
        }
        Self { served, closed, clients }
    }

    fn served(&self) -> usize {
        *self.served.borrow()
    }

    async fn is_served(&self, number: usize) -> Result<()> {
        let mut served = self.served.subscribe();
        let waits = served.wait_for(|served| *served >= number);
        let reached = timeout(PATIENCE, waits).await.map(|reached| drop(reached.unwrap()));
        reached.with_context(|| format!("{} of {number} are served", self.served()))
    }

    /// Waits until no more of them are served, though the machine has done much else since.
    async fn is_full(&self, pod: &Pod) -> Result<()> {
        self.is_served(FULL).await?;
        let mut session =
            EchoSession::open(client(pod.scene.vm_service.addr().context("TCP")?).await?).await?;
        let mut before = 0;
        while before != self.served() {
            before = self.served();
            for seed in 0..3000 {
                session.roundtrip(200, seed).await?;
            }
        }
        Ok(())
    }

    fn none_closed(&self, end: &Child) -> Result<()> {
        let closed = self.closed.lock().unwrap();
        ensure!(closed.is_empty(), "{closed:?}\n{}", end.log());
        Ok(())
    }

    async fn leaves(mut self) {
        self.clients.shutdown().await;
    }
}

async fn stay(inbound: SocketAddr, seed: u64, served: &watch::Sender<usize>) -> Result<()> {
    let mut session = EchoSession::open(client(inbound).await?).await?;
    session.roundtrip(20, seed).await?;
    served.send_modify(|served| *served += 1);
    session.until_end().await?;
    bail!("closed")
}

/// Clients that an inbound serves at a time.
const FULL: usize = INBOUND_CLIENTS_MAX;

async fn a_crowd_of_the_vm_keeps_no_other_tunnel_out(number: usize) -> Result<()> {
    let pod = Pod::up().await?;
    let crowd = Crowd::of(number, pod.scene.node_inbound);
    crowd.is_full(&pod).await?;
    // As many as are reserved, so that the last of them would find no place without the reserve.
    let mut katas = Vec::new();
    for _ in 0..CreditLimits::KUBERNETES.reserved {
        katas.push(pod.kata().await?);
    }
    pod.echo(pod.inbound("VMSERVICE").await?).await.context("another tunnel")?.finish().await?;
    for kata in &mut katas {
        kata.roundtrip(200, 2).await?;
    }
    ensure!(crowd.served() == FULL, "{} are served at a time", crowd.served());
    crowd.none_closed(&pod.agent)?;
    crowd.leaves().await;
    pod.kata().await?.finish().await?;
    works(&pod.scene, &pod.adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_have_ended_leave_their_places() -> Result<()> {
    let pod = Pod::up().await?;
    for inbound in [pod.inbound("VMSERVICE").await?, pod.scene.node_inbound] {
        // One more than the tunnel has places, one after the other.
        for number in 0..=CreditLimits::KUBERNETES.tunnel_streams() {
            let stream = pod.echo(inbound).await.with_context(|| format!("stream {number}"))?;
            timeout(PATIENCE, stream.finish()).await.with_context(|| format!("stream {number} hangs"))??;
        }
    }
    pod.kata().await?.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_vm_inbound_leave_room_for_the_runtime() -> Result<()> {
    a_crowd_of_the_vm_keeps_no_other_tunnel_out(1100).await
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_clients_of_a_vm_inbound_do_too() -> Result<()> {
    a_crowd_of_the_vm_keeps_no_other_tunnel_out(3000).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_the_worker_node_leave_room_for_all_others() -> Result<()> {
    let pod = Pod::up().await?;
    let crowd = Crowd::of(1100, pod.inbound("VMSERVICE").await?);
    crowd.is_full(&pod).await?;
    let mut others = Vec::new();
    for _ in 0..64 {
        others.push((pod.kata().await?, pod.echo(pod.scene.node_inbound).await.context("from the VM")?));
    }
    ensure!(crowd.served() == FULL, "{} are served at a time", crowd.served());
    crowd.none_closed(&pod.adaptor)?;
    crowd.leaves().await;
    works(&pod.scene, &pod.adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn crowds_at_both_ends_leave_room_for_the_runtime() -> Result<()> {
    let pod = Pod::up().await?;
    let in_vm = Crowd::of(1100, pod.scene.node_inbound);
    in_vm.is_full(&pod).await?;
    // The rest, without the reserve: those beyond it wait for a place.
    let at_node = Crowd::of(1100, pod.inbound("VMSERVICE").await?);
    at_node.is_served(64).await?;
    let mut katas = Vec::new();
    for _ in 0..CreditLimits::KUBERNETES.reserved {
        katas.push(pod.kata().await?);
    }
    in_vm.leaves().await;
    at_node.leaves().await;
    works(&pod.scene, &pod.adaptor).await
}

/// Opens a stream from the agent's side; whether the adaptor confirms it.
async fn opens(raw: &mut Raw, name: &str, number: u32) -> Result<bool> {
    let open = Packet::open("forwarded-tcpip", number).string(name).uint(1).string("127.0.0.1");
    raw.send(&open.uint(2 * number)).await?;
    let answers = [message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE];
    Ok(raw.expect(&answers).await?[0] == message::CHANNEL_OPEN_CONFIRMATION)
}

/// Plays an agent that counts no streams.
async fn agent_with_two_tunnels(listener: &TcpListener, key: &Key) -> Result<Raw> {
    let mut raw = Raw::accept(listener).await?;
    raw.welcome(key).await?;
    let control = raw.grant_control(0, 2).await?;
    let hello = r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"x"}}"#;
    raw.send(&Packet::data(control, format!("{hello}\n"))).await?;
    Ok(raw)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_fills_one_outbound_gets_streams_of_the_others() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut command = scene.adaptor_command(&[listener.local_addr()?])?;
    let service = scene.node_service.addr().context("TCP")?;
    command.arg("--outbounds").arg(format!("BOTH_PHASES:OTHER:{service}"));
    let adaptor = Child::spawn("adaptor", command)?;
    let key = Key::generate()?;
    for _ in 0..50 {
        // The adaptor closes the losers of a race, and those that it tries as `kubernetes`.
        let Ok(mut raw) = agent_with_two_tunnels(&listener, &key).await else { continue };
        let mut confirmed = 0;
        for number in 1..=40 {
            confirmed += usize::from(opens(&mut raw, "OTHER", number).await?);
        }
        ensure!(confirmed == CreditLimits::ATTESTATION.tunnel_streams(), "{confirmed} streams of one tunnel");
        ensure!(opens(&mut raw, "KBS", 41).await?, "the KBS gets none\n{}", adaptor.log());
        return Ok(());
    }
    bail!("the adaptor opens no control channel\n{}", adaptor.log())
}
