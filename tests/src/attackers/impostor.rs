//! One that plays the agent to the real adaptor, a connection at a time, each as the test wants it; then the real agent.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::attackers::raw::Raw;
use crate::harness::process::Child;
use crate::harness::scene::{Scene, endpoint};

/// What the adaptor's memory must stay under, in KiB.
pub const RSS_MAX_KIB: u64 = 64 * 1024;

/// An adaptor that takes the impostor for its pod's VM.
#[derive(Debug)]
pub struct Impostor {
    /// What is around it.
    pub scene: Scene,
    /// The adaptor under attack.
    pub adaptor: Child,
    listener: TcpListener,
    clients: JoinHandle<usize>,
}

impl Impostor {
    /// Starts an adaptor that tries it at so many addresses, one after the other.
    ///
    /// # Errors
    /// It can't be set up.
    pub async fn new(addresses: u8) -> Result<Self> {
        let mut scene = Scene::new(crate::harness::scene::SceneOptions::default()).await?;
        scene.deadline = 250;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        let port = listener.local_addr()?.port();
        let addresses: Vec<SocketAddr> =
            (1..=addresses).map(|last| (Ipv4Addr::new(127, 0, 0, last), port).into()).collect();
        let mut command = scene.adaptor_command(&addresses)?;
        command.env("SECURE_COMMS_LOG", "debug");
        let adaptor = Child::spawn("adaptor", command)?;
        let kata = endpoint(&adaptor, "KATAAGENT").await?;
        // Somebody always waits for the pod, and must never be handed to an impostor.
        let clients = tokio::spawn(async move {
            let mut bytes = 0;
            while let Ok(mut client) = TcpStream::connect(kata).await {
                let mut buffer = [0; 1024];
                while let Ok(read @ 1..) = tokio::io::AsyncReadExt::read(&mut client, &mut buffer).await {
                    bytes += read;
                }
            }
            bytes
        });
        Ok(Self { scene, adaptor, listener, clients })
    }

    /// The next connection of the adaptor.
    ///
    /// # Errors
    /// It does not come: the adaptor hangs, or has ended.
    pub async fn next(&self) -> Result<Raw> {
        Raw::accept(&self.listener).await.with_context(|| self.adaptor.log())
    }

    /// The private key of the pod, which in real life only its VM and its worker node have.
    ///
    /// # Errors
    /// It is not published.
    pub fn pod_key(&self) -> Result<crate::attackers::raw::Key> {
        let path = format!("default/pp-{}/privateKey", self.scene.pod);
        let pem = self.scene.kbs.resource(&path).context("the pod has no key")?;
        crate::attackers::raw::Key::from_openssh(&String::from_utf8(pem)?)
    }

    /// The adaptor is the process that it was, small, and has not panicked.
    ///
    /// # Errors
    /// It is not.
    pub fn holds(&self) -> Result<()> {
        // An error is a process that is gone.
        let peak = self.adaptor.peak_kib().with_context(|| self.adaptor.log())?;
        ensure!(peak < RSS_MAX_KIB, "the adaptor took {peak} KiB");
        ensure!(!self.adaptor.log().contains("panicked"), "{}", self.adaptor.log());
        Ok(())
    }

    /// It holds, and once the real agent is there the pod comes up.
    ///
    /// # Errors
    /// It does not.
    pub async fn gives_way(self) -> Result<()> {
        self.holds()?;
        self.clients.abort();
        ensure!(!self.adaptor.log().contains("kubernetes phase up"), "{}", self.adaptor.log());
        let agent = self.scene.agent().await?;
        let (address, listener) = (self.scene.ssh, self.listener);
        let relays = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // However it ends.
                    if let Ok(mut server) = TcpStream::connect(address).await {
                        drop(copy_bidirectional(&mut client, &mut server).await);
                    }
                });
            }
        });
        crate::harness::scene::up(&self.adaptor).await.with_context(|| agent.log())?;
        relays.abort();
        ensure!(!self.adaptor.log().contains("panicked"), "{}", self.adaptor.log());
        Ok(())
    }
}
