//! Boots pod VMs: the agent in its image, the real adaptor on the host, both phases, kills, reboots and tampering.
//!
//! By name: `tests/build-test-vm && cargo test -p secure-comms-tests --test boot`
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::boot::{
    AGENT, Boot, Machine, MachineOptions, MachinePermit, Pod, UserData, apf_json, artifacts, scene,
    sees_only_its_own,
};
use secure_comms_tests::harness::scene::PATIENCE;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_survives_a_kill_and_attests_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod = Pod::start(scene(false).await?, "bare", Boot::Bare, UserData::NoCloud(apf.clone())).await?;
    pod.works().await?;
    pod.machine.says_after(0, "user data: NoCloud seed on /dev/vd").await?;
    pod.machine.says_after(0, "agent READY").await?;
    pod.has(&apf).await?;
    pod.listeners().await?;
    ensure!(pod.scene.kbs.attestations() >= 1, "the VM got its keys without attesting");
    pod.agent_killed().await?;
    pod.machine.says_after(0, "latched earlier in this boot").await?;
    pod.rebooted().await?;
    pod.listeners().await?;
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_with_keys_from_smbios_does_not_attest() -> Result<()> {
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

/// What the agent keeps when it has latched: CAP_NET_ADMIN for a pod network, else nothing.
const NET_ADMIN: &str = "0000000000001000";
const NO_CAPABILITY: &str = "0000000000000000";

/// With systemd: the units are as they should be, and the agent is sandboxed, with these capabilities.
async fn systemd_is_content(pod: &Pod, capabilities: &str) -> Result<()> {
    let inspection = &pod.inspection;
    let show = inspection
        .run(&[
            "systemctl",
            "show",
            "agent-protocol-forwarder.service",
            "-p",
            "ActiveState,SubState,Type,NRestarts,Result,MemorySwapMax",
        ])
        .await?;
    for property in [
        "ActiveState=active",
        "SubState=running",
        "Type=notify",
        "NRestarts=0",
        "Result=success",
        "MemorySwapMax=0",
    ] {
        ensure!(show.lines().any(|line| line == property), "no {property} in {show}");
    }
    let failed = inspection.run(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).await?;
    ensure!(failed.trim().is_empty(), "failed units: {failed}");

    let agent = inspection.process(AGENT).await?;
    has_capabilities(pod, agent.pid, capabilities).await?;
    let init = inspection.process("systemd").await.or(inspection.process("init").await)?;
    ensure!(agent.mnt != init.mnt, "the agent is in PID 1's mount namespace");
    ensure!(agent.net == init.net, "the agent is not in the VM's network namespace");
    let mode = inspection.run(&["stat", "-c", "%a %n", "/run/secure-comms", "/run/peerpod/apf.json"]).await?;
    ensure!(mode == "700 /run/secure-comms\n600 /run/peerpod/apf.json\n", "{mode}");
    sees_only_its_own(pod).await?;
    confined(pod).await
}

/// Waits until every thread of the agent has these capabilities: it gives the others up once it has latched.
async fn has_capabilities(pod: &Pod, pid: i32, capabilities: &str) -> Result<()> {
    let start = tokio::time::Instant::now();
    loop {
        let threads = pod.inspection.run(&["ls", &format!("/proc/{pid}/task")]).await?;
        let mut wrong = None;
        for thread in threads.split_whitespace() {
            let status = pod.inspection.read(&format!("/proc/{pid}/task/{thread}/status")).await?;
            let is = |name: &str, value: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                line.is_some_and(|line| line.trim() == value)
            };
            // The bounding set can't shrink without CAP_SETPCAP; "no new privileges" makes it void.
            let expected = is("CapEff", capabilities)
                && is("CapPrm", capabilities)
                && is("CapInh", NO_CAPABILITY)
                && is("CapAmb", NO_CAPABILITY)
                && is("CapBnd", "0000000000201000");
            ensure!(is("NoNewPrivs", "1") && is("Seccomp", "2"), "the agent is not confined: {status}");
            wrong = wrong.or((!expected).then_some(status));
        }
        let Some(status) = wrong else { return Ok(()) };
        ensure!(start.elapsed() < PATIENCE, "other capabilities than {capabilities}: {status}");
        // No event of the VM shows this.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// Checks that the attestation agent gets the flag for init-data exactly if there are some.
async fn attestation_agent_has_init_data(pod: &Pod, expected: bool) -> Result<()> {
    let command = pod.inspection.process("attestation-agent").await?.command;
    let flag = ["--initdata-toml", "/run/peerpod/initdata.toml"];
    let found = command.windows(2).any(|words| words == flag);
    ensure!(found == expected && command.len() == if expected { 5 } else { 3 }, "{command:?}");
    Ok(())
}

/// systemd's rating of the agent's unit; 10 is without a sandbox. The two capabilities, the network and root remain.
const EXPOSURE_MAX: f64 = 2.6;

async fn confined(pod: &Pod) -> Result<()> {
    let security = ["systemd-analyze", "security", "--no-pager", "agent-protocol-forwarder.service"];
    let table = pod.inspection.run(&security).await?;
    let (_, verdict) = table
        .rsplit_once("Overall exposure level for agent-protocol-forwarder.service: ")
        .with_context(|| format!("no exposure level in {table}"))?;
    println!("exposure level of the agent's unit: {}", verdict.trim());
    let level = verdict.split_whitespace().next().unwrap_or_default();
    let level: f64 = level.parse().with_context(|| format!("'{level}' is no exposure level"))?;
    ensure!(
        level <= EXPOSURE_MAX,
        "the agent's unit is less confined than it was, more than {EXPOSURE_MAX}: {table}"
    );
    Ok(())
}

/// systemd's accounting of the unit.
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
    let apf = apf_json(&json!({ "pod-network": {
        "podip": "10.244.1.7/24",
        "interface": "pod0",
        "worker-node-ip": "10.0.2.2/24",
        "tunnel-type": "vxlan",
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}, {"dst": "10.244.1.0/24", "gw": "", "scope": 253}],
        "mtu": 1400,
        "vxlan-port": 4789,
        "vxlan-id": 555001,
    }}))?;
    let pod = Pod::start(scene(false).await?, "fast", Boot::Fast, UserData::NoCloudWithInitData(apf.clone()))
        .await?;
    pod.works().await?;
    pod.has(&apf).await?;
    pod.network("pod0").await?;
    systemd_is_content(&pod, NET_ADMIN).await?;
    attestation_agent_has_init_data(&pod, true).await?;
    // Without the capabilities that it had at its start.
    pod.containers().await?;
    boot_time(&pod).await?;
    pod.listeners().await?;
    pod.agent_killed().await?;
    pod.network("pod0").await?;
    has_capabilities(&pod, pod.inspection.process(AGENT).await?.pid, NET_ADMIN).await?;
    pod.machine.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_verified_disk_boots_and_attests_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let pod =
        Pod::start(scene(false).await?, "disk", Boot::Disk(None), UserData::NoCloud(apf.clone())).await?;
    pod.works().await?;
    pod.has(&apf).await?;
    systemd_is_content(&pod, NO_CAPABILITY).await?;
    attestation_agent_has_init_data(&pod, false).await?;
    pod.containers().await?;
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

/// A machine that must not come up: it prints the reason and powers off, without having served.
async fn refuses_to_start(name: &'static str, boot: Boot, why: &str) -> Result<()> {
    let scene = scene(false).await?;
    let user_data = UserData::NoCloud(apf_json(&json!({}))?);
    let options = MachineOptions { no_reboot: true, ..MachineOptions::new(name, boot, scene.ssh, user_data) };
    let mut machine = Machine::start(MachinePermit::take().await, &options).await?;
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
    let boot = Boot::Direct { root_hash, without: None };
    refuses_to_start("wrong-root-hash", boot, "the root partition").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tampered_root_never_serves() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("podvm.raw");
    std::fs::copy(artifacts()?.file("podvm.raw")?, &disk)?;
    tamper(&disk)?;
    refuses_to_start("tampered-root", Boot::Disk(Some(disk)), "reading the root's superblock").await
}

/// Inverts a bit in the root's first block, after the superblock, where only dm-verity detects it.
fn tamper(disk: &std::path::Path) -> Result<()> {
    const SUPERBLOCK: u64 = 1024;
    const BEHIND_IT: u64 = 2048;
    /// The magic number of erofs, as on the disk.
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
