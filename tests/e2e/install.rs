//! docs/operations/INSTALL.md, "A node with cloud-api-adaptor": the test does what the document says, word for word, and the
//! first pod runs. The document's KBS is a simulator in the node's namespace, known there by the document's name and ports;
//! so nothing is replaced in the document. For systemd see `install/systemctl`.
#![allow(clippy::unwrap_used)] // the unit tests of a module below

#[path = "install/document.rs"]
mod document;
#[path = "install/machine.rs"]
mod machine;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::pod_runtime::PodRuntime;
use secure_comms_tests::harness::scene::PATIENCE;
use tokio::time::{sleep, timeout};

use machine::Machine;

const DOCUMENT: &str = include_str!("../../docs/operations/INSTALL.md");
const UNIT: &str = include_str!("../../deploy/node/secure-comms-adaptor.service");
const DAEMON_SET: &str = include_str!("../../deploy/node/daemonset.yaml");
/// Blocks of the document that are run: the settings, the service, and the list of pods.
const BLOCKS: usize = 3;
/// As the runtime sends the input of a process.
const BLOCK: u32 = 32 * 1024;
/// Pause of a loop that waits for what has no event.
const POLL: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread")]
async fn the_document_leads_to_the_first_pod() -> Result<()> {
    let blocks = document::marked_blocks(DOCUMENT)?;
    ensure!(blocks.len() >= BLOCKS, "the document has {} blocks to run", blocks.len());
    let (list, install) = blocks.split_last().context("no blocks")?;
    ensure!(list == "secure-comms-adaptor pod list\n", "the last block: {list}");
    let starts = |block: &String| block.contains("systemctl enable --now");
    ensure!(install.iter().filter(|block| starts(block)).count() == 1, "the service is not started once");

    let machine = Machine::new().await?;
    for block in install {
        let said =
            if starts(block) { machine.run_with_notify(block).await? } else { machine.run(block).await? };
        println!("{block}{said}");
    }
    first_pod(&machine, list).await
}

/// "The first pod" of the document: what kubectl does there, the stand-ins for shim and CAA do here.
async fn first_pod(machine: &Machine, list: &str) -> Result<()> {
    let node = &machine.node;
    let before = machine.run(list).await?;
    ensure!(!before.contains("web"), "{before}");
    let shim = node.shim("web")?;
    let agent = shim.create_vm().await?;
    node.start(&shim).await?.started().await?;
    let mut runtime = shim.connect(&agent).await?;
    traffic(&mut runtime).await?;

    let listed = machine.run(list).await?;
    let rows = rows(&listed);
    let id: String = shim.id.chars().take(12).collect();
    ensure!(
        rows.first().is_some_and(|head| *head == ["NAMESPACE", "NAME", "ID", "PHASE", "AGE"]),
        "{listed}"
    );
    ensure!(rows.get(1).is_some_and(|pod| pod.starts_with(&["default", "web", &id, "Up"])), "{listed}");
    ensure!(rows.len() == 2, "{listed}");
    // With a pod it sees how CAA connects.
    let doctor =
        machine.run("secure-comms-adaptor status && secure-comms-adaptor doctor --pod default/web").await?;
    for seen in
        ["pods: 1 (1 Up)", ": 1 pods live, 0 are gone", "ok port 15151 is the service's", "ok it is up"]
    {
        ensure!(doctor.contains(seen), "no {seen}: {doctor}");
    }

    shim.end(runtime).await?;
    node.forgets(&shim.id).await?;
    let empty = async {
        while machine.run(list).await?.contains("web") {
            sleep(POLL).await;
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, empty).await.context("pod list goes on listing it")?
}

fn rows(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(|line| line.split_whitespace().collect()).collect()
}

async fn traffic(runtime: &mut PodRuntime) -> Result<()> {
    for _ in 0..16 {
        runtime.exchange(BLOCK).await?;
    }
    runtime.copy_file(1024 * 1024).await
}

/// Else the test above could not fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_document_with_a_fault_leads_to_an_error() -> Result<()> {
    let blocks = document::marked_blocks(DOCUMENT)?;
    let [settings, service, ..] = &blocks[..] else { anyhow::bail!("too few blocks") };
    let machine = Machine::new().await?;
    let error = machine.run(&settings.replace("kbs-url", "kbs-urk")).await.err().context("no error")?;
    ensure!(format!("{error:#}").contains("kbs-urk"), "{error:#}");

    machine.run(settings).await?;
    std::fs::write(machine.path("etc/secure-comms/kbs-ca.pem"), "no PEM")?;
    let error = machine.run_with_notify(service).await.err().context("the service starts")?;
    let error = format!("{error:#}");
    ensure!(error.contains("it ended with status 1") && error.contains("(--kbs-ca)"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unit_is_well_formed_and_confined() -> Result<()> {
    let is = [
        ("Service", "Type", "notify"),
        ("Service", "NotifyAccess", "main"),
        ("Service", "ExecStart", "/usr/local/bin/secure-comms-adaptor serve"),
        ("Service", "Restart", "always"),
        ("Service", "CapabilityBoundingSet", "CAP_NET_ADMIN"),
        ("Service", "NoNewPrivileges", "yes"),
        ("Service", "ProtectSystem", "strict"),
        ("Service", "ProtectHome", "yes"),
        ("Service", "PrivateTmp", "yes"),
        ("Service", "PrivateDevices", "yes"),
        ("Service", "ProtectKernelModules", "yes"),
        ("Service", "ProtectKernelTunables", "yes"),
        ("Service", "RestrictNamespaces", "yes"),
        ("Service", "RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"),
        ("Service", "MemoryDenyWriteExecute", "yes"),
        ("Service", "SystemCallFilter", "@system-service"),
        ("Service", "UMask", "0077"),
        ("Service", "RuntimeDirectoryPreserve", "yes"),
        ("Install", "WantedBy", "multi-user.target"),
    ];
    for (section, key, value) in is {
        let values = document::values(UNIT, section, key);
        ensure!(values == [value], "{key} of [{section}] is {values:?}, not {value}");
    }
    // systemd's own parser, where it is installed.
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        println!("systemd-analyze is not installed: only the keys above are verified");
        return Ok(());
    }
    let machine = Machine::new().await?;
    let verify = "install -m 0755 target/release/secure-comms-adaptor /usr/local/bin/
        install -m 0644 deploy/node/secure-comms-adaptor.service /etc/systemd/system/
        systemd-analyze verify --man=no /etc/systemd/system/secure-comms-adaptor.service 2>&1";
    let said = machine.run(verify).await?;
    ensure!(!said.contains("secure-comms-adaptor"), "systemd complains: {said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_settings_of_the_daemon_set_are_valid() -> Result<()> {
    let machine = Machine::new().await?;
    let mut files = Vec::new();
    for name in ["adaptor.toml", "init-data.toml", "kbs-ca.pem"] {
        files.push((name, document::literal(DAEMON_SET, name).with_context(|| format!("no {name}"))?));
    }
    machine.mount("etc/secure-comms", &files)?;
    machine.mount("etc/kbs-client", &[("privateKey", machine.node.kbs.admin_key_pem().to_owned())])?;
    let check = "target/release/secure-comms-adaptor config check";
    let error = machine.run(check).await.err().context("it passes without the KBS's CA")?;
    ensure!(format!("{error:#}").contains("kbs-ca"), "{error:#}");

    let ca = machine.path("etc/secure-comms/kbs-ca.pem");
    std::fs::write(&ca, machine.ca_pem())?;
    machine.run(check).await?;
    // The check does look at them.
    let settings = machine.path("etc/secure-comms/adaptor.toml");
    let text = std::fs::read_to_string(&settings)?;
    std::fs::write(&settings, text.replace("kbs-url", "kbs-urk"))?;
    ensure!(machine.run(check).await.is_err(), "an unknown key passes");
    Ok(())
}
