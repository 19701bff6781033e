//! Boots pod VMs: the agent in its image, the real adaptor on the host, both phases, kills, reboots and tampering.
//!
//! By name: `tests/build-test-vm && cargo test -p secure-comms-tests --test boot`
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::boot::{
    AGENT, Boot, CloudConfig, DataDisk, Machine, MachineOptions, MachinePermit, Pod, UserData, apf_json,
    artifacts, scene, sees_only_its_own,
};
use secure_comms_tests::harness::scene::{PATIENCE, endpoint, kata_client, up};
use secure_comms_tests::simulators::inspector::Request;
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_vm_survives_a_kill_and_attests_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let user_data = UserData::NoCloud(CloudConfig::without_init_data(apf.clone()));
    let pod = Pod::start(scene(false).await?, "bare", Boot::Bare, user_data).await?;
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

/// Checks that each of the guest's programs runs with what init-data, and the image, say.
async fn guest_is_configured(pod: &Pod) -> Result<()> {
    let inspection = &pod.inspection;
    for (program, arguments) in [
        (
            "attestation-agent",
            "--attestation_sock unix:///run/confidential-containers/attestation-agent/attestation-agent.sock \
             -c /run/peerpod/aa.toml --initdata-toml /run/peerpod/initdata.toml",
        ),
        ("confidential-data-hub", "-c /run/peerpod/cdh.toml"),
        ("kata-agent", "--config /etc/agent-config.toml"),
        ("api-server-rest", "--features all --bind 127.0.0.1:8006"),
    ] {
        let command = inspection.process(program).await?.command;
        let found = command.get(1..).unwrap_or_default().join(" ");
        ensure!(found == arguments, "{program} runs with {found:?}");
        // Too early or with the wrong files, they end.
        let unit = format!("{program}.service");
        let restarts = inspection.run(&["systemctl", "show", "-P", "NRestarts", &unit]).await?;
        ensure!(restarts.trim() == "0", "{program} was restarted: {}", restarts.trim());
    }
    let files = inspection.run(&["ls", "/run/peerpod"]).await?;
    for name in ["aa.toml", "auth.json", "cdh.toml", "initdata.digest", "policy.rego", "secure-comms.toml"] {
        ensure!(files.lines().any(|line| line == name), "no {name} in /run/peerpod: {files}");
    }
    let policy = inspection.read("/etc/kata-opa/default-policy.rego").await?;
    ensure!(policy.contains("default ExecProcessRequest := true"), "another policy: {policy}");
    Ok(())
}

/// Kills and restarts what is around the kata agent and the agent: the pod goes on with the same ones.
async fn restarts_keep_the_pod(pod: &Pod) -> Result<()> {
    let inspection = &pod.inspection;
    let (kata, agent) = (inspection.process("kata-agent").await?.pid, inspection.process(AGENT).await?.pid);
    let rest = inspection.process("api-server-rest").await?.pid;
    for killed in ["attestation-age", "confidential-da"] {
        inspection.ask::<usize>(&Request::Signal(killed.into(), 9)).await?;
    }
    for unit in ["netns@podns.service", "process-user-data.service", "scratch-disk.service"] {
        inspection.run(&["systemctl", "restart", unit]).await?;
        let state = inspection.run(&["systemctl", "show", "-P", "ActiveState", unit]).await?;
        ensure!(state.trim() != "failed", "{unit} failed");
    }
    let back = async {
        loop {
            let mut running = true;
            for program in ["attestation-agent", "confidential-data-hub", "api-server-rest"] {
                running &= inspection.process(program).await.is_ok_and(|process| process.pid != rest);
            }
            if running {
                return;
            }
            // No event of the VM shows this.
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, back).await.context("the guest's programs do not come back")?;
    ensure!(inspection.process("kata-agent").await?.pid == kata, "the kata agent was restarted");
    ensure!(inspection.process(AGENT).await?.pid == agent, "the agent was restarted");
    pod.works().await
}

/// The metadata service answers containers in podns as it answers the VM, and nothing else of the VM's network does.
async fn containers_reach_the_metadata_service(pod: &Pod) -> Result<()> {
    let ask = |port: u16| {
        let head = ["PUT /latest/api/token HTTP/1.1", "Host: 169.254.169.254", "Connection: close"];
        let more = ["X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 60", "Content-Length: 0", "", ""];
        // Escapes of printf.
        let request = [&head[..], &more].concat().join("\\r\\n");
        format!("exec 3<>/dev/tcp/169.254.169.254/{port} && printf '{request}' >&3 && cat <&3")
    };
    let in_pod = |script: String| async move {
        let enter = ["nsenter", "--net=/run/netns/podns", "bash", "-c", script.as_str()];
        pod.inspection.run(&enter).await
    };
    let answer = in_pod(ask(80)).await?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "the metadata service says {answer:?}");
    let refused = in_pod(ask(81)).await.err().context("another port is open")?.to_string();
    ensure!(refused.contains("refused") || refused.contains("unreachable"), "{refused}");
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
    let user_data = UserData::NoCloud(CloudConfig::new(apf.clone()).with_scratch_disk());
    let scene = scene(false).await?;
    let scratch = DataDisk { file: scene.path("scratch.raw"), serial: "trusted_store" };
    std::fs::File::create(&scratch.file)?.set_len(VOLUME_SIZE)?;
    let scratch_file = scratch.file.clone();
    let options = MachineOptions::new("fast", Boot::Fast, scene.ssh, user_data);
    let pod = Pod::start_as(scene, MachineOptions { disks: vec![scratch], ..options }).await?;
    pod.works().await?;
    pod.has(&apf).await?;
    pod.network("pod0").await?;
    systemd_is_content(&pod, NET_ADMIN).await?;
    guest_is_configured(&pod).await?;
    // Without the capabilities that it had at its start.
    pod.containers().await?;
    boot_time(&pod).await?;
    pod.listeners().await?;
    host_cannot_read_the_scratch_disk(&pod, &scratch_file).await?;
    restarts_keep_the_pod(&pod).await?;
    pod.agent_killed().await?;
    pod.network("pod0").await?;
    has_capabilities(&pod, pod.inspection.process(AGENT).await?.pid, NET_ADMIN).await?;
    pod.machine.passed();
    Ok(())
}

/// Enough for ext4.
const VOLUME_SIZE: u64 = 64 * 1024 * 1024;
/// Size of a root's disk in a cloud that was asked for a larger one than the image.
const ROOT_SIZE: u64 = 4 * 1024 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn the_verified_disk_boots_and_attests_after_a_reboot() -> Result<()> {
    let apf = apf_json(&json!({}))?;
    let user_data = UserData::Aws(CloudConfig::new(apf.clone()).with_scratch_disk());
    let scene = scene(false).await?;
    let volume = DataDisk { file: scene.path("volume.raw"), serial: "volume" };
    std::fs::File::create(&volume.file)?.set_len(VOLUME_SIZE)?;
    let root = scene.path("root.raw");
    std::fs::copy(artifacts()?.file("podvm.raw")?, &root)?;
    std::fs::File::options().write(true).open(&root)?.set_len(ROOT_SIZE)?;
    let options = MachineOptions::new("disk", Boot::Disk(Some(root)), scene.ssh, user_data);
    let pod = Pod::start_as(scene, MachineOptions { disks: vec![volume], ..options }).await?;
    pod.works().await?;
    pod.has(&apf).await?;
    systemd_is_content(&pod, NO_CAPABILITY).await?;
    guest_is_configured(&pod).await?;
    containers_reach_the_metadata_service(&pod).await?;
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
    scratch_disk_is_on(&pod, "vda128").await?;
    ensure!(pod.cloud_volume().await?.is_none(), "an empty disk was not formatted");
    pod.keep_on_volume().await?;
    pod.rebooted().await?;
    let kept = pod.cloud_volume().await?;
    ensure!(kept.as_deref() == Some("kept\n"), "after a reboot the volume has {kept:?}");
    scratch_disk_is_on(&pod, "vda128").await?;
    pod.machine.passed();
    Ok(())
}

/// The scratch disk is where the guest keeps images, and the kernel encrypts it on this device.
async fn scratch_disk_is_on(pod: &Pod, device: &str) -> Result<()> {
    let mounts = pod.inspection.read("/proc/self/mounts").await?;
    let images = mounts.lines().find(|line| line.contains(" /run/kata-containers/image "));
    let images = images.with_context(|| format!("no scratch disk in {mounts}"))?;
    ensure!(
        images.starts_with("/dev/dm-") && images.contains(" ext4 rw,nosuid,nodev"),
        "the scratch disk is {images:?}"
    );
    let mapping = images.split(['/', ' ']).nth(2).context("no name")?;
    let below = pod.inspection.run(&["ls", &format!("/sys/class/block/{mapping}/slaves")]).await?;
    let kind = pod.inspection.read(&format!("/sys/class/block/{mapping}/dm/name")).await?;
    ensure!((below.trim(), kind.trim()) == (device, "podvm-scratch"), "{mapping} is {kind}, on {below}");
    Ok(())
}

/// The host can't read what is written to the scratch disk, a file of its own.
async fn host_cannot_read_the_scratch_disk(pod: &Pod, file: &std::path::Path) -> Result<()> {
    scratch_disk_is_on(pod, "vda").await?;
    let write = "echo in-clear-on-the-scratch-disk >/run/kata-containers/image/text && sync";
    pod.inspection.run(&["bash", "-c", write]).await?;
    let content = std::fs::read(file)?;
    ensure!(content.iter().any(|byte| *byte != 0), "nothing is on the disk");
    let text = b"in-clear-on-the-scratch-disk";
    ensure!(!content.windows(text.len()).any(|window| window == text), "the host reads the scratch disk");
    Ok(())
}

/// User data of a hostile cloud, each with what the console says of it.
fn hostile() -> Result<Vec<(Vec<u8>, &'static str)>> {
    let apf = "  - path: /run/peerpod/apf.json\n    content: |\n      {}\n";
    let with = |more: &str| format!("#cloud-config\n\nwrite_files:\n{apf}{more}").into_bytes();
    let unit = "/etc/systemd/system/multi-user.target.wants/host.service";
    Ok(vec![
        (with("runcmd:\n  - reboot\n"), "an unknown key"),
        (
            format!("#cloud-config\n\nwrite_files:\n  - path: {unit}\n    content: |\n      [Service]\n")
                .into(),
            "no item for /run/peerpod/apf.json",
        ),
        (with("  - path: /run/peerpod/initdata\n    content: |\n      H4sIAAAA\n"), "init-data: gzip"),
        (vec![0x1f, 0x8b, 8, 0, 27, b'[', b'2', b'J'], "compressed by gzip"),
        (with(""), "no init-data; give"),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_user_data_can_only_fail() -> Result<()> {
    let mut scene = scene(false).await?;
    let good = CloudConfig::new(apf_json(&json!({}))?);
    let user_data = UserData::Azure(good.clone());
    user_data.announce(&mut scene)?;
    let permit = MachinePermit::take().await;
    let adaptor = scene.adaptor()?;
    let options = MachineOptions::new("hostile-metadata", Boot::Fast, scene.ssh, user_data);
    let machine = Machine::start(permit, &options).await?;
    for (text, why) in hostile()? {
        machine.set_user_data(&text)?;
        let line = machine.says_after(0, why).await?;
        ensure!(line.contains("process-user-data: "), "{line}");
        println!("{line}");
    }
    let log = adaptor.log();
    ensure!(!log.contains("kubernetes phase up") && scene.kbs.attestations() == 0, "it has a pod: {log}");
    // Once the cloud says what is right, nothing of this is left.
    machine.set_user_data(good.text()?.as_bytes())?;
    up(&adaptor).await.with_context(|| machine.console.log())?;
    machine.says_after(0, "azure-ready: Azure: 168.63.129.16 knows that this VM is ready").await?;
    bulk_both_ways(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?, 1 << 20, 11).await?;
    machine.passed();
    Ok(())
}

/// A machine that must not come up: it prints the reason and powers off, without having served.
async fn refuses_to_start(name: &'static str, boot: Boot, why: &str) -> Result<()> {
    let scene = scene(false).await?;
    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&json!({}))?));
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
