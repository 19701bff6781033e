//! A pod whose agent is under attack, and what must hold after each attack: the same process, small, that serves others.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::Control;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::attackers::raw::{Key, Offer, Packet, Raw, message};
use crate::attackers::stranger::{Answer, Stranger};
use crate::harness::process::Child;
use crate::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up};
use crate::simulators::kata::client::bulk_both_ways;

/// What the agent's memory must stay under, whatever strangers do, in KiB.
pub const RSS_MAX_KIB: u64 = 16 * 1024;

/// A VM whose agent is up.
#[derive(Debug)]
pub struct AttackedAgent {
    /// What is around it.
    pub scene: Scene,
    /// The agent under attack.
    pub agent: Child,
}

impl AttackedAgent {
    /// In the Attestation phase, where anybody may connect.
    ///
    /// # Errors
    /// It can't be set up.
    pub async fn attestation() -> Result<Self> {
        Self::start(Scene::new(SceneOptions::default()).await?).await
    }

    /// In the Kubernetes phase, by user data.
    ///
    /// # Errors
    /// It can't be set up.
    pub async fn kubernetes() -> Result<Self> {
        Self::kubernetes_with(json!({})).await
    }

    /// The same with more in the user data.
    ///
    /// # Errors
    /// It can't be set up.
    pub async fn kubernetes_with(more: Value) -> Result<Self> {
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.write_user_data().await?;
        let file = scene.path("apf.json");
        let mut user_data: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        for (key, value) in more.as_object().into_iter().flatten() {
            user_data.as_object_mut().context("user data")?.insert(key.clone(), value.clone());
        }
        std::fs::write(&file, user_data.to_string())?;
        Self::start(scene).await
    }

    /// Around this scene.
    ///
    /// # Errors
    /// The agent does not start.
    pub async fn start(scene: Scene) -> Result<Self> {
        // It tells why connections end that never authenticated, too.
        let mut command = scene.agent_command()?;
        command.env("SECURE_COMMS_LOG", "debug");
        let agent = Child::spawn("agent", command)?;
        agent.wait_for_text("inbound NODESERVICE listens on", PATIENCE).await?;
        Ok(Self { scene, agent })
    }

    /// The worker node's key.
    ///
    /// # Errors
    /// It has not been made.
    pub fn node_key(&self) -> Result<Key> {
        key_in(self.scene.path("store").join("worker-node.key"))
    }

    /// A connection of the worker node, whose every byte is ours.
    ///
    /// # Errors
    /// It is not let in.
    pub async fn node(&self) -> Result<Raw> {
        let mut raw = Raw::secured(self.scene.ssh, Offer::default()).await?;
        raw.ask_to_authenticate().await?;
        let login = self.node_key()?.login("kubernetes", raw.session());
        ensure!(raw.authenticate(&login).await?, "the worker node is refused");
        Ok(raw)
    }

    /// The agent is the process that it was, and small.
    ///
    /// # Errors
    /// It is not.
    pub fn holds(&self) -> Result<()> {
        // An error is a process that is gone.
        let peak = self.agent.peak_kib().with_context(|| self.agent.log())?;
        ensure!(peak < RSS_MAX_KIB, "the agent took {peak} KiB");
        Ok(())
    }

    /// It holds, and an honest attestation peer is let in and heard.
    ///
    /// # Errors
    /// It is not.
    pub async fn holds_and_attests(&self) -> Result<()> {
        self.holds()?;
        let mut peer = Stranger::attestation(self.scene.ssh, Answer::Refuses).await?;
        peer.open_control().await?;
        peer.hears(|message| matches!(message, Control::Hello(_))).await?;
        self.holds()
    }

    /// The real adaptor brings the pod up, and its tunnels carry; it is still up then.
    ///
    /// # Errors
    /// It does not.
    pub async fn comes_up(&self) -> Result<Child> {
        let adaptor = self.scene.adaptor()?;
        self.carries(&adaptor).await.with_context(|| format!("{}\n{}", self.agent.log(), adaptor.log()))?;
        self.holds()?;
        Ok(adaptor)
    }

    /// The adaptor is up, and its tunnels carry both ways.
    ///
    /// # Errors
    /// They do not.
    pub async fn carries(&self, adaptor: &Child) -> Result<()> {
        up(adaptor).await?;
        let kata = endpoint(adaptor, "KATAAGENT").await?;
        timeout(PATIENCE, bulk_both_ways(kata_client(kata).await?, 100_000, 1)).await??;
        timeout(PATIENCE, bulk_both_ways(client(self.scene.node_inbound).await?, 100_000, 2)).await??;
        Ok(())
    }
}

/// The private key in a file.
///
/// # Errors
/// There is none.
pub fn key_in(file: PathBuf) -> Result<Key> {
    Key::from_openssh(&std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?)
}

/// The connection is still served: a request that nobody knows is refused, and is so before anything that is sent later.
///
/// # Errors
/// It is not.
pub async fn answers(raw: &mut Raw) -> Result<()> {
    raw.send(&Packet::global("are-you-there@example.org")).await?;
    raw.expect(&[message::REQUEST_FAILURE]).await.map(drop)
}
