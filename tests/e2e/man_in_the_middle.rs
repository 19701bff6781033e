//! A man in the middle who ends SSH towards both sides, or changes bytes. In the Attestation phase it can see and block,
//! and gains nothing permanent; in the Kubernetes phase it gains nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::raw::{Key, Offer, Packet, Raw, message};
use secure_comms_tests::attackers::tamper::{CHANGES, Change, Plan, Tamper};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, endpoint, kata_client, works};
use secure_comms_tests::simulators::kata::client::EchoSession;
use secure_comms_tests::simulators::kata::pattern::Mismatch;
use secure_comms_tests::simulators::kbs::KbsOptions;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// What the man in the middle does with each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// Ends SSH towards both sides and relays every packet.
    Sees,
    /// The same, but lets no stream data pass.
    Blocks,
    /// Claims falsely to be the agent in the Kubernetes phase for good.
    Lies,
    /// Relays bytes without decrypting them.
    Leaves,
}

/// A man in the middle between an adaptor and an agent.
struct Middle {
    address: SocketAddr,
    does: watch::Sender<Does>,
    /// Data that it has read from both sides.
    seen: Arc<Mutex<Vec<u8>>>,
    /// Logins in the Kubernetes phase that clients tried at it.
    offered: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Number of connections so far.
    victims: watch::Sender<u64>,
    serving: JoinHandle<()>,
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Middle {
    async fn before(agent: SocketAddr, does: Does) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let does = watch::Sender::new(does);
        let (seen, offered) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<Mutex<Vec<Vec<u8>>>>::default());
        let (does_what, sees, offers) = (does.subscribe(), seen.clone(), offered.clone());
        let (key, victims) = (Arc::new(Key::generate()?), watch::Sender::new(0));
        let counted = victims.clone();
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((victim, _)) = listener.accept().await {
                counted.send_modify(|victims| *victims += 1);
                let mut until = does_what.clone();
                let does = *until.borrow_and_update();
                let (seen, offered, key) = (sees.clone(), offers.clone(), key.clone());
                connections.spawn(async move {
                    // Ends when the connection does, or at once when the behaviour changes.
                    tokio::select! {
                        done = stand(does, victim, agent, &key, &seen, &offered) => drop(done),
                        _ = until.changed() => {}
                    }
                });
            }
        });
        Ok(Self { address, does, seen, offered, victims, serving })
    }

    fn does(&self, does: Does) {
        self.does.send_replace(does);
    }

    fn has_seen(&self, what: &[u8]) -> bool {
        self.seen.lock().unwrap().windows(what.len()).any(|window| window == what)
    }

    fn bytes_seen(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// Handles one connection.
async fn stand(
    does: Does,
    mut victim: TcpStream,
    agent: SocketAddr,
    key: &Key,
    seen: &Mutex<Vec<u8>>,
    offered: &Mutex<Vec<Vec<u8>>>,
) -> Result<()> {
    if does == Does::Leaves {
        let mut server = TcpStream::connect(agent).await?;
        copy_bidirectional(&mut victim, &mut server).await?;
        return Ok(());
    }
    let mut victim = Raw::server(victim)?;
    victim.secure(Offer::server(), key).await?;
    let request = victim.asked().await?;
    if !request.windows(11).any(|window| window == b"attestation") {
        // Not reached: the adaptor knows the pod's key.
        offered.lock().unwrap().push(request);
        victim.send(&Packet::new(message::USERAUTH_SUCCESS)).await?;
        return victim.ends().await;
    }
    if does == Does::Lies {
        let banner = "Secure Comms agent in the Kubernetes phase, latched\r\n";
        victim.send(&Packet::new(message::USERAUTH_BANNER).string(banner).string("")).await?;
        victim.send(&Packet::new(message::USERAUTH_FAILURE).string("").byte(0)).await?;
        return victim.ends().await;
    }
    let mut agent = match Raw::attestation(agent).await {
        Ok(agent) => agent,
        Err(_) => {
            victim.send(&Packet::new(message::USERAUTH_FAILURE).string("").byte(0)).await?;
            return victim.ends().await;
        }
    };
    agent.starts_over = true;
    victim.send(&Packet::new(message::USERAUTH_SUCCESS)).await?;
    victim
        .relay(agent, |_, payload| {
            seen.lock().unwrap().extend_from_slice(payload);
            // Control lines pass, so both sides see a working connection.
            let is_line = payload.len() > 9 && payload[9] == b'{';
            does == Does::Sees || payload[0] != message::CHANNEL_DATA || is_line
        })
        .await;
    Ok(())
}

async fn scene(https: bool) -> Result<Scene> {
    let kbs = KbsOptions { https, ..KbsOptions::default() };
    Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await
}

/// The private key's text, and each of its lines that two keys do not share.
fn secrets(pem: &str) -> Vec<Vec<u8>> {
    pem.lines()
        .filter(|line| line.len() > 40 && !line.starts_with("b3BlbnNzaC1rZXktdjEAAAAABG5vbmU"))
        .map(|line| line.as_bytes().to_vec())
        .collect()
}

/// The adaptor attests through the man in the middle, which sees all that can be seen; then it withdraws.
async fn attested_through(scene: &Scene, does: Does) -> Result<(Middle, Child, Child)> {
    let agent = scene.agent().await?;
    let middle = Middle::before(scene.ssh, does).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[middle.address])?)?;
    adaptor.wait_for_text("attestation: connected", PATIENCE).await?;
    Ok((middle, adaptor, agent))
}

#[tokio::test(flavor = "multi_thread")]
async fn over_https_a_man_in_the_middle_learns_no_key() -> Result<()> {
    let scene = scene(true).await?;
    let (middle, adaptor, agent) = attested_through(&scene, Does::Sees).await?;
    // The VM attests through it, and gets the real keys: no other server has the certificate.
    agent.wait_for_text("Kubernetes phase", PATIENCE).await?;
    adaptor.wait_for_text("is not this pod's", PATIENCE).await.with_context(|| adaptor.log())?;
    let pem = scene.pod_key().unwrap();
    let node = std::fs::read_to_string(scene.path("store").join("worker-node.key"))?;
    ensure!(middle.has_seen(scene.pod.as_bytes()), "it has seen nothing of the pod: this test is none");
    for secret in secrets(&pem).iter().chain(&secrets(&node)) {
        ensure!(!middle.has_seen(secret), "a private key has passed the one in the middle");
    }
    ensure!(!middle.has_seen(b"PRIVATE KEY") && !middle.has_seen(b"/keys"), "more than TLS has passed");
    ensure!(middle.offered.lock().unwrap().is_empty(), "the adaptor logged in to it");
    println!("over HTTPS it has seen {} bytes, the pod's id, and TLS", middle.bytes_seen());
    middle.does(Does::Leaves);
    works(&scene, &adaptor).await.with_context(|| adaptor.log())
}

/// Trustee encrypts the resource for the VM's TEE key (JWE), the simulator does not. So what passes in the clear here is
/// whatever the KBS hands out.
#[tokio::test(flavor = "multi_thread")]
async fn over_http_a_man_in_the_middle_gains_no_login() -> Result<()> {
    let scene = scene(false).await?;
    let (middle, adaptor, agent) = attested_through(&scene, Does::Sees).await?;
    agent.wait_for_text("Kubernetes phase", PATIENCE).await?;
    adaptor.wait_for_text("is not this pod's", PATIENCE).await.with_context(|| adaptor.log())?;
    ensure!(middle.has_seen(scene.keys().as_bytes()), "no request was seen");
    let node = std::fs::read_to_string(scene.path("store").join("worker-node.key"))?;
    for secret in secrets(&node) {
        ensure!(!middle.has_seen(&secret), "the worker node's private key has passed the one in the middle");
    }
    ensure!(middle.offered.lock().unwrap().is_empty(), "the adaptor logged in to it");
    println!("over HTTP it has seen {} bytes: requests and what they are answered with", middle.bytes_seen());
    middle.does(Does::Leaves);
    works(&scene, &adaptor).await.with_context(|| adaptor.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn blocking_the_kbs_only_delays_the_pod() -> Result<()> {
    let scene = scene(true).await?;
    let (middle, adaptor, agent) = attested_through(&scene, Does::Blocks).await?;
    agent.wait_for_text("getting the keys from the KBS through", PATIENCE).await?;
    middle.does(Does::Leaves);
    works(&scene, &adaptor).await.with_context(|| adaptor.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_false_claim_of_the_kubernetes_phase_has_no_lasting_effect() -> Result<()> {
    let scene = scene(true).await?;
    let agent = scene.agent().await?;
    let middle = Middle::before(scene.ssh, Does::Lies).await?;
    let mut adaptor = Child::spawn("adaptor", scene.adaptor_command(&[middle.address])?)?;
    let status = adaptor.wait_exit(PATIENCE).await?;
    ensure!(status.code() == Some(1), "{status}");
    for words in ["host key that is not this pod's", "refuses attestation", "lost", "make a new VM"] {
        ensure!(adaptor.log().contains(words), "no {words:?} in {}", adaptor.log());
    }
    ensure!(middle.offered.lock().unwrap().is_empty(), "the adaptor logged in to it");
    // The claim is false and has no lasting effect: the VM is unchanged.
    middle.does(Does::Leaves);
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[middle.address])?)?;
    works(&scene, &adaptor).await.with_context(|| agent.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_side_accepts_a_man_in_the_middle_in_the_kubernetes_phase() -> Result<()> {
    let scene = scene(true).await?;
    let agent = scene.agent().await?;
    let middle = Middle::before(scene.ssh, Does::Leaves).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[middle.address])?)?;
    works(&scene, &adaptor).await?;
    let connections = scene.kata.connections();
    for does in [Does::Sees, Does::Blocks] {
        middle.does(does);
        // Three connections: the adaptor has tried all addresses, and tries them again.
        let mut victims = middle.victims.subscribe();
        let more = *victims.borrow() + 3;
        timeout(PATIENCE, victims.wait_for(|victims| *victims >= more)).await??;
        // No waiting client is connected to it.
        let mut waiting = kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?;
        let given =
            timeout(Duration::from_millis(500), tokio::io::AsyncReadExt::read(&mut waiting, &mut [0; 1]))
                .await;
        ensure!(given.is_err(), "a client got something: {given:?}");
        ensure!(middle.offered.lock().unwrap().is_empty(), "the adaptor logged in to it");
        ensure!(middle.bytes_seen() == 0, "bytes of a tunnel have passed it");
        drop(waiting);
    }
    // It can't authenticate to the agent either.
    let mut raw = Raw::secured(scene.ssh, Offer::default()).await?;
    raw.ask_to_authenticate().await?;
    let own = Key::generate()?.login("kubernetes", raw.session());
    ensure!(!raw.authenticate(&own).await?, "a key of its own is let in");
    ensure!(scene.kata.connections() == connections, "the kata agent was reached");
    let mark = adaptor.mark();
    ensure!(adaptor.log().contains("is not this pod's"), "{}", adaptor.log());
    middle.does(Does::Leaves);
    adaptor.wait_from(mark, |line| line.contains("kubernetes phase up"), PATIENCE).await?;
    works(&scene, &adaptor).await.with_context(|| agent.log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_is_refused_in_another_session() -> Result<()> {
    let scene = scene(true).await?;
    let agent = scene.agent().await?;
    // As an agent that got a key before, it asks the real adaptor for a signature.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let fake = Child::spawn("adaptor", scene.adaptor_command(&[listener.local_addr()?])?)?;
    let mut victim = Raw::accept(&listener).await?;
    victim.secure(Offer::server(), &Key::generate()?).await?;
    victim.asked().await?;
    victim.send(&Packet::new(message::USERAUTH_FAILURE).string("publickey").byte(0)).await?;
    let mut login = victim.expect(&[message::USERAUTH_REQUEST]).await?;
    let probe = login.windows(9).any(|window| window == b"publickey") && login.len() < 150;
    if probe {
        // The adaptor asks first whether the key is acceptable.
        let node = secure_comms_tests::attackers::attacked_agent::key_in(
            scene.path("store").join("worker-node.key"),
        )?;
        victim
            .send(&Packet::new(message::USERAUTH_PK_OK).string("ssh-ed25519").string(node.public()))
            .await?;
        login = victim.expect(&[message::USERAUTH_REQUEST]).await?;
    }
    ensure!(login.len() > 150, "no signature: {}", login.escape_ascii());
    drop((victim, fake, listener));

    // The pod is up with its own adaptor, and the agent accepts the worker node's key.
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let as_kubernetes = {
        let at = login.windows(11).position(|window| window == b"attestation").unwrap();
        let mut other = login[..at - 4].to_vec();
        other.extend_from_slice(&10_u32.to_be_bytes());
        other.extend_from_slice(b"kubernetes");
        other.extend_from_slice(&login[at + 11..]);
        other
    };
    for relayed in [login, as_kubernetes] {
        let mut raw = Raw::secured(scene.ssh, Offer::default()).await?;
        raw.ask_to_authenticate().await?;
        ensure!(!raw.authenticate(&Packet::whole(relayed)).await?, "a relayed signature is let in");
    }
    // For comparison, the same key in the right session.
    let node =
        secure_comms_tests::attackers::attacked_agent::key_in(scene.path("store").join("worker-node.key"))?;
    let mut raw = Raw::secured(scene.ssh, Offer::default()).await?;
    raw.ask_to_authenticate().await?;
    let other = node.login("kubernetes", b"another session");
    ensure!(!raw.authenticate(&other).await?, "a signature for another session is let in");
    ensure!(raw.authenticate(&node.login("kubernetes", raw.session())).await?, "{}", agent.log());
    Ok(())
}

/// Endless requests, in connections that may break but must not deliver wrong bytes.
async fn echo_for_ever(kata: SocketAddr, seed: u64, done: watch::Sender<u64>) -> Result<()> {
    let mut number = seed;
    loop {
        let attempt = async {
            let mut session = EchoSession::open(kata_client(kata).await?).await?;
            loop {
                number += 1;
                session.roundtrip(3000 + number % 7000, number).await?;
                done.send_modify(|done| *done += 1);
            }
        };
        let broken: Result<()> = attempt.await;
        if let Err(error) = broken {
            let wrong = error.chain().any(|cause| cause.is::<Mismatch>());
            ensure!(!wrong, "a wrong byte: {error:?}");
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_bytes_end_the_connection_and_never_arrive() -> Result<()> {
    /// Number of changes; `TAMPER` in the environment overrides it.
    const ROUNDS: usize = 12;
    const SEED: u64 = 20_251;
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    let mut path = Tamper::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[path.address()])?)?;
    works(&scene, &adaptor).await?;
    let kata = endpoint(&adaptor, "KATAAGENT").await?;
    let (echoed, mut echoes) = (watch::Sender::new(0), JoinSet::new());
    for seed in 0..3 {
        echoes.spawn(echo_for_ever(kata, seed * 1_000_000, echoed.clone()));
    }
    let mut random = SEED;
    let mut next = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let mut ended = 0;
    let rounds = std::env::var("TAMPER").map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    for round in 0..rounds {
        let change = CHANGES[round % CHANGES.len()];
        // In the handshake of the next connection, or at a random place in the encrypted part.
        let in_handshake = next(3) == 0 && change != Change::Delay;
        let after = if in_handshake { next(2500) } else { next(200_000) };
        let plan = Plan { change, to_server: next(2) == 0, after: usize::try_from(after)? };
        let mark = adaptor.mark();
        path.change(plan);
        let more = *echoed.borrow() + 50;
        let words = || format!("seed {SEED}, round {round}: {plan:?}\n{}\n{}", adaptor.log(), agent.log());
        if change == Change::Delay {
            timeout(PATIENCE, echoed.subscribe().wait_for(|done| *done >= more))
                .await
                .with_context(words)??;
            path.leave();
            let down = adaptor.lines()[mark..].iter().any(|line| line.text.contains("channel down"));
            ensure!(!down, "{}", words());
            continue;
        }
        path.ended(PATIENCE).await.with_context(words)?;
        if in_handshake {
            path.ended(PATIENCE).await.with_context(words)?;
        }
        path.leave();
        ended += 1;
        timeout(PATIENCE, echoed.subscribe().wait_for(|done| *done >= more)).await.with_context(words)??;
        // An echo task that has ended has seen a wrong byte.
        if let Some(wrong) = echoes.try_join_next() {
            wrong??;
        }
    }
    let echoed = *echoed.borrow();
    println!("{ended} changed connections of {}; {echoed} echoes right, none wrong", path.connections());
    echoes.abort_all();
    works(&scene, &adaptor).await.with_context(|| agent.log())
}
