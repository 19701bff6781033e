//! A pod VM under a hostile host: what it hands to systemd, the serial console, the disk.
//!
//! By name: `tests/build-test-vm && cargo test -p secure-comms-tests --test boot_host`
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::boot::{
    Boot, Bus, CloudConfig, HOST_RAN, HostCredentials, Machine, MachineOptions, MachinePermit, Pod, UserData,
    apf_json, artifacts, scene,
};
use secure_comms_tests::harness::scene::{PATIENCE, Scene, endpoint, kata_client, up};
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use serde_json::json;
use tokio::time::{sleep, timeout};

fn options(name: &'static str, scene: &Scene, boot: Boot) -> Result<MachineOptions> {
    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&json!({}))?));
    Ok(MachineOptions::new(name, boot, scene.ssh, user_data))
}

/// The kernel is not for root to change, and takes no keys from the serial console.
async fn kernel_is_closed(pod: &Pod) -> Result<()> {
    let read = |path: &'static str| pod.inspection.read(path);
    for (path, expected) in [
        ("/proc/sys/kernel/sysrq", "0"),
        ("/proc/sys/kernel/kexec_load_disabled", "1"),
        ("/sys/module/module/parameters/sig_enforce", "Y"),
    ] {
        let found = read(path).await?;
        ensure!(found.trim() == expected, "{path} is {found}");
    }
    let lockdown = read("/sys/kernel/security/lockdown").await?;
    ensure!(lockdown.contains("[integrity]"), "lockdown: {lockdown}");
    // By which systemd knows AMD SEV: reads work (this one is the time stamp counter), writes do not.
    let msr = "/dev/cpu/0/msr";
    let counter = pod.inspection.run(&["od", "-An", "-tx8", "-j16", "-N8", msr]).await?;
    ensure!(counter.trim().len() == 16, "{msr}: {counter}");
    let write = ["dd", "if=/dev/zero", &format!("of={msr}"), "bs=8", "seek=2", "count=1", "conv=notrunc"];
    let refused =
        pod.inspection.run(&write).await.err().context("a register of the processor was written")?;
    ensure!(refused.to_string().contains("Operation not permitted"), "{refused}");
    Ok(())
}

/// The root is on the SATA disk, and the user data came from the SATA CD-ROM.
async fn runs_from_sata(pod: &Pod) -> Result<()> {
    let mounts = pod.inspection.read("/proc/self/mounts").await?;
    ensure!(mounts.contains("/dev/sr0 /media/cidata iso9660 ro,"), "the seed is not on a CD-ROM: {mounts}");
    let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).context("no root")?;
    let mapping = root.split(' ').next().and_then(|device| device.rsplit('/').next()).context("no device")?;
    let below = pod.inspection.run(&["ls", &format!("/sys/class/block/{mapping}/slaves")]).await?;
    ensure!(below.split_whitespace().all(|name| name.starts_with("sda")), "the root is on {below}");
    Ok(())
}

/// On the devices of cloud-api-adaptor's libvirt provider, so that the image also boots from these.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_runs_nothing_in_a_vm_on_sata_by_credentials() -> Result<()> {
    let scene = scene(false).await?;
    let options = options("host-credentials", &scene, Boot::Disk(None))?;
    let options = MachineOptions { host: HostCredentials::Hostile, bus: Bus::Sata, ..options };
    let pod = Pod::start_as(scene, options).await?;
    pod.works().await?;
    runs_from_sata(&pod).await?;
    for unit in ["host-smbios.service", "h.service"] {
        let state = pod.inspection.run(&["systemctl", "show", "-P", "LoadState", unit]).await?;
        ensure!(state.trim() == "not-found", "{unit} is {state}");
    }
    let drop_ins = ["systemctl", "show", "-P", "DropInPaths", "agent-protocol-forwarder.service"];
    let drop_ins = pod.inspection.run(&drop_ins).await?;
    ensure!(!drop_ins.contains("/run/"), "the agent's unit was changed: {drop_ins}");
    kernel_is_closed(&pod).await?;
    let log = pod.machine.console.log();
    ensure!(!log.contains(HOST_RAN), "a program of the host ran:\n{log}");
    pod.machine.passed();
    Ok(())
}

/// The test above proves something only if the same credentials work where they are taken.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_measured_option_the_host_is_root() -> Result<()> {
    let scene = scene(false).await?;
    let boot =
        Boot::Direct { root_hash: artifacts()?.root_hash()?, without: Some("systemd.import_credentials=no") };
    let options = MachineOptions { host: HostCredentials::Hostile, ..options("host-is-root", &scene, boot)? };
    let machine = Machine::start(MachinePermit::take().await, &options).await?;
    for program in HostCredentials::PROGRAMS {
        println!("{}", machine.says_after(0, &format!("{HOST_RAN}{program}")).await?);
    }
    machine.passed();
    Ok(())
}

/// The user data of a hostile cloud: root's sockets for strangers, the runtime's requests to the attacker, other keys.
fn hostile_user_data() -> serde_json::Value {
    let outbounds = [
        "ATTESTATION_PHASE:PWN:/run/systemd/private",
        "BOTH_PHASES:BUS:/run/dbus/system_bus_socket",
        "both_phases:KATA:/run/kata-agent/agent.sock",
        "KUBERNETES_PHASE:KATAAGENT:10.0.2.2:9",
    ];
    json!({"sc": true, "sc-pp-prv": "AAAA", "sc-wn-pub": "AAAA", "sc-outbounds": outbounds.join(",")})
}

#[tokio::test(flavor = "multi_thread")]
async fn user_data_opens_nothing_of_the_vm_to_a_stranger() -> Result<()> {
    let mut scene = scene(false).await?;
    let user_data = UserData::NoCloud(CloudConfig::new(apf_json(&hostile_user_data())?));
    user_data.announce(&mut scene)?;
    let options = MachineOptions::new("hostile-user-data", Boot::Disk(None), scene.ssh, user_data);
    let machine = Machine::start(MachinePermit::take().await, &options).await?;
    let booted = async {
        loop {
            match Stranger::attestation(scene.ssh, Answer::Silent).await {
                Ok(stranger) => return stranger,
                // qemu accepts connections before the agent does.
                Err(_) => sleep(Duration::from_millis(500)).await,
            }
        }
    };
    let stranger = timeout(PATIENCE, booted).await.with_context(|| machine.console.log())?;
    for name in ["PWN", "BUS", "KATA", "KATAAGENT"] {
        ensure!(stranger.open(name).await.is_err(), "a stranger reaches {name}");
    }
    drop(stranger);
    // The honest pod comes up in spite of it, with its own kata agent.
    let adaptor = scene.adaptor()?;
    up(&adaptor).await.with_context(|| machine.console.log())?;
    bulk_both_ways(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?, 1 << 20, 11).await?;
    machine.passed();
    Ok(())
}

/// Size of a sector, and of the blocks of the image's hash tree.
const SECTOR: u64 = 512;

/// Offset of the first sector that begins with `magic`, `at` bytes after its start.
fn find(disk: &std::fs::File, at: u64, magic: &[u8]) -> Result<u64> {
    let size = disk.metadata()?.len();
    let mut found = vec![0; magic.len()];
    for sector in (0..size - SECTOR).step_by(4096) {
        disk.read_exact_at(&mut found, sector + at)?;
        if found == magic {
            return Ok(sector);
        }
    }
    bail!("no {magic:?} on the disk")
}

/// Makes dm-verity cover one block less than the file system has. Returns whether the rest of the tree keeps its place, so
/// that the other blocks still verify.
fn shorten(disk: &Path) -> Result<bool> {
    let disk = std::fs::File::options().read(true).write(true).open(disk)?;
    let number = |at| {
        let mut bytes = [0; 8];
        disk.read_exact_at(&mut bytes, at).map(|()| u64::from_le_bytes(bytes))
    };
    let root = find(&disk, 1024, &[0xe2, 0xe1, 0xf5, 0xe0])? + 1024;
    let bits = number(root + 12)? & 0xff;
    let size = (number(root + 36)? & 0xffff_ffff) << bits;
    let verity = find(&disk, 0, b"verity\0\0\x01\0\0\0")?;
    let (data, hash) = (number(verity + 64)? & 0xffff_ffff, number(verity + 64)? >> 32);
    let (blocks, fewer) = (number(verity + 72)?, size / data - 1);
    disk.write_all_at(&fewer.to_le_bytes(), verity + 72)?;
    println!("{fewer} data blocks of {data} bytes instead of {blocks}");
    let levels = |blocks: u64| {
        let above = |level: &u64| Some(level.div_ceil(hash / 32)).filter(|_| *level > 1);
        // Without the lowest level, which comes last.
        std::iter::successors(Some(blocks), above).skip(2).collect::<Vec<_>>()
    };
    Ok(levels(blocks) == levels(fewer))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_is_verified_in_part_never_serves() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("podvm.raw");
    std::fs::copy(artifacts()?.file("podvm.raw")?, &disk)?;
    // If the tree would be read from other places, the first block does not verify.
    let why =
        if shorten(&disk)? { "checking what dm-verity covers" } else { "reading the root's superblock" };
    let scene = scene(false).await?;
    let options = options("verified-in-part", &scene, Boot::Disk(Some(disk)))?;
    let options = MachineOptions { no_reboot: true, ..options };
    let mut machine = Machine::start(MachinePermit::take().await, &options).await?;
    let (status, served) = machine.ends_without_serving().await?;
    ensure!(!served && status.success(), "it served, or qemu failed: {status}");
    let line = machine.says_after(0, "init: FATAL: ").await?;
    ensure!(line.contains(why), "{line}");
    println!("{line}");
    machine.passed();
    Ok(())
}
