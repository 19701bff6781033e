//! Pod VMs, booted: the agent in its image, the real adaptor on the host, both phases, kills, reboots and tampering.
//!
//! By name: `tests/build-test-vm && cargo test -p secure-comms-tests --test boot`
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::boot::{Boot, Machine, MachineOptions, Turn, UserData, apf_json, artifacts};
use secure_comms_tests::inspector::Request;
use secure_comms_tests::inspector::client::Inspection;
use secure_comms_tests::kata::client::bulk_both_ways;
use secure_comms_tests::process::Child;
use secure_comms_tests::scene::{PATIENCE, Scene, SceneOptions, endpoint, kata_client, up};
use serde_json::{Value, json};
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;
const SIGKILL: i32 = 9;
/// As the kernel cuts names.
const AGENT_COMM: &str = "agent-protocol-";
const AGENT: &str = "agent-protocol-forwarder";

async fn scene(user_data: bool) -> Result<Scene> {
    let mut scene = Scene::new(SceneOptions { user_data, ..SceneOptions::default() }).await?;
    scene.inbounds = "KUBERNETES_PHASE:INSPECTOR:0".to_owned();
    // A VM boots first, emulated.
    scene.deadline = 280;
    Ok(scene)
}

/// A pod whose VM runs, and its adaptor.
struct Pod {
    scene: Scene,
    machine: Machine,
    adaptor: Child,
    inspection: Inspection,
}

impl Pod {
    /// The adaptor is there first, as in real life: it is what waits for a VM.
    async fn start(scene: Scene, name: &'static str, boot: Boot, user_data: UserData) -> Result<Self> {
        let turn = Turn::take().await;
        let adaptor = scene.adaptor()?;
        let options = MachineOptions { name, boot, ssh: scene.ssh, user_data, no_reboot: false };
        let machine = Machine::start(turn, &options)?;
        let started = async {
            up(&adaptor).await?;
            anyhow::Ok(Inspection(endpoint(&adaptor, "INSPECTOR").await?))
        };
        match started.await {
            Ok(inspection) => Ok(Self { scene, machine, adaptor, inspection }),
            Err(error) => Err(error.context(format!("the console says:\n{}", machine.console.log()))),
        }
    }

    /// The kata agent answers through the Kubernetes phase, and a client in podns reaches the worker node.
    async fn works(&self) -> Result<()> {
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

    /// What has happened since `mark`: the connection was lost, and then the pod is back.
    async fn is_back(&self, mark: usize) -> Result<()> {
        for text in ["channel down", "kubernetes phase up"] {
            self.adaptor.wait_from(mark, |line| line.contains(text), PATIENCE).await?;
        }
        self.works().await
    }

    /// A killed agent goes on with the keys of this boot.
    async fn agent_killed(&self) -> Result<()> {
        let (attestations, mark) = (self.scene.kbs.attestations(), self.adaptor.mark());
        let before = self.inspection.process(AGENT).await?.pid;
        self.inspection.have_done(&Request::Signal(AGENT_COMM.into(), SIGKILL)).await;
        self.is_back(mark).await.context("after the agent was killed")?;
        ensure!(self.inspection.process(AGENT).await?.pid != before, "the agent was not killed");
        let after = self.scene.kbs.attestations();
        ensure!(after == attestations, "the restarted agent attested again");
        Ok(())
    }

    /// A VM that has started anew attests anew.
    async fn rebooted(&self) -> Result<()> {
        let (attestations, mark) = (self.scene.kbs.attestations(), self.adaptor.mark());
        let boot_id = "/proc/sys/kernel/random/boot_id";
        let before = self.inspection.read(boot_id).await?;
        self.inspection.have_done(&Request::Reboot).await;
        self.is_back(mark).await.context("after the VM was rebooted")?;
        ensure!(self.inspection.read(boot_id).await? != before, "the VM was not rebooted");
        ensure!(self.scene.kbs.attestations() > attestations, "the VM did not attest after its reboot");
        Ok(())
    }

    /// Who listens where: from outside there is port 2222 alone, and podns is another world with `lo` in it.
    async fn listeners(&self) -> Result<()> {
        let (agent, rest) =
            (self.inspection.process(AGENT).await?, self.inspection.process("api-server-rest").await?);
        let host = self.inspection.listeners(&agent).await?;
        let outside: Vec<_> = host.iter().filter(|listener| !listener.ip().is_loopback()).collect();
        ensure!(outside == [&"[::]:2222".parse()?], "from outside there is more than port 2222: {host:?}");
        ensure!(host.contains(&"127.0.0.1:8080".parse()?), "the KBS inbound is not there: {host:?}");
        ensure!(rest.net != agent.net, "api-server-rest runs in the host's network namespace");
        let mut pod = self.inspection.listeners(&rest).await?;
        pod.sort_unstable();
        ensure!(pod == ["127.0.0.1:8006".parse()?, "127.0.0.1:9000".parse()?], "in podns: {pod:?}");
        Ok(())
    }

    /// apf.json is what was given, and for root alone.
    async fn has(&self, apf: &Value) -> Result<()> {
        let text = self.inspection.read("/run/peerpod/apf.json").await?;
        ensure!(&serde_json::from_str::<Value>(&text)? == apf, "another apf.json: {text}");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_comes_up_from_a_seed_survives_a_kill_and_attests_anew_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod = Pod::start(scene(false).await?, "bare", Boot::Bare, UserData::NoCloud(apf.clone())).await?;
    pod.works().await?;
    pod.machine.says_after(0, "user data: NoCloud seed on /dev/vd").await?;
    pod.machine.says_after(0, "agent READY").await?;
    pod.has(&apf).await?;
    pod.listeners().await?;
    ensure!(pod.scene.kbs.attestations() >= 2, "the VM got its keys without attesting");
    pod.agent_killed().await?;
    pod.machine.says_after(0, "latched earlier in this boot").await?;
    pod.rebooted().await?;
    pod.listeners().await?;
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_with_its_keys_in_an_smbios_credential_attests_to_nobody() -> Result<()> {
    let scene = scene(true).await?;
    scene.write_user_data().await?;
    let keys = serde_json::from_slice(&std::fs::read(scene.path("apf.json"))?)?;
    let apf = apf_json(&keys)?;
    ensure!(apf["sc"] == true, "the adaptor's user data does not switch Secure Comms on");
    let pod = Pod::start(scene, "bare-smbios", Boot::Bare, UserData::Smbios(apf.clone())).await?;
    pod.works().await?;
    pod.machine.says_after(0, "user data: SMBIOS credential").await?;
    pod.has(&apf).await?;
    ensure!(pod.scene.kbs.attestations() == 0, "it attested");
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_takes_its_tunnels_from_a_fw_cfg_credential() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod =
        Pod::start(scene(false).await?, "bare-fw-cfg", Boot::Bare, UserData::FwCfg(apf.clone())).await?;
    pod.works().await?;
    pod.machine.says_after(0, "user data: fw_cfg credential").await?;
    pod.has(&apf).await?;
    pod.machine.passed();
    Ok(())
}

/// With systemd: the units are as they should be, and the agent is confined.
async fn systemd_is_content(pod: &Pod) -> Result<()> {
    let inspection = &pod.inspection;
    let show = inspection
        .run(&[
            "systemctl",
            "show",
            "agent-protocol-forwarder.service",
            "-p",
            "ActiveState,SubState,Type,NRestarts,Result",
        ])
        .await?;
    for property in ["ActiveState=active", "SubState=running", "Type=notify", "NRestarts=0", "Result=success"]
    {
        ensure!(show.lines().any(|line| line == property), "no {property} in {show}");
    }
    let failed = inspection.run(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).await?;
    ensure!(failed.trim().is_empty(), "failed units: {failed}");

    let agent = inspection.process(AGENT).await?;
    let status = inspection.read(&format!("/proc/{}/status", agent.pid)).await?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name} in {status}"))
    };
    // Bit 21 is CAP_SYS_ADMIN, for setns(2).
    for capabilities in ["CapEff", "CapPrm", "CapBnd"] {
        ensure!(field(capabilities)? == "0000000000200000", "{capabilities}: {status}");
    }
    ensure!(field("NoNewPrivs")? == "1" && field("Seccomp")? == "2", "the agent is not confined: {status}");
    let init = inspection.process("systemd").await.or(inspection.process("init").await)?;
    ensure!(agent.mnt != init.mnt, "the agent is in PID 1's mount namespace");
    ensure!(agent.net == init.net, "the agent is not in the VM's network namespace");
    let mode = inspection.run(&["stat", "-c", "%a %n", "/run/secure-comms", "/run/peerpod/apf.json"]).await?;
    ensure!(mode == "700 /run/secure-comms\n600 /run/peerpod/apf.json\n", "{mode}");
    Ok(())
}

/// As systemd accounts for it.
async fn boot_time(pod: &Pod) -> Result<()> {
    let properties = "-pActiveEnterTimestampMonotonic,ExecMainStartTimestampMonotonic";
    let show =
        pod.inspection.run(&["systemctl", "show", "agent-protocol-forwarder.service", properties]).await?;
    let all = pod.inspection.run(&["systemd-analyze", "time"]).await.unwrap_or_default();
    println!("{show}{all}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_with_systemd_confines_the_agent_and_recovers_it() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod = Pod::start(scene(false).await?, "fast", Boot::Fast, UserData::Smbios(apf.clone())).await?;
    pod.works().await?;
    pod.has(&apf).await?;
    systemd_is_content(&pod).await?;
    boot_time(&pod).await?;
    pod.listeners().await?;
    pod.agent_killed().await?;
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_boots_verified_under_ovmf_and_attests_anew_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod =
        Pod::start(scene(false).await?, "disk", Boot::Disk(None), UserData::NoCloud(apf.clone())).await?;
    pod.works().await?;
    pod.has(&apf).await?;
    systemd_is_content(&pod).await?;
    boot_time(&pod).await?;
    let mounts = pod.inspection.read("/proc/self/mounts").await?;
    let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).context("no root")?;
    ensure!(
        root.starts_with("/dev/") && root.contains(" erofs ro,"),
        "the root is not a read-only erofs: {root}"
    );
    let command_line = pod.inspection.read("/proc/cmdline").await?;
    let root_hash = artifacts()?.root_hash()?;
    ensure!(command_line.contains(&format!("roothash={root_hash}")), "{command_line}");
    pod.listeners().await?;
    pod.rebooted().await?;
    pod.machine.passed();
    Ok(())
}

/// A machine that must not come up: it ends by itself, having said why, and served nobody.
async fn refuses_to_start(name: &'static str, boot: Boot, why: &str) -> Result<()> {
    let scene = scene(false).await?;
    let user_data = UserData::Smbios(apf_json(&json!({}))?);
    let options = MachineOptions { name, boot, ssh: scene.ssh, user_data, no_reboot: true };
    let mut machine = Machine::start(Turn::take().await, &options)?;
    let (status, served) = machine.ends_without_serving().await?;
    ensure!(!served, "it served SSH");
    ensure!(status.success(), "qemu ended with {status}");
    let lines = machine.console.lines();
    let fatal: Vec<_> = lines.iter().filter(|line| line.text.contains("init: FATAL: ")).collect();
    match fatal.as_slice() {
        [line] if line.text.contains(why) => println!("{line}"),
        other => bail!("expected one line with {why:?}: {other:?}"),
    }
    machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_root_hash_never_serves() -> Result<()> {
    let mut root_hash = artifacts()?.root_hash()?;
    let last = if root_hash.ends_with('0') { "1" } else { "0" };
    root_hash.replace_range(root_hash.len() - 1.., last);
    refuses_to_start("wrong-root-hash", Boot::Direct { root_hash }, "the root partition").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tampered_root_never_serves() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("podvm.raw");
    std::fs::copy(artifacts()?.file("podvm.raw")?, &disk)?;
    tamper(&disk)?;
    refuses_to_start("tampered-root", Boot::Disk(Some(disk)), "mounting").await
}

/// Changes a bit in the root's first block, behind the superblock: no check but dm-verity's would find it.
fn tamper(disk: &std::path::Path) -> Result<()> {
    const SUPERBLOCK: u64 = 1024;
    const BEHIND_IT: u64 = 2048;
    /// erofs' magic number, as it lies on the disk.
    const MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
    let file = std::fs::File::options().read(true).write(true).open(disk)?;
    let size = file.metadata()?.len();
    let mut magic = [0; 4];
    // Partitions begin at multiples of a MiB.
    for partition in (0..size).step_by(1024 * 1024) {
        let superblock = partition + SUPERBLOCK;
        if file.read_exact_at(&mut magic, superblock).is_ok() && magic == MAGIC {
            let mut byte = [0];
            file.read_exact_at(&mut byte, superblock + BEHIND_IT)?;
            byte[0] ^= 1;
            return Ok(file.write_all_at(&byte, superblock + BEHIND_IT)?);
        }
    }
    bail!("no erofs on {}", disk.display())
}
