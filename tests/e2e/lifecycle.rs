//! Whatever starts first, ends, restarts or is cut off: the pod comes up, and stays the same pod.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::chaos::disk::Disk;
use secure_comms_tests::harness::process::{Child, Signal};
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, says, says_after, scene, up, works,
};
use secure_comms_tests::simulators::guest::{Backend, Rest};
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kbs::{Fault, KbsOptions, LoggedRequest};
use secure_comms_tests::simulators::tcp_proxy::TcpProxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::RwLock;
use tokio::time::{sleep, timeout};

const MIB: u64 = 1024 * 1024;

fn at_kbs(scene: &Scene) -> bool {
    scene.kbs.resource(&scene.keys()).is_some_and(|keys| !keys.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_when_the_agent_is_there_first() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    works(&scene, &scene.adaptor()?).await?;
    ensure!(scene.cdh.most_at_once() <= 1, "two fetches were concurrent");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_when_the_adaptor_is_there_first() -> Result<()> {
    let scene = scene().await?;
    let adaptor = scene.adaptor()?;
    endpoint(&adaptor, "KATAAGENT").await?;
    // Long enough for a second attempt to fail.
    says(&adaptor, "TCP connect").await?;
    let _agent = scene.agent().await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_client_is_served_once_there_is_a_peer() -> Result<()> {
    let scene = scene().await?;
    let adaptor = scene.adaptor()?;
    let kata = endpoint(&adaptor, "KATAAGENT").await?;
    let early = tokio::spawn(async move { bulk_both_ways(kata_client(kata).await?, MIB, 1).await });
    let agent = scene.agent().await?;
    let node = scene.node_inbound;
    let early_there = tokio::spawn(async move { bulk_both_ways(client(node).await?, MIB, 2).await });
    timeout(PATIENCE, early).await???;
    timeout(PATIENCE, early_there).await???;
    drop(agent);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_after_the_agent_is_killed_in_attestation() -> Result<()> {
    let scene = scene().await?;
    scene.kbs.deny(&scene.keys());
    let mut agent = scene.agent().await?;
    let adaptor = scene.adaptor_with_keys_published().await?;
    says(&agent, "getting the keys from the KBS through").await?;
    agent.kill9().await?;
    let _agent = scene.agent().await?;
    scene.kbs.allow(&scene.keys());
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_latched_agent_resumes_without_attestation() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let (fetches, mark) = (scene.cdh.fetches(), adaptor.mark());
    agent.kill9().await?;
    says_after(&adaptor, mark, "channel down").await?;
    let agent = scene.agent().await?;
    says(&agent, "latched earlier in this boot").await?;
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await?;
    ensure!(scene.cdh.fetches() == fetches, "the restarted agent asked the KBS again");
    let ssh = secure_comms_tests::simulators::openssh::OpenSsh::new(scene.ssh)?;
    let refused = ssh.command("attestation", &[], &["true"]).output().await?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("Permission denied"), "{text}");
    ensure!(text.contains("Kubernetes phase"), "the banner does not name the phase: {text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_in_attestation_keeps_its_key() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    scene.kbs.deny(&scene.keys());
    let mut adaptor = scene.adaptor()?;
    says(&adaptor, "attestation: connected").await?;
    says(&adaptor, "keys: attempt").await?;
    let key = scene.pod_key().context("no key was published")?;
    adaptor.kill9().await?;
    scene.kbs.allow(&scene.keys());
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(scene.pod_key().as_ref() == Some(&key), "the restarted adaptor made a new key");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_adaptor_resumes_without_attestation() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let (key, fetches) = (scene.pod_key(), scene.cdh.fetches());
    adaptor.kill9().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(scene.pod_key() == key, "the restarted adaptor made a new key");
    ensure!(scene.cdh.fetches() == fetches, "the VM attested again\n{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_adaptor_is_replaced_by_a_new_one_at_once() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let frozen = scene.adaptor()?;
    works(&scene, &frozen).await?;
    frozen.stop()?;
    // With the same store it would be two adaptors for one pod.
    let mut refused = scene.adaptor()?;
    ensure!(refused.wait_exit(PATIENCE).await?.code() == Some(1), "{}", refused.log());
    ensure!(refused.log().contains("another adaptor (pid "), "{}", refused.log());
    // As when a pod moves to a worker node that has a copy of the keys.
    std::fs::rename(scene.path("store"), scene.path("frozen-store"))?;
    let mut copy = tokio::process::Command::new("cp");
    let copied = copy.arg("-a").arg(scene.path("frozen-store")).arg(scene.path("store")).status().await?;
    ensure!(copied.success(), "copying the store: {copied}");
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(agent.log().contains("replaced by a newer connection of the worker node"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_comes_back_and_its_clients_see_nothing() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let proxy = TcpProxy::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[proxy.address()])?)?;
    works(&scene, &adaptor).await?;
    let mut session = EchoSession::open(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?).await?;
    session.roundtrip(200, 1).await?;
    for _ in 0..3 {
        let mark = adaptor.mark();
        proxy.cut();
        says_after(&adaptor, mark, "channel down").await?;
        says_after(&adaptor, mark, "kubernetes phase up").await?;
        works(&scene, &adaptor).await?;
    }
    timeout(PATIENCE, session.roundtrip(200, 2)).await??;
    timeout(PATIENCE, session.finish()).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_detect_a_half_open_connection() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let proxy = TcpProxy::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[proxy.address()])?)?;
    works(&scene, &adaptor).await?;
    let (mark, agent_mark) = (adaptor.mark(), agent.mark());
    proxy.freeze();
    says_after(&adaptor, mark, "channel down").await?;
    says_after(&agent, agent_mark, "ended").await?;
    proxy.cut();
    proxy.thaw();
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await
}

/// An adaptor with two addresses of the agent.
async fn on_two_proxies(scene: &Scene) -> Result<([TcpProxy; 2], Child)> {
    let proxies = [TcpProxy::to(scene.ssh).await?, TcpProxy::to(scene.ssh).await?];
    let command = scene.adaptor_command(&proxies.each_ref().map(TcpProxy::address))?;
    Ok((proxies, Child::spawn("adaptor", command)?))
}

/// The proxy at whose address the adaptor reports `what`, and the other one.
async fn in_use<'a>(
    adaptor: &Child,
    what: &str,
    proxies: &'a [TcpProxy; 2],
) -> Result<(&'a TcpProxy, &'a TcpProxy)> {
    let line = adaptor.wait_for_text(what, PATIENCE).await?;
    let [one, two] = proxies;
    Ok(if line.contains(&one.address().to_string()) { (one, two) } else { (two, one) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_fails_over_to_another_address() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let (proxies, adaptor) = on_two_proxies(&scene).await?;
    works(&scene, &adaptor).await?;
    let (mut used, mut other) = in_use(&adaptor, "kubernetes phase up at", &proxies).await?;
    for _ in 0..2 {
        let (mark, agent_mark) = (adaptor.mark(), agent.mark());
        used.freeze();
        let anew = format!("channel down: connection to {} timed out", used.address());
        let line = adaptor.wait_from(mark, |line| line.contains(&anew), PATIENCE).await?;
        ensure!(line.contains(&other.address().to_string()), "{line}");
        says_after(&adaptor, mark, "kubernetes phase up").await?;
        says_after(&agent, agent_mark, "replaced by a newer connection of the worker node").await?;
        works(&scene, &adaptor).await?;
        used.cut();
        used.thaw();
        (used, other) = (other, used);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attestation_that_falls_silent_goes_on_at_another_address() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    scene.kbs.set_fault(Fault::Garbage(b"not yet".to_vec()));
    let (proxies, adaptor) = on_two_proxies(&scene).await?;
    let (used, other) = in_use(&adaptor, "attestation: connected to", &proxies).await?;
    says(&adaptor, "keys: attempt").await?;
    // Both addresses attest; what happens at one holds up no other.
    says(&adaptor, &format!("attestation: connected to {}", other.address())).await?;
    used.freeze();
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await?;
    let up = format!("kubernetes phase up at {}", other.address());
    ensure!(adaptor.log().contains(&up), "{}", adaptor.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_of_the_network_costs_no_stream() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let proxy = TcpProxy::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[proxy.address()])?)?;
    works(&scene, &adaptor).await?;
    let mut session = EchoSession::open(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?).await?;
    session.roundtrip(200, 1).await?;
    let (mark, agent_mark) = (adaptor.mark(), agent.mark());
    proxy.freeze();
    // No event shows that the adaptor has tried a new connection; it does within 2 s, and may go over to it afterwards.
    sleep(Duration::from_secs(4)).await;
    proxy.thaw();
    session.roundtrip(200, 2).await?;
    sleep(Duration::from_secs(6)).await;
    session.roundtrip(200, 3).await?;
    for (child, mark) in [(&adaptor, mark), (&agent, agent_mark)] {
        let lines = child.lines();
        let lines: Vec<&str> = lines.iter().skip(mark).map(|line| line.text.as_str()).collect();
        let over = ["session over", "session: ended", "are reset", "is reset"];
        ensure!(lines.iter().all(|line| !over.iter().any(|text| line.contains(text))), "{lines:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_agent_that_wakes_up_is_served_again() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let mark = adaptor.mark();
    agent.stop()?;
    says_after(&adaptor, mark, "channel down").await?;
    agent.cont()?;
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kbs_that_is_down_when_the_vm_attests_is_waited_for() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor_with_keys_published().await?;
    scene.kbs.kill().await?;
    says(&agent, "getting the keys from the KBS").await?;
    says(&adaptor, "keys: attempt").await?;
    scene.kbs.restart().await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kbs_that_is_down_when_the_adaptor_publishes_is_waited_for() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    scene.kbs.kill().await?;
    let adaptor = scene.adaptor()?;
    says(&adaptor, "retrying").await?;
    scene.kbs.restart().await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_keys_are_reported_and_later_good_keys_are_used() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    scene.kbs.set_fault(Fault::Garbage(b"-----BEGIN OPENSSH PRIVATE KEY-----\nnonsense\n".to_vec()));
    let adaptor = scene.adaptor()?;
    let line = adaptor
        .wait_for(|line| line.contains("keys: attempt") && line.contains("private key"), PATIENCE)
        .await?;
    ensure!(!line.contains("nonsense"), "key material in the log: {line}");
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await?;
    ensure!(agent.lines().iter().all(|line| !line.text.contains("nonsense")), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_with_the_key_in_it_is_quoted_in_no_log() -> Result<()> {
    const CANARY: &str = "b3BlbnNzaC1rZXkt";
    let mut scene = scene().await?;
    let answer = Arc::new(RwLock::new(Vec::new()));
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    scene.guest = Rest::start(any, Backend::Bytes(answer.clone())).await?;
    let pem = format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----\n");
    let set = async |text: String| *answer.write().await = text.into_bytes();
    set(format!("HTTP/1.1 500 {CANARY}\r\n\r\n{pem}")).await;
    let agent = scene.debugged_agent().await?;
    let adaptor = scene.adaptor()?;
    let mut mark = 0;
    for (text, cause) in [
        (format!("HTTP/1.1 203 OK\r\n\r\n{pem}"), "status 203"),
        (format!("HTTP/1.1 302 Found\r\nLocation: /{CANARY}\r\n\r\n{pem}"), "status 302"),
        (format!("HTTP/1.1 200 OK\r\nContent-Length: {CANARY}\r\n\r\n"), "Content-Length is not a length"),
        (format!("HTTP/1.1 100 {CANARY}\r\n\r\nHTTP/1.1 200 OK\r\n\r\n{pem}"), "private key"),
    ] {
        set(text).await;
        let line = adaptor
            .wait_from(mark, |line| line.contains("keys: attempt") && line.contains(cause), PATIENCE)
            .await?;
        ensure!(!line.contains("bytes more"), "the end is cut off: {line}");
        mark = adaptor.mark();
    }
    for log in [agent.log(), adaptor.log()] {
        ensure!(!log.contains(CANARY), "{log}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kbs_over_https_works_end_to_end_through_the_tunnel() -> Result<()> {
    let kbs = KbsOptions { https: true, ..KbsOptions::default() };
    let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
    let _agent = scene.agent().await?;
    works(&scene, &scene.adaptor()?).await?;
    ensure!(scene.kbs.attestations() >= 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_by_user_data_need_no_attestation_and_no_kbs() -> Result<()> {
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(scene.kbs.connections() == 0, "a request reached the KBS");
    ensure!(!adaptor.log().contains("attestation"), "{}", adaptor.log());
    ensure!(!agent.log().contains("Attestation phase"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_node_with_another_key_is_refused_by_the_vm() -> Result<()> {
    let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    // The VM has its keys; now the worker node loses its own.
    let output = tokio::process::Command::new(&scene.binaries().adaptor)
        .args(["keygen", "--store"])
        .arg(scene.path("other-store"))
        .output()
        .await?;
    let other = String::from_utf8(output.stdout)?;
    let user_data = std::fs::read_to_string(scene.path("apf.json"))?;
    ensure!(other.starts_with("ssh-ed25519 "), "{other}");
    drop(agent);
    let swapped = swap_worker_node(&user_data, other.lines().next().unwrap())?;
    std::fs::write(scene.path("apf.json"), swapped)?;
    let agent = scene.agent().await?;
    scene.deadline = 10;
    let mut adaptor = scene.adaptor()?;
    let status = adaptor.wait_exit(PATIENCE).await?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(agent.log().contains("not a key of this pod's worker node"), "{}", agent.log());
    ensure!(adaptor.log().contains("rejects this worker node's"), "{}", adaptor.log());
    Ok(())
}

fn swap_worker_node(user_data: &str, line: &str) -> Result<String> {
    use base64ct::{Base64, Encoding};
    let mut json: serde_json::Value = serde_json::from_str(user_data)?;
    json["sc-wn-pub"] = Base64::encode_string(line.as_bytes()).into();
    Ok(json.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_another_host_key_gets_nothing_from_the_adaptor() -> Result<()> {
    let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    let stranger = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    for scene in [&scene, &stranger] {
        scene.write_user_data().await?;
    }
    let agent = stranger.agent().await?;
    scene.deadline = 10;
    let mut adaptor = Child::spawn("adaptor", scene.adaptor_command(&[stranger.ssh])?)?;
    let status = adaptor.wait_exit(PATIENCE).await?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(adaptor.log().contains("host key"), "{}", adaptor.log());
    // The client has not sent a user name.
    ensure!(!agent.log().contains("authenticated") && !agent.log().contains("user '"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_address_does_not_hold_up_a_living_one() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    // Accepts connections and sends nothing, as a middlebox would.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[mute.local_addr()?, scene.ssh])?)?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_says_what_was_last_seen() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 3;
    let mut adaptor = scene.adaptor()?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.code() == Some(1));
    ensure!(
        adaptor.log().contains("refused") && adaptor.log().contains(&scene.ssh.to_string()),
        "{}",
        adaptor.log()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_final_stop_deletes_the_pods_key_everywhere() -> Result<()> {
    for old in [false, true] {
        let kbs = KbsOptions { old, ..KbsOptions::default() };
        let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
        let _agent = scene.agent().await?;
        let mut command = scene.adaptor_command(&[scene.ssh])?;
        command.arg("--delete-on-exit");
        let mut adaptor = Child::spawn("adaptor", command)?;
        works(&scene, &adaptor).await?;
        adaptor.signal(Signal::SIGTERM)?;
        ensure!(adaptor.wait_exit(PATIENCE).await?.success(), "{}", adaptor.log());
        ensure!(!at_kbs(&scene), "the key is still at the KBS");
        let left = files_with(&scene.path("store"), &scene.pod)?;
        ensure!(left.is_empty(), "the store still has {left:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_final_stop_that_the_kbs_cannot_carry_out_keeps_the_key() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 10;
    let _agent = scene.agent().await?;
    let mut command = scene.adaptor_command(&[scene.ssh])?;
    command.arg("--delete-on-exit");
    let mut adaptor = Child::spawn("adaptor", command)?;
    works(&scene, &adaptor).await?;
    scene.kbs.set_fault(Fault::ReadOnly);
    adaptor.signal(Signal::SIGTERM)?;
    let line = adaptor.wait_for_text("the KBS cannot use its storage", PATIENCE).await?;
    ensure!(line.contains("read the KBS's log"), "{line}");
    ensure!(!adaptor.wait_exit(2 * PATIENCE).await?.success(), "it says that the key was deleted");
    ensure!(scene.pod_key().is_some_and(|key| !key.is_empty()), "the key is gone");
    ensure!(!files_with(&scene.path("store"), &scene.pod)?.is_empty(), "the store has forgotten the pod");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_with_deletion_leaves_nothing_behind() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 3;
    let mut command = scene.adaptor_command(&[scene.ssh])?;
    command.arg("--delete-on-exit");
    let mut adaptor = Child::spawn("adaptor", command)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.code() == Some(1), "{}", adaptor.log());
    ensure!(!at_kbs(&scene), "the key is still at the KBS");
    let left = files_with(&scene.path("store"), &scene.pod)?;
    ensure!(left.is_empty(), "the store still has {left:?}");
    Ok(())
}

fn files_with(directory: &std::path::Path, text: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files_with(&path, text)?);
        }
        if path.to_string_lossy().contains(text) {
            found.push(path);
        }
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_streams_finish_and_ends_with_success() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let mut stream = kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?;
    stream.write_all(&(1_u64 << 56).to_be_bytes()).await?;
    stream.write_all(b"half a word").await?;
    let mut echo = [0; 11];
    stream.read_exact(&mut echo).await?;
    ensure!(&echo == b"half a word");
    adaptor.signal(Signal::SIGTERM)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.success(), "{}", adaptor.log());
    agent.signal(Signal::SIGINT)?;
    ensure!(agent.wait_exit(PATIENCE).await?.success(), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_ends_the_agent_with_one_clear_line() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let mut second = Child::spawn("second", scene.agent_command()?)?;
    ensure!(second.wait_exit(PATIENCE).await?.code() == Some(1));
    let lines = second.lines();
    let last = &lines.last().context("it said nothing")?.text;
    ensure!(last.contains(&scene.ssh.to_string()) && last.contains("is another agent running?"), "{last}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bug_ends_leaves_no_core_with_keys_in_it() -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    let scene = scene().await?;
    // Core dumps are allowed, and can be written.
    let unlimited = |command: tokio::process::Command| {
        let command = command.into_std();
        let mut with = tokio::process::Command::new("prlimit");
        with.arg("--core=unlimited").arg(command.get_program()).args(command.get_args());
        with.current_dir(scene.path(""));
        with
    };
    let mut agent = Child::spawn("agent", unlimited(scene.agent_command()?))?;
    let mut adaptor = Child::spawn("adaptor", unlimited(scene.adaptor_command(&[scene.ssh])?))?;
    works(&scene, &adaptor).await?;
    for process in [&mut agent, &mut adaptor] {
        process.signal(Signal::SIGABRT)?;
        let status = process.wait_exit(PATIENCE).await?;
        ensure!(status.signal() == Some(6), "{}: {status}", process.name());
        ensure!(!status.core_dumped(), "{}: its core is in the world", process.name());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_without_a_kbs_resumes_its_pod() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    adaptor.kill9().await?;
    scene.kbs.kill().await?;
    let requests = scene.kbs.requests().len();
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    // The VM has its keys. The KBS is asked for nothing, also once it is there.
    scene.kbs.restart().await?;
    works(&scene, &adaptor).await?;
    ensure!(scene.kbs.requests().len() == requests && !at_kbs(&scene), "{:?}", scene.kbs.requests());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_on_a_full_or_read_only_disk_resumes() -> Result<()> {
    let scene = scene().await?;
    let disk = Disk::mount(scene.path("store"))?;
    let _agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    adaptor.kill9().await?;
    disk.fill()?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    adaptor.kill9().await?;
    disk.empty()?;
    disk.writable(false).await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    says(&adaptor, "read-only").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swallowed_kbs_request_is_retried_before_its_timeout() -> Result<()> {
    let scene = scene().await?;
    scene.kbs.set_fault(Fault::Slow(PATIENCE));
    let _adaptor = scene.adaptor()?;
    let publishes = |request: &LoggedRequest| request.method == "POST";
    let first = scene.kbs.wait_for_request(publishes, PATIENCE).await?.at;
    let again = |request: &LoggedRequest| publishes(request) && request.at > first;
    let second = scene.kbs.wait_for_request(again, PATIENCE).await?.at;
    // Timeout of an answer of a slow KBS: 30 s.
    ensure!(second - first < Duration::from_secs(30), "{:?}", second - first);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_retries_a_swallowed_first_request_early() -> Result<()> {
    // Timeout of the first byte of a slow KBS: 20 s.
    swallowed(KbsOptions::default(), Duration::from_secs(20), true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_retries_a_request_swallowed_after_the_handshake() -> Result<()> {
    // Timeout of a fetch: 75 s.
    swallowed(KbsOptions { https: true, ..KbsOptions::default() }, Duration::from_secs(45), false).await
}

/// The time from the swallowed request to the next one must be below the limit. The agent blames the adaptor only if no
///  byte came through it.
async fn swallowed(kbs: KbsOptions, limit: Duration, blamed: bool) -> Result<()> {
    let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
    let agent = scene.agent().await?;
    scene.kbs.deny(&scene.keys());
    let adaptor = scene.adaptor()?;
    says(&adaptor, "keys: attempt").await?;
    scene.kbs.set_fault(Fault::Slow(PATIENCE));
    let asks = |request: &LoggedRequest| request.path == "/kbs/v0/auth";
    let before = scene.kbs.requests().last().context("no request came")?.at;
    let first = |request: &LoggedRequest| asks(request) && request.at > before;
    let first = scene.kbs.wait_for_request(first, PATIENCE).await?.at;
    let second = |request: &LoggedRequest| asks(request) && request.at > first;
    let second = scene.kbs.wait_for_request(second, PATIENCE).await?.at;
    scene.kbs.allow(&scene.keys());
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await?;
    ensure!(second - first < limit, "{:?}", second - first);
    ensure!(agent.log().contains("brings no answer from it") == blamed, "{}", agent.log());
    Ok(())
}

/// The whole start, many times: the pod must come up every time.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_out_of_twenty_come_up() -> Result<()> {
    for _ in 0..20 {
        let scene = scene().await?;
        let (adaptor, agent) = (scene.adaptor()?, scene.agent().await?);
        timeout(PATIENCE, up(&adaptor)).await.with_context(|| agent.log())??;
    }
    Ok(())
}
