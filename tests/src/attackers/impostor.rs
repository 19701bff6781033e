//! A server in the place of the agent, which the real adaptor connects to; then the real agent takes over.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::attackers::raw::Raw;
use crate::harness::process::Child;
use crate::harness::scene::{Scene, endpoint};

/// Limit of the adaptor's memory, in KiB.
pub const RSS_MAX_KIB: u64 = 64 * 1024;

/// A scene whose adaptor connects to the impostor.
#[derive(Debug)]
pub struct Impostor {
    /// The scene around the adaptor.
    pub scene: Scene,
    /// The adaptor under attack.
    pub adaptor: Child,
    listener: TcpListener,
    clients: JoinHandle<usize>,
}

impl Impostor {
    /// Starts an adaptor with this many addresses of the impostor.
    ///
    /// # Errors
    /// If it can't be set up.
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
        // A client waits for the pod all the time; no byte of it may reach an impostor.
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

    /// Accepts the next connection of the adaptor.
    ///
    /// # Errors
    /// If it does not come: the adaptor hangs, or has ended.
    pub async fn next(&self) -> Result<Raw> {
        Raw::accept(&self.listener).await.with_context(|| self.adaptor.log())
    }

    /// The private key of the pod, which an impostor can't have.
    ///
    /// # Errors
    /// If the adaptor has made none.
    pub fn pod_key(&self) -> Result<crate::attackers::raw::Key> {
        crate::attackers::raw::Key::from_openssh(&self.scene.pod_key().context("the pod has no key")?)
    }

    /// Checks that the adaptor is the same process, small, and has not panicked.
    ///
    /// # Errors
    /// If it is not.
    pub fn holds(&self) -> Result<()> {
        // Reading the peak fails if the process has ended.
        let peak = self.adaptor.peak_kib().with_context(|| self.adaptor.log())?;
        ensure!(peak < RSS_MAX_KIB, "the adaptor took {peak} KiB");
        ensure!(!self.adaptor.log().contains("panicked"), "{}", self.adaptor.log());
        Ok(())
    }

    /// Checks that the adaptor holds, and that the pod comes up once the real agent is there.
    ///
    /// # Errors
    /// If it does not.
    pub async fn gives_way(self) -> Result<()> {
        self.holds()?;
        self.clients.abort();
        ensure!(!self.adaptor.log().contains("kubernetes phase up"), "{}", self.adaptor.log());
        let agent = self.scene.agent().await?;
        let (address, listener) = (self.scene.ssh, self.listener);
        let relays = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // Any end of the connection is fine.
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
