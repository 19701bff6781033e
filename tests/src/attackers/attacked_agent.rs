//! A scene whose agent is under attack. After each attack the agent is the same process, small, and serves others.

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

/// Limit of the agent's memory under any attack, in KiB.
pub const RSS_MAX_KIB: u64 = 16 * 1024;

/// A scene with a running agent.
#[derive(Debug)]
pub struct AttackedAgent {
    /// The scene around the agent.
    pub scene: Scene,
    /// The agent under attack.
    pub agent: Child,
}

impl AttackedAgent {
    /// An agent in the Attestation phase, where anyone may connect.
    ///
    /// # Errors
    /// If it can't be set up.
    pub async fn attestation() -> Result<Self> {
        Self::start(Scene::new(SceneOptions::default()).await?).await
    }

    /// An agent in the Kubernetes phase, with keys from the user data.
    ///
    /// # Errors
    /// If it can't be set up.
    pub async fn kubernetes() -> Result<Self> {
        Self::kubernetes_with(json!({})).await
    }

    /// As [`AttackedAgent::kubernetes`], with additional user data.
    ///
    /// # Errors
    /// If it can't be set up.
    pub async fn kubernetes_with(more: Value) -> Result<Self> {
        let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.write_user_data().await?;
        let file = scene.path("apf.json");
        let mut user_data: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        for (key, value) in more.as_object().into_iter().flatten() {
            user_data.as_object_mut().context("user data")?.insert(key.clone(), value.clone());
            if let ("sc-outbounds", Some(tags)) = (key.as_str(), value.as_str()) {
                scene.agent_outbounds += &format!(",{tags}");
            }
        }
        std::fs::write(&file, user_data.to_string())?;
        Self::start(scene).await
    }

    /// Starts the agent of a scene.
    ///
    /// # Errors
    /// If the agent does not start.
    pub async fn start(scene: Scene) -> Result<Self> {
        let agent = scene.debugged_agent().await?;
        Ok(Self { scene, agent })
    }

    /// The worker node's key.
    ///
    /// # Errors
    /// If it has not been made.
    pub fn node_key(&self) -> Result<Key> {
        key_in(self.scene.path("store").join("worker-node.key"))
    }

    /// A connection that is authenticated with the worker node's key, with every byte under the test's control.
    ///
    /// # Errors
    /// If it is not let in.
    pub async fn node(&self) -> Result<Raw> {
        let mut raw = Raw::secured(self.scene.ssh, Offer::default()).await?;
        raw.ask_to_authenticate().await?;
        let login = self.node_key()?.login("kubernetes", raw.session());
        ensure!(raw.authenticate(&login).await?, "the worker node is refused");
        Ok(raw)
    }

    /// Checks that the agent is the same process, and small.
    ///
    /// # Errors
    /// If it is not.
    pub fn holds(&self) -> Result<()> {
        // Reading the peak fails if the process has ended.
        let peak = self.agent.peak_kib().with_context(|| self.agent.log())?;
        ensure!(peak < RSS_MAX_KIB, "the agent took {peak} KiB");
        Ok(())
    }

    /// Checks that the agent holds, and admits and answers a well-behaved attestation peer.
    ///
    /// # Errors
    /// If it is not.
    pub async fn holds_and_attests(&self) -> Result<()> {
        self.holds()?;
        let mut peer = Stranger::attestation(self.scene.ssh, Answer::Refuses).await?;
        peer.open_control().await?;
        peer.hears(|message| matches!(message, Control::Hello(_))).await?;
        self.holds()
    }

    /// The real adaptor brings the pod up, and its tunnels carry data; the adaptor still runs then.
    ///
    /// # Errors
    /// If it does not.
    pub async fn comes_up(&self) -> Result<Child> {
        let adaptor = self.scene.adaptor()?;
        self.carries(&adaptor).await.with_context(|| format!("{}\n{}", self.agent.log(), adaptor.log()))?;
        self.holds()?;
        Ok(adaptor)
    }

    /// Waits until the adaptor is up, and its tunnels carry data both ways.
    ///
    /// # Errors
    /// If they do not.
    pub async fn carries(&self, adaptor: &Child) -> Result<()> {
        up(adaptor).await?;
        let kata = endpoint(adaptor, "KATAAGENT").await?;
        timeout(PATIENCE, bulk_both_ways(kata_client(kata).await?, 100_000, 1)).await??;
        timeout(PATIENCE, bulk_both_ways(client(self.scene.node_inbound).await?, 100_000, 2)).await??;
        Ok(())
    }
}

/// Reads the private key in a file.
///
/// # Errors
/// If there is none.
pub fn key_in(file: PathBuf) -> Result<Key> {
    Key::from_openssh(&std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?)
}

/// Checks that the other end still serves the connection: it refuses an unknown request, in order.
///
/// # Errors
/// If it is not.
pub async fn answers(raw: &mut Raw) -> Result<()> {
    raw.send(&Packet::global("are-you-there@example.org")).await?;
    raw.expect(&[message::REQUEST_FAILURE]).await.map(drop)
}
