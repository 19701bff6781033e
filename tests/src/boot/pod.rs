//! A pod in a running VM, and the checks that boot tests make.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::user_data::{INBOUNDS, OUTBOUNDS};
use super::{Boot, Machine, MachineOptions, MachinePermit, UserData};
use crate::harness::process::Child;
use crate::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up};
use crate::simulators::inspector::Request;
use crate::simulators::inspector::client::Inspection;
use crate::simulators::kata::client::bulk_both_ways;
use crate::simulators::kata_api::VOLUMES;
use crate::simulators::kata_api::api::agent::CreateContainerRequest;
use crate::simulators::kata_api::api::oci::{Mount, Spec};
use crate::simulators::kata_api::client::Runtime;
use crate::simulators::kata_api::protobuf::MessageField;

const MIB: u64 = 1024 * 1024;
const SIGKILL: i32 = 9;
/// As the kernel truncates names.
const AGENT_COMM: &str = "agent-protocol-";
/// The annotation of cloud volumes, and one for a container.
const CLOUD_VOLUMES: &str = "io.confidentialcontainers.org.cloud_volumes";
const VOLUME: &str = r#"{"vol-0":{"mount_point":"/data","fs_type":"ext4","lun":"0","disk_id":""}}"#;
/// A file on it.
const KEPT: &str = "/run/cloud-volumes/vol-0/kept";
/// The agent's program.
pub const AGENT: &str = "agent-protocol-forwarder";

/// The scene of the worker node; with `user_data`, the pod's keys go there.
///
/// # Errors
/// If a part of it can't be started.
pub async fn scene(user_data: bool) -> Result<Scene> {
    let mut scene = Scene::new(SceneOptions { user_data, ..SceneOptions::default() }).await?;
    scene.inbounds = "KUBERNETES_PHASE:INSPECTOR:0".to_owned();
    scene.agent_inbounds = INBOUNDS.to_owned();
    scene.agent_outbounds = OUTBOUNDS.to_owned();
    scene.kata_socket = "/run/kata-agent/agent.sock".into();
    // An emulated VM boots first.
    scene.deadline = 280;
    Ok(scene)
}

/// A request for a container with one bind mount, whose source is a volume or not.
fn container(source: &str, volume: bool) -> CreateContainerRequest {
    let mount = Mount { source: source.into(), type_: "bind".into(), ..Mount::default() };
    let mut spec = Spec { Mounts: vec![mount], ..Spec::default() };
    if volume {
        spec.Annotations.insert(VOLUMES.into(), source.into());
    }
    let container_id = "boot".into();
    CreateContainerRequest { container_id, OCI: MessageField::some(spec), ..Default::default() }
}

/// A pod in a running VM, and its adaptor.
#[derive(Debug)]
pub struct Pod {
    /// The scene of the worker node.
    pub scene: Scene,
    /// The VM.
    pub machine: Machine,
    adaptor: Child,
    /// Inspector of the VM.
    pub inspection: Inspection,
}

impl Pod {
    /// Starts the adaptor, which waits for a VM as in production, then the VM.
    ///
    /// # Errors
    /// If the pod does not come up; the error has the console's log.
    pub async fn start(scene: Scene, name: &'static str, boot: Boot, user_data: UserData) -> Result<Self> {
        let options = MachineOptions::new(name, boot, scene.ssh, user_data);
        Self::start_as(scene, options).await
    }

    /// As [`Pod::start`], with other options of the machine.
    ///
    /// # Errors
    /// As [`Pod::start`].
    pub async fn start_as(mut scene: Scene, options: MachineOptions) -> Result<Self> {
        options.user_data.announce(&mut scene)?;
        let permit = MachinePermit::take().await;
        let adaptor = scene.adaptor()?;
        let machine = Machine::start(permit, &options).await?;
        let started = async {
            up(&adaptor).await?;
            anyhow::Ok(Inspection(endpoint(&adaptor, "INSPECTOR").await?))
        };
        match started.await {
            Ok(inspection) => Ok(Self { scene, machine, adaptor, inspection }),
            Err(error) => Err(error.context(format!("the console says:\n{}", machine.console.log()))),
        }
    }

    /// Checks that the kata agent answers through the Kubernetes phase, and that a client in podns reaches the worker node.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn works(&self) -> Result<()> {
        let kata = endpoint(&self.adaptor, "KATAAGENT").await?;
        let bulk = async { bulk_both_ways(kata_client(kata).await?, MIB, 11).await };
        timeout(PATIENCE, bulk).await.context("KATAAGENT hangs")?.context("KATAAGENT")?;
        let before = self.scene.node_service.connections();
        let echo = Request::Echo { namespace: "podns".into(), address: "127.0.0.1:9000".into(), bytes: MIB };
        let () = self.inspection.ask(&echo).await.context("NODESERVICE, from podns")?;
        ensure!(
            self.scene.node_service.connections() > before,
            "another service than the worker node's answered"
        );
        Ok(())
    }

    /// Waits until, since `mark`, the connection was lost and the pod came back.
    async fn is_back(&self, mark: usize) -> Result<()> {
        for text in ["channel down", "kubernetes phase up"] {
            self.adaptor.wait_from(mark, |line| line.contains(text), PATIENCE).await?;
        }
        self.works().await
    }

    /// Checks that a killed agent continues with the keys of this boot.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn agent_killed(&self) -> Result<()> {
        let (attestations, mark) = (self.scene.kbs.attestations(), self.adaptor.mark());
        let before = self.inspection.process(AGENT).await?.pid;
        self.inspection.have_done(&Request::Signal(AGENT_COMM.into(), SIGKILL)).await;
        self.is_back(mark).await.context("after the agent was killed")?;
        ensure!(self.inspection.process(AGENT).await?.pid != before, "the agent was not killed");
        let after = self.scene.kbs.attestations();
        ensure!(after == attestations, "the restarted agent attested again");
        Ok(())
    }

    /// Checks that a rebooted VM attests again.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn rebooted(&self) -> Result<()> {
        let (attestations, mark) = (self.scene.kbs.attestations(), self.adaptor.mark());
        let boot_id = "/proc/sys/kernel/random/boot_id";
        let before = self.inspection.read(boot_id).await?;
        self.inspection.have_done(&Request::Reboot).await;
        self.is_back(mark).await.context("after the VM was rebooted")?;
        ensure!(self.inspection.read(boot_id).await? != before, "the VM was not rebooted");
        ensure!(self.scene.kbs.attestations() > attestations, "the VM did not attest after its reboot");
        Ok(())
    }

    /// Checks the listening sockets: only port 2222 is open to the outside, and podns has no `lo` but its own.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn listeners(&self) -> Result<()> {
        let (agent, rest) =
            (self.inspection.process(AGENT).await?, self.inspection.process("api-server-rest").await?);
        let host = self.inspection.listeners(&agent).await?;
        let outside: Vec<_> = host.iter().filter(|listener| !listener.ip().is_loopback()).collect();
        ensure!(outside == [&"[::]:2222".parse()?], "from outside there is more than port 2222: {host:?}");
        ensure!(host.contains(&"127.0.0.1:8080".parse()?), "the KBS inbound is not there: {host:?}");
        ensure!(rest.net != agent.net, "api-server-rest runs in the host's network namespace");
        let mut pod = self.inspection.listeners(&rest).await?;
        pod.sort_unstable();
        let mut expected = vec!["127.0.0.1:8006".parse()?, "127.0.0.1:9000".parse()?];
        // Not in a bare VM.
        expected.extend(pod.iter().copied().filter(|listener| listener.to_string() == "169.254.169.254:80"));
        ensure!(pod == expected, "in podns: {pod:?}");
        Ok(())
    }

    /// Checks that the sandboxed agent serves containers: it makes the sources of bind mounts, sees mounts of others in the
    /// VM, and reports what it can't do.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn containers(&self) -> Result<()> {
        let runtime = Runtime::new(client(endpoint(&self.adaptor, "KATAAGENT").await?).await?);
        let refused = runtime.create_container(&container("/usr/no-such-volume", true)).await;
        let refused = refused.err().context("a volume outside of the prefixes was made")?.to_string();
        ensure!(refused.contains("/usr/no-such-volume: it is missing and not made"), "{refused}");

        // As the kata agent does at CreateSandbox, ignoring the error: only what is in the directory goes.
        let top = "/run/kata-containers";
        let _ = self.inspection.run(&["mkdir", "-p", &format!("{top}/of-an-earlier-sandbox")]).await?;
        let removed = self.inspection.run(&["rm", "-r", top]).await.err().context("it is no mount point")?;
        ensure!(removed.to_string().contains("busy"), "{removed}");
        // The scratch disk's mount point stays as well, if there is one.
        let left = self.inspection.run(&["ls", top]).await?;
        ensure!(matches!(left.trim(), "" | "image"), "{top} still has {left}");

        let volume = "/run/kata-containers/volume";
        let request = container(volume, true);
        let mut waiting = tokio::spawn(async move { runtime.create_container(&request).await });
        let made = async {
            while self.inspection.run(&["stat", volume]).await.is_err() {
                // No event shows when a directory of the VM is made.
                sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            made = timeout(PATIENCE, made) => made.context("the source of a bind mount was not made")?,
            ended = &mut waiting => bail!("the request did not wait for its volume: {:?}", ended?.err()),
        }
        let _ = self.inspection.run(&["mount", "-t", "tmpfs", "tmpfs", volume]).await?;
        // The simulator does not know the request and closes the connection, so the request has arrived.
        let ended = timeout(PATIENCE, waiting).await.context("the mounted volume is not seen")??;
        let ended = ended.err().context("the simulator answered a request")?.to_string();
        ensure!(!ended.contains("volume"), "the request was refused: {ended}");
        Ok(())
    }

    /// Asks for a container with a cloud volume, which the VM has as its second virtio disk. Returns what
    /// [`Pod::keep_on_volume`] has left on it.
    ///
    /// # Errors
    /// If it is not mounted.
    pub async fn cloud_volume(&self) -> Result<Option<String>> {
        let runtime = Runtime::new(client(endpoint(&self.adaptor, "KATAAGENT").await?).await?);
        let mut request = container("/run/cloud-volumes/on-the-node", false);
        let spec = request.OCI.mut_or_insert_default();
        spec.Mounts.iter_mut().for_each(|mount| mount.destination = "/data".into());
        spec.Annotations.insert(CLOUD_VOLUMES.into(), VOLUME.into());
        // The simulator does not know the request and closes the connection, so the request has arrived.
        let ended = runtime.create_container(&request).await.err().context("the simulator answered")?;
        let mounts = self.inspection.read("/proc/self/mounts").await?;
        let mounted = mounts.lines().find(|line| line.contains(" /run/cloud-volumes/vol-0 ext4 "));
        let mounted = mounted.with_context(|| format!("no volume is mounted: {ended}: {mounts}"))?;
        ensure!(mounted.starts_with("/dev/vdb "), "another disk is mounted: {mounted}");
        Ok(self.inspection.read(KEPT).await.ok())
    }

    /// Leaves a file on the volume of [`Pod::cloud_volume`].
    ///
    /// # Errors
    /// If it can't be written.
    pub async fn keep_on_volume(&self) -> Result<()> {
        self.inspection.run(&["sh", "-c", &format!("echo kept >{KEPT}; sync")]).await.map(drop)
    }

    /// Checks that the pod's namespace has the interface of its network, and a route over it.
    ///
    /// # Errors
    /// If it does not get there.
    pub async fn network(&self, interface: &str) -> Result<()> {
        let pid = self.inspection.process("api-server-rest").await?.pid;
        let file = |name: &str| format!("/proc/{pid}/net/{name}");
        let set_up = async {
            loop {
                let routes = self.inspection.read(&file("route")).await?;
                // The kernel's lines: interface, destination, ...
                let route = routes.lines().any(|line| line.starts_with(&format!("{interface}\t00000000\t")));
                if route {
                    return self.inspection.read(&file("dev")).await;
                }
                // The agent sets up the network concurrently.
                sleep(Duration::from_millis(100)).await;
            }
        };
        let devices = timeout(PATIENCE, set_up).await.context("the pod network does not come up")??;
        ensure!(devices.contains(&format!("{interface}:")), "{devices}");
        Ok(())
    }

    /// Checks that apf.json has the given content, and is readable by root only.
    ///
    /// # Errors
    /// If it is not so.
    pub async fn has(&self, apf: &Value) -> Result<()> {
        let text = self.inspection.read("/run/peerpod/apf.json").await?;
        ensure!(&serde_json::from_str::<Value>(&text)? == apf, "another apf.json: {text}");
        Ok(())
    }
}
