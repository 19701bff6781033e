//! Logins next to the adaptor's: whom they replace, what the status says, and that every end of a connection has a reason.
//! With the real binaries and the stock OpenSSH client.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::Control;
use secure_comms_tests::attackers::raw::{Offer, Raw, message};
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::harness::control_channel::ControlChannel;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, client, endpoint, free_port, kata_client, pod_id, says, says_after, scene, up, works,
};
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kata::framed::Framed;
use secure_comms_tests::simulators::openssh::OpenSsh;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

const STATUS: &str = "secure-comms-status";

/// A pod that is up, with a stream to the kata agent.
struct Pod {
    scene: Scene,
    agent: Child,
    adaptor: Child,
    stream: EchoSession<Framed<TcpStream>>,
    /// Lines that the adaptor had logged by then.
    mark: usize,
}

impl Pod {
    async fn up() -> Result<Self> {
        let scene = scene().await?;
        let agent = scene.agent().await?;
        let adaptor = scene.adaptor()?;
        works(&scene, &adaptor).await?;
        let kata = endpoint(&adaptor, "KATAAGENT").await?;
        let mut stream = EchoSession::open(kata_client(kata).await?).await?;
        timeout(PATIENCE, stream.roundtrip(200, 1)).await??;
        let mark = adaptor.mark();
        Ok(Self { scene, agent, adaptor, stream, mark })
    }

    /// Checks that the adaptor still has its connection and the stream.
    async fn is_undisturbed(&mut self) -> Result<()> {
        timeout(PATIENCE, self.stream.roundtrip(200, 2)).await?.context("the stream is broken")?;
        let since = &self.adaptor.lines()[self.mark..];
        ensure!(!since.iter().any(|line| line.text.contains("down")), "{}", self.adaptor.log());
        Ok(())
    }
}

/// A client with the worker node's key.
fn worker_node(scene: &Scene) -> Result<OpenSsh> {
    Ok(OpenSsh::new(scene.ssh)?.identity_file(scene.path("store").join("worker-node.key")))
}

async fn run(mut command: Command) -> Result<Output> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    Ok(timeout(PATIENCE, command.output()).await.context("ssh hangs")??)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The status, as `ssh -s` prints it.
async fn status(scene: &Scene) -> Result<Value> {
    let output = run(worker_node(scene)?.command("kubernetes", &["-s"], &[STATUS])).await?;
    ensure!(output.status.code() == Some(0), "{:?}: {}", output.status, stderr(&output));
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.lines().count() == 1 && text.len() <= 128 * 1024, "{text}");
    serde_json::from_str(&text).with_context(|| text.clone())
}

/// Checks that the agent still answers on this control channel.
async fn answers(channel: &mut ControlChannel) -> Result<()> {
    channel.say(&json!({"ping": 7}).to_string()).await?;
    channel.hears("pong").await.map(drop)
}

fn hello(pod: Option<&str>) -> Value {
    json!({"hello": {"version": 1, "pod_id": pod, "inbounds": [], "outbounds": []}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_without_a_hello_replaces_nobody() -> Result<()> {
    let mut pod = Pod::up().await?;
    let ssh = worker_node(&pod.scene)?;
    for (extra, remote) in [
        (&[][..], &["uptime"][..]),
        (&[], &[]),
        (&["-tt"], &[]),
        (&["-s"], &["sftp"]),
        (&["-s"], &["secure-coms"]),
        (&["-N", "-R", "NOPE:1:127.0.0.1:1"], &[]),
    ] {
        let output = run(ssh.command("kubernetes", extra, remote)).await?;
        ensure!(!output.status.success(), "{extra:?} {remote:?} was not refused");
        pod.is_undisturbed().await.with_context(|| format!("{extra:?} {remote:?}"))?;
    }
    let mut scp = Command::new("scp");
    scp.args(["-F", "none", "-B", "-P", &pod.scene.ssh.port().to_string()]);
    scp.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i"]);
    scp.arg(pod.scene.path("store").join("worker-node.key")).env_remove("SSH_AUTH_SOCK");
    scp.args([&format!("kubernetes@{}:/etc/hostname", pod.scene.ssh.ip()), "/dev/null"]);
    ensure!(!run(scp).await?.status.success(), "scp was not refused");
    pod.is_undisturbed().await.context("scp")?;

    // A guest may reach the kata agent, and offers tunnels for nothing while there is an adaptor.
    let (local, service) = (free_port()?, free_port()?);
    let (forward, back) = (format!("{local}:KATAAGENT:1"), format!("NODESERVICE:1:{service}"));
    let options = ["-v", "-N", "-L", &forward, "-R", &back];
    let guest = Child::spawn("ssh -L", ssh.command("kubernetes", &options, &[]))?;
    guest.wait_for_text("remote forward success", PATIENCE).await?;
    timeout(PATIENCE, bulk_both_ways(kata_client(local).await?, 1000, 1)).await??;
    works(&pod.scene, &pod.adaptor).await.context("the guest got the adaptor's streams")?;
    pod.is_undisturbed().await?;
    ensure!(!pod.agent.log().contains("replaced by a newer"), "{}", pod.agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_hello_that_names_this_pod_replaces_the_adaptor() -> Result<()> {
    let mut pod = Pod::up().await?;
    let ssh = worker_node(&pod.scene)?;
    let mut early = ControlChannel::open(&ssh, "kubernetes", &[])?;
    early.hears("hello").await?;
    answers(&mut early).await?;

    // Without a pod's name; and only the first hello counts.
    let mut nameless = ControlChannel::open(&ssh, "kubernetes", &[])?;
    nameless.say(&hello(None).to_string()).await?;
    nameless.say(&hello(Some(&pod.scene.pod)).to_string()).await?;
    answers(&mut nameless).await?;
    pod.is_undisturbed().await.context("a hello without a pod")?;

    for (name, reason) in [(pod_id()?, "this VM is pod "), ("../etc".into(), "pod id")] {
        let mut other = ControlChannel::open(&ssh, "kubernetes", &[])?;
        other.say(&hello(Some(&name)).to_string()).await?;
        let said = other.ends().await?;
        ensure!(said.contains("Received disconnect from") && said.contains(reason), "{said}");
        pod.is_undisturbed().await.with_context(|| format!("a hello of pod {name}"))?;
    }

    // The adaptor comes back by itself, as the newest login.
    let mut newer = ControlChannel::open(&ssh, "kubernetes", &[])?;
    newer.say(&hello(Some(&pod.scene.pod)).to_string()).await?;
    let replaced = "replaced by a newer connection of the worker node, from 127.0.0.1:";
    let line = pod.adaptor.wait_from(pod.mark, |line| line.contains("channel down"), PATIENCE).await?;
    ensure!(line.contains(replaced), "{line}");
    says_after(&pod.adaptor, pod.mark, "kubernetes phase up").await?;
    let said = newer.ends().await?;
    ensure!(said.contains("Received disconnect from") && said.contains(replaced), "{said}");
    works(&pod.scene, &pod.adaptor).await?;

    // However late it says hello, an older login does not replace a newer one.
    let mark = pod.adaptor.mark();
    answers(&mut early).await?;
    early.say(&hello(Some(&pod.scene.pod)).to_string()).await?;
    let said = early.ends().await?;
    ensure!(said.contains("has the place"), "{said}");
    works(&pod.scene, &pod.adaptor).await?;
    ensure!(
        !pod.adaptor.lines()[mark..].iter().any(|line| line.text.contains("down")),
        "{}",
        pod.adaptor.log()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_guests_replace_each_other_and_never_the_adaptor() -> Result<()> {
    let mut pod = Pod::up().await?;
    let key = pod.scene.path("store").join("worker-node.key");
    let mut guests = Vec::new();
    for _ in 0..20 {
        guests.push(Stranger::kubernetes(pod.scene.ssh, &key).await?);
    }
    // A guest that is evicted is still a peer for a moment.
    let settled = async {
        loop {
            let report = status(&pod.scene).await?;
            let peers = report["peers"].as_array().context("peers")?;
            let roles = |role: &str| peers.iter().filter(|peer| peer["role"] == role).count();
            // One for each lane.
            ensure!(matches!(roles("adaptor"), 1..=2), "{report}");
            if roles("guest") <= 8 {
                return Ok(());
            }
        }
    };
    timeout(PATIENCE, settled).await.context("more than 8 guests stay")??;
    // The last of them may not have read its reason yet.
    let evicted = || {
        let is_evicted = |why: String| why == "evicted: connection limit reached";
        guests.iter().filter(|guest| guest.reason().is_some_and(is_evicted)).count()
    };
    let all = async {
        while evicted() < 12 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, all)
        .await
        .with_context(|| format!("{} of 20 were evicted with a reason", evicted()))?;
    pod.is_undisturbed().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_one_json_object_and_replaces_nobody() -> Result<()> {
    let mut pod = Pod::up().await?;
    let report = status(&pod.scene).await?;
    ensure!(report["version"] == env!("CARGO_PKG_VERSION"), "{report}");
    ensure!(report["phase"] == "kubernetes" && report["login"] == "latched", "{report}");
    ensure!(report["pod"] == pod.scene.pod.as_str() && report["uptime_s"].is_u64(), "{report}");
    ensure!(report["instance"].as_str().is_some_and(|id| id.len() == 16), "{report}");
    ensure!(report["pod_network"].is_null() && report["keys"]["attempts"].as_u64() >= Some(1), "{report}");
    ensure!(report["streams"].as_u64() >= Some(1) && report["log"].is_array(), "{report}");
    let session = &report["session"];
    ensure!(session["lanes"][0]["name"] == "main" && session["resumed"].is_u64(), "{report}");
    ensure!(session["streams"].as_u64() >= Some(1) && session["waiting_s"].is_null(), "{report}");
    let adaptor = &report["peers"][0];
    ensure!(adaptor["role"] == "adaptor" && adaptor["pod"] == pod.scene.pod.as_str(), "{report}");
    let tunnel = |kind: &str, name: &str| {
        report[kind].as_array().unwrap().iter().find(|tunnel| tunnel["name"] == name).cloned().unwrap()
    };
    for name in ["KATAAGENT", "VMSERVICE"] {
        ensure!(tunnel("outbounds", name)["answers"] == true, "{report}");
    }
    ensure!(tunnel("inbounds", "NODESERVICE")["served"] == true, "{report}");
    pod.is_undisturbed().await?;

    // Together, more than are put together at a time. As many guests as there may be: none is evicted.
    let reports = statuses(&pod.scene, 7).await;
    for report in reports {
        report?;
    }
    pod.is_undisturbed().await
}

async fn statuses(scene: &Scene, count: usize) -> Vec<Result<()>> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..count {
        let command = worker_node(scene).map(|ssh| (ssh.command("kubernetes", &["-s"], &[STATUS]), ssh));
        tasks.spawn(async move {
            let (command, _ssh) = command?;
            let output = run(command).await?;
            ensure!(output.status.success(), "{}", stderr(&output));
            serde_json::from_slice::<Value>(&output.stdout)?;
            Ok(())
        });
    }
    tasks.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unproven_peer_gets_no_status() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let output = run(OpenSsh::new(scene.ssh)?.command("attestation", &["-s"], &[STATUS])).await?;
    ensure!(!output.status.success() && output.stdout.is_empty(), "{}", stderr(&output));
    ensure!(stderr(&output).contains("subsystem request failed"), "{}", stderr(&output));
    says(&agent, "a subsystem refused").await?;
    let adaptor = scene.adaptor()?;
    up(&adaptor).await?;
    let (stranger, _) = OpenSsh::keygen(&scene.path(""), "stranger").await?;
    let ssh = OpenSsh::new(scene.ssh)?.identity_file(stranger);
    let output = run(ssh.command("kubernetes", &["-s"], &[STATUS])).await?;
    ensure!(!output.status.success() && output.stdout.is_empty(), "{}", stderr(&output));
    Ok(())
}

/// A pod whose VM has a tunnel to a server that is not there, and a client that found out.
async fn complaining() -> Result<(Scene, Child, Child)> {
    let mut scene = scene().await?;
    let dead = free_port()?;
    scene.user_data_mode = "tunnels";
    std::fs::write(
        scene.path("apf.json"),
        json!({"sc-outbounds": format!("KUBERNETES_PHASE:DEAD:{}", dead.port())}).to_string(),
    )?;
    scene.inbounds = "KUBERNETES_PHASE:VMSERVICE:0,KUBERNETES_PHASE:DEAD:0".into();
    scene.agent_outbounds += &format!(",KUBERNETES_PHASE:DEAD:{}", dead.port());
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    // The stream is refused, which resets its client, at times before that has seen its connection. The callers wait for what is
    // said of it.
    if let Ok(mut socket) = client(endpoint(&adaptor, "DEAD").await?).await {
        drop(timeout(PATIENCE, socket.read_to_end(&mut Vec::new())).await.context("the client waits")?);
    }
    Ok((scene, agent, adaptor))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vms_warnings_reach_the_operator() -> Result<()> {
    let (scene, _agent, mut adaptor) = complaining().await?;
    let warning = "VM: refusing a stream: tunnel DEAD, Kubernetes phase: connecting to";
    let line = adaptor.wait_for_text(warning, PATIENCE).await?;
    ensure!(line.contains(&format!("pod {}: ", scene.pod)), "{line}");
    let report = status(&scene).await?;
    let in_report = |line: &Value| {
        line["level"] == "warning" && line["text"].as_str().unwrap().contains("tunnel DEAD, Kubernetes phase")
    };
    ensure!(report["log"].as_array().unwrap().iter().any(in_report), "{report}");
    let dead = report["outbounds"].as_array().unwrap().iter().find(|tunnel| tunnel["name"] == "DEAD");
    ensure!(dead.is_some_and(|dead| dead["answers"] == false && dead["error"].is_string()), "{report}");

    // An adaptor that comes later hears of it too, and a reconnect repeats nothing.
    adaptor.kill9().await?;
    let adaptor = scene.adaptor()?;
    let line = adaptor.wait_for_text(warning, PATIENCE).await?;
    let shown = adaptor.lines().iter().filter(|line| line.text.contains(warning)).count();
    let mark = adaptor.mark();
    let mut newer = ControlChannel::open(&worker_node(&scene)?, "kubernetes", &[])?;
    newer.say(&hello(Some(&scene.pod)).to_string()).await?;
    says_after(&adaptor, mark, "channel down").await?;
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await?;
    let again = adaptor.lines().iter().filter(|line| line.text.contains(warning)).count();
    ensure!(again == shown, "{line} was repeated:\n{}", adaptor.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unproven_peer_hears_no_log() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let stranger = Stranger::attest(scene.ssh, &pod_id()?, Answer::Garbage).await?;
    // The agent warns, and the peer hears of its keys only.
    says(&agent, "warning: getting the keys from the KBS").await?;
    stranger.hears(|message| matches!(message, Control::Keys(_))).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(
        !stranger.heard().iter().any(|message| matches!(message, Control::Log(_))),
        "{:?}",
        stranger.heard()
    );
    Ok(())
}

/// Waits until `ssh` prints why the agent disconnected.
async fn received(ssh: &Child, reason: &str) -> Result<()> {
    let line = ssh.wait_for_text("Received disconnect from", PATIENCE).await?;
    ensure!(line.contains(reason), "{line}: no {reason:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_disconnect_says_its_reason() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    // It offers nothing: it is there until the agent has its keys by another.
    let attester = OpenSsh::new(scene.ssh)?;
    let attester = Child::spawn("ssh", attester.command("attestation", &["-v", "-N"], &[]))?;
    attester.wait_for_text("Entering interactive session", PATIENCE).await?;
    let mut slow = Raw::secured(scene.ssh, Offer::default()).await?;
    let reason = "did not authenticate within 10 s";
    let disconnect = slow.expect(&[message::DISCONNECT]).await?;
    ensure!(String::from_utf8_lossy(&disconnect).contains(reason), "{disconnect:?}");
    says(&agent, &format!("ended: {reason}")).await?;

    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    received(&attester, "the keys are here; come back as user kubernetes").await?;

    let ssh = worker_node(&scene)?;
    let mut garbage = ControlChannel::open(&ssh, "kubernetes", &[])?;
    garbage.say(&json!([1]).to_string()).await?;
    let said = garbage.ends().await?;
    ensure!(said.contains("control line: not a control message: expected a JSON object"), "{said}");
    says(&agent, "ended: control line: not a control message").await?;
    let mut polite = ControlChannel::open(&ssh, "kubernetes", &[])?;
    polite.say(&json!({"bye": {"reason": "lunch\n"}}).to_string()).await?;
    let said = polite.ends().await?;
    ensure!(said.contains("the peer said bye: lunch"), "{said}");

    let guest = Child::spawn("ssh", ssh.command("kubernetes", &["-v", "-N"], &[]))?;
    guest.wait_for_text("Entering interactive session", PATIENCE).await?;
    let mark = adaptor.mark();
    agent.signal(nix::sys::signal::Signal::SIGTERM)?;
    received(&guest, "the agent stops").await?;
    let line = adaptor.wait_from(mark, |line| line.contains("channel down"), PATIENCE).await?;
    ensure!(line.contains("the agent stops"), "{line}");
    agent.wait_exit(PATIENCE).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_attestation_peer_receives_the_reason() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let mut peers = Vec::new();
    for _ in 0..9 {
        peers.push(Stranger::attestation(scene.ssh, Answer::Refuses).await?);
    }
    let reasons = async {
        loop {
            let reason = peers.iter().find_map(Stranger::reason);
            match reason {
                Some(reason) => return reason,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let reason = timeout(PATIENCE, reasons).await.context("no peer was evicted with a reason")?;
    ensure!(reason == "evicted: connection limit reached", "{reason}");
    Ok(())
}
