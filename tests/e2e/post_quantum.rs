//! `-secure-comms-require-pq` and `--require-pq`: no session without ML-KEM, at whichever end it is missing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::raw::{Key, Offer, Raw};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, says, works};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

const ML_KEM: &[u8] = b"mlkem768x25519-sha256";
/// What the agent says of a client without it.
const AGENT_SAYS: &str = "the other end offers no post-quantum key exchange: -secure-comms-require-pq requires mlkem768x25519-sha256 here";
/// What the adaptor says of an agent without it.
const ADAPTOR_SAYS: &str =
    "the other end offers no post-quantum key exchange: --require-pq requires mlkem768x25519-sha256 here";

/// An agent that says why connections end, with the flag or without.
async fn agent(scene: &Scene, required: bool) -> Result<Child> {
    let mut command = scene.agent_command()?;
    command.env("SECURE_COMMS_LOG", "debug").args(["-secure-comms-rekey-bytes", "1MiB"]);
    if required {
        command.arg("-secure-comms-require-pq");
    }
    let agent = Child::spawn("agent", command)?;
    says(&agent, "inbound NODESERVICE listens on").await?;
    Ok(agent)
}

fn adaptor(scene: &Scene, address: SocketAddr, required: bool) -> Result<Child> {
    let mut command = scene.adaptor_command(&[address])?;
    command.args(["--rekey-bytes", "1MiB"]);
    if required {
        // Where all pods of a node are configured.
        command.env("SECURE_COMMS_REQUIRE_PQ", "true");
    }
    Child::spawn("adaptor", command)
}

/// A man in the middle who takes ML-KEM out of the lists that pass in the clear, from one side or from both.
struct Stripper {
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Stripper {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Stripper {
    async fn before(agent: SocketAddr, from_client: bool, from_agent: bool) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let serving = tokio::spawn(async move {
            let mut pumps = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(agent).await else { continue };
                let ((read_client, write_client), (read_agent, write_agent)) =
                    (client.into_split(), server.into_split());
                pumps.spawn(pump(read_client, write_agent, from_client));
                pumps.spawn(pump(read_agent, write_client, from_agent));
            }
        });
        Ok(Self { address, serving })
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, strips: bool) {
    // Larger than the identification line and the first packet together, which each end writes at once or in two.
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let data = &mut buffer[..length];
        if strips {
            let found: Vec<_> =
                data.windows(ML_KEM.len()).enumerate().filter(|(_, at)| *at == ML_KEM).collect();
            let places: Vec<usize> = found.into_iter().map(|(at, _)| at).collect();
            // Of the same length, so that the packet stays one.
            places.into_iter().for_each(|at| data[at] = b'x');
        }
        if to.write_all(data).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ends_that_require_it_work_and_renew_their_keys() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let agent = agent(&scene, true).await?;
    let adaptor = adaptor(&scene, scene.ssh, true)?;
    // Both phases, and more data than the session keys last for.
    works(&scene, &adaptor).await?;
    ensure!(!agent.log().contains(AGENT_SAYS) && !adaptor.log().contains(ADAPTOR_SAYS));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_requires_it_works_with_one_that_has_it() -> Result<()> {
    for (by_agent, by_adaptor) in [(true, false), (false, true)] {
        let scene = Scene::new(SceneOptions::default()).await?;
        let _agent = agent(&scene, by_agent).await?;
        works(&scene, &adaptor(&scene, scene.ssh, by_adaptor)?).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_refuses_a_client_without_it_in_both_phases() -> Result<()> {
    for user_data in [false, true] {
        let scene = Scene::new(SceneOptions { user_data, ..SceneOptions::default() }).await?;
        if user_data {
            scene.write_user_data().await?;
        }
        let agent = agent(&scene, true).await?;
        for kex in [
            "curve25519-sha256,kex-strict-c-v00@openssh.com",
            "curve25519-sha256@libssh.org,sntrup761x25519-sha512@openssh.com,kex-strict-c-v00@openssh.com",
            "mlkem768x25519-sha256x,xmlkem768x25519-sha256,mlkem768,kex-strict-c-v00@openssh.com",
            "kex-strict-c-v00@openssh.com",
        ] {
            let mark = agent.log().lines().count();
            ensure!(Raw::secured(scene.ssh, Offer { kex, ..Offer::default() }).await.is_err(), "{kex}");
            agent.wait_from(mark, |line| line.contains(AGENT_SAYS), PATIENCE).await?;
        }
        // The client hears what it lacks: the agent's list has nothing else.
        let user = if user_data { "kubernetes" } else { "attestation" };
        for options in
            [&["-o", "KexAlgorithms=curve25519-sha256"][..], &["-o", "KexAlgorithms=sntrup761x25519-sha512"]]
        {
            let mut command = OpenSsh::new(scene.ssh)?.command(user, options, &[]);
            command.stdin(Stdio::null()).kill_on_drop(true);
            let output = timeout(PATIENCE, command.output()).await.context("ssh hangs")??;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                !output.status.success() && said.contains("no matching key exchange method found"),
                "{said}"
            );
            ensure!(said.contains("Their offer: mlkem768x25519-sha256,"), "{said}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_adaptor_refuses_an_agent_without_it() -> Result<()> {
    for user_data in [false, true] {
        let scene = Scene::new(SceneOptions { user_data, ..SceneOptions::default() }).await?;
        if user_data {
            scene.write_user_data().await?;
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let adaptor = adaptor(&scene, listener.local_addr()?, true)?;
        let mut impostor = timeout(PATIENCE, Raw::accept(&listener)).await.context("no client")??;
        ensure!(impostor.secure(Offer::server(), &Key::generate()?).await.is_err(), "it made a session");
        says(&adaptor, ADAPTOR_SAYS).await?;
        says(&adaptor, "it offers curve25519-sha256; update it").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_man_in_the_middle_who_strips_it_gets_no_session() -> Result<()> {
    for (from_client, from_agent) in [(true, false), (false, true), (true, true)] {
        let scene = Scene::new(SceneOptions::default()).await?;
        let agent = agent(&scene, true).await?;
        let stripper = Stripper::before(scene.ssh, from_client, from_agent).await?;
        let adaptor = adaptor(&scene, stripper.address, true)?;
        if from_client {
            says(&agent, AGENT_SAYS).await?;
        }
        if from_agent {
            says(&adaptor, ADAPTOR_SAYS).await?;
        }
        ensure!(!agent.log().contains("authenticated for"), "{}", agent.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_strips_it_where_it_is_not_required_breaks_the_exchange() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let agent = agent(&scene, false).await?;
    let stripper = Stripper::before(scene.ssh, true, true).await?;
    let adaptor = adaptor(&scene, stripper.address, false)?;
    // Both lists are part of what the host key signs.
    says(&adaptor, "SSH handshake: ").await?;
    ensure!(!agent.log().contains("authenticated for"), "{}", agent.log());
    Ok(())
}
