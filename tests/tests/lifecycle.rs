//! Whatever starts first, dies, restarts or is cut off: the pod comes up, and stays the same pod.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::cable::Cable;
use secure_comms_tests::chaos::disk::Disk;
use secure_comms_tests::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::kbs::{Fault, KbsOptions, LoggedRequest};
use secure_comms_tests::process::{Child, Signal};
use secure_comms_tests::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, kata_client, up};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

const MIB: u64 = 1024 * 1024;

async fn scene() -> Result<Scene> {
    Scene::new(SceneOptions::default()).await
}

/// The kata agent answers through the Kubernetes phase, and so do the extra tunnels.
async fn works(scene: &Scene, adaptor: &Child) -> Result<()> {
    up(adaptor).await?;
    let kata = endpoint(adaptor, "KATAAGENT").await?;
    let bulk = async { bulk_both_ways(kata_client(kata).await?, MIB, 11).await };
    timeout(PATIENCE, bulk).await.context("the kata agent hangs")??;
    for address in [endpoint(adaptor, "VMSERVICE").await?, scene.node_inbound] {
        let bulk = async { bulk_both_ways(client(address).await?, MIB, 11).await };
        timeout(PATIENCE, bulk).await.context("traffic hangs")??;
    }
    Ok(())
}

fn private_key(scene: &Scene) -> Option<Vec<u8>> {
    scene.kbs.resource(&format!("default/pp-{}/privateKey", scene.pod))
}

async fn says(process: &Child, text: &str) -> Result<()> {
    process.wait_for_text(text, PATIENCE).await.map(drop)
}

/// Waits for a line that comes after the first `mark` ones.
async fn says_after(process: &Child, mark: usize, text: &str) -> Result<()> {
    process.wait_from(mark, |line| line.contains(text), PATIENCE).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_when_the_agent_is_there_first() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    works(&scene, &scene.adaptor()?).await?;
    ensure!(scene.cdh.most_at_once() <= 1, "two fetches were under way at a time");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_comes_up_when_the_adaptor_is_there_first() -> Result<()> {
    let scene = scene().await?;
    let adaptor = scene.adaptor()?;
    endpoint(&adaptor, "KATAAGENT").await?;
    // Long enough to meet nobody: a second try has failed.
    says(&adaptor, "TCP connect").await?;
    let _agent = scene.agent().await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_comes_before_there_is_a_peer_is_served_once_there_is() -> Result<()> {
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
async fn an_agent_killed_during_attestation_starts_over_and_the_pod_comes_up() -> Result<()> {
    let scene = scene().await?;
    scene.kbs.deny("default/sshclient/publicKey");
    let mut agent = scene.agent().await?;
    let adaptor = scene.adaptor_with_keys_published().await?;
    says(&agent, "getting the keys from the KBS through").await?;
    agent.kill9().await?;
    let _agent = scene.agent().await?;
    scene.kbs.allow("default/sshclient/publicKey");
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_latched_agent_killed_resumes_with_its_keys_asks_nobody_and_attests_no_more() -> Result<()> {
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
    let ssh = secure_comms_tests::openssh::OpenSsh::new(scene.ssh)?;
    let refused = ssh.command("attestation", &[], &["true"]).output().await?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("Permission denied"), "{text}");
    ensure!(text.contains("Kubernetes phase"), "the banner does not name the phase: {text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_during_attestation_resumes_and_makes_no_new_key() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    scene.kbs.deny("default/sshclient/publicKey");
    let mut adaptor = scene.adaptor()?;
    says(&adaptor, "attestation: connected").await?;
    says(&adaptor, "keys: attempt").await?;
    let key = private_key(&scene).context("no key was published")?;
    adaptor.kill9().await?;
    scene.kbs.allow("default/sshclient/publicKey");
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(private_key(&scene).as_ref() == Some(&key), "the restarted adaptor made a new key");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_in_the_kubernetes_phase_resumes_without_attestation() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    let (key, fetches) = (private_key(&scene), scene.cdh.fetches());
    adaptor.kill9().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(private_key(&scene) == key, "the restarted adaptor made a new key");
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
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(agent.log().contains("replaced by a newer one"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_comes_back_and_its_clients_see_a_reset() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let cable = Cable::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[cable.address()])?)?;
    works(&scene, &adaptor).await?;
    let mut session = EchoSession::open(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?).await?;
    session.roundtrip(200, 1).await?;
    for _ in 0..3 {
        let mark = adaptor.mark();
        cable.cut();
        says_after(&adaptor, mark, "channel down").await?;
        says_after(&adaptor, mark, "kubernetes phase up").await?;
        works(&scene, &adaptor).await?;
    }
    ensure!(timeout(PATIENCE, session.roundtrip(200, 2)).await?.is_err(), "a stream outlived its connection");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed_by_both_sides_and_blocks_nobody() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let cable = Cable::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[cable.address()])?)?;
    works(&scene, &adaptor).await?;
    let (mark, agent_mark) = (adaptor.mark(), agent.mark());
    cable.freeze();
    says_after(&adaptor, mark, "channel down").await?;
    says_after(&agent, agent_mark, "ended").await?;
    cable.cut();
    cable.thaw();
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await
}

/// An adaptor with two ways to the agent.
async fn on_two_cables(scene: &Scene) -> Result<([Cable; 2], Child)> {
    let cables = [Cable::to(scene.ssh).await?, Cable::to(scene.ssh).await?];
    let command = scene.adaptor_command(&cables.each_ref().map(Cable::address))?;
    Ok((cables, Child::spawn("adaptor", command)?))
}

/// The cable of which the adaptor says this, and the other.
async fn in_use<'a>(adaptor: &Child, what: &str, cables: &'a [Cable; 2]) -> Result<(&'a Cable, &'a Cable)> {
    let line = adaptor.wait_for_text(what, PATIENCE).await?;
    let [one, two] = cables;
    Ok(if line.contains(&one.address().to_string()) { (one, two) } else { (two, one) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_falls_silent_is_given_up_once_the_agent_answers_at_another_address() -> Result<()>
{
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let (cables, adaptor) = on_two_cables(&scene).await?;
    works(&scene, &adaptor).await?;
    let (mut used, mut other) = in_use(&adaptor, "kubernetes phase up at", &cables).await?;
    for _ in 0..2 {
        let (mark, agent_mark) = (adaptor.mark(), agent.mark());
        used.freeze();
        let anew = format!("channel down: connection to {} timed out", used.address());
        let line = adaptor.wait_from(mark, |line| line.contains(&anew), PATIENCE).await?;
        ensure!(line.contains(&other.address().to_string()), "{line}");
        says_after(&adaptor, mark, "kubernetes phase up").await?;
        says_after(&agent, agent_mark, "replaced by a newer one").await?;
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
    let (cables, adaptor) = on_two_cables(&scene).await?;
    let (used, _) = in_use(&adaptor, "attestation: connected to", &cables).await?;
    says(&adaptor, "keys: attempt").await?;
    let mark = adaptor.mark();
    used.freeze();
    let anew = format!("attestation: connection ended: connection to {} timed out", used.address());
    says_after(&adaptor, mark, &anew).await?;
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_of_the_network_costs_no_stream() -> Result<()> {
    let scene = scene().await?;
    let agent = scene.agent().await?;
    let cable = Cable::to(scene.ssh).await?;
    let adaptor = Child::spawn("adaptor", scene.adaptor_command(&[cable.address()])?)?;
    works(&scene, &adaptor).await?;
    let mut session = EchoSession::open(kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?).await?;
    session.roundtrip(200, 1).await?;
    let (mark, agent_mark) = (adaptor.mark(), agent.mark());
    cable.freeze();
    // Nothing tells when the adaptor has tried a new connection: it does within 2 s. That gets through when the old one does.
    sleep(Duration::from_secs(4)).await;
    cable.thaw();
    session.roundtrip(200, 2).await?;
    // The new connection is there as well now, and must not be let in: it would be after 4 s, as long as the old one was silent.
    sleep(Duration::from_secs(6)).await;
    session.roundtrip(200, 3).await?;
    for (child, mark) in [(&adaptor, mark), (&agent, agent_mark)] {
        let lines = child.lines();
        let lines: Vec<&str> = lines.iter().skip(mark).map(|line| line.text.as_str()).collect();
        ensure!(
            lines.iter().all(|line| !line.contains("channel down") && !line.contains("replaced")),
            "{lines:?}"
        );
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
async fn garbage_keys_are_reported_and_good_ones_that_follow_are_used() -> Result<()> {
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
async fn a_kbs_over_https_works_end_to_end_through_the_tunnel() -> Result<()> {
    let kbs = KbsOptions { https: true, ..KbsOptions::default() };
    let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
    let _agent = scene.agent().await?;
    works(&scene, &scene.adaptor()?).await?;
    ensure!(scene.kbs.attestations() >= 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_by_user_data_need_no_attestation_and_no_kbs() -> Result<()> {
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    ensure!(scene.kbs.connections() == 0, "somebody asked the KBS");
    ensure!(!adaptor.log().contains("attestation"), "{}", adaptor.log());
    ensure!(!agent.log().contains("Attestation phase"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_node_with_another_key_is_refused_by_the_vm() -> Result<()> {
    let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    // The VM has its keys; the worker node now loses its own.
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
    scene.deadline = 5;
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
    stranger.write_user_data().await?;
    let agent = stranger.agent().await?;
    scene.deadline = 5;
    let mut adaptor = Child::spawn("adaptor", scene.adaptor_command(&[stranger.ssh])?)?;
    let status = adaptor.wait_exit(PATIENCE).await?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(adaptor.log().contains("host key"), "{}", adaptor.log());
    // Not even a user name was sent.
    ensure!(!agent.log().contains("authenticated") && !agent.log().contains("user '"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_address_does_not_hold_up_a_living_one() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    // Takes connections and says nothing, as a middlebox would.
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
async fn stopping_for_good_deletes_the_pods_key_at_the_kbs_and_in_the_store() -> Result<()> {
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
        ensure!(private_key(&scene).is_none_or(|key| key.is_empty()), "the key is still at the KBS");
        let left = files_with(&scene.path("store"), &scene.pod)?;
        ensure!(left.is_empty(), "the store still has {left:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_leaves_nothing_behind_where_deletion_was_asked_for() -> Result<()> {
    let mut scene = scene().await?;
    scene.deadline = 3;
    let mut command = scene.adaptor_command(&[scene.ssh])?;
    command.arg("--delete-on-exit");
    let mut adaptor = Child::spawn("adaptor", command)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.code() == Some(1), "{}", adaptor.log());
    ensure!(private_key(&scene).is_none(), "the key is still at the KBS");
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
    // Where cores are allowed, and can be written.
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
async fn an_adaptor_killed_while_its_kbs_is_away_comes_back_to_its_pod() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let mut adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    adaptor.kill9().await?;
    let key = private_key(&scene).context("no key was published")?;
    scene.kbs.kill().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    // A KBS that comes back and has forgotten everything gets the keys anew.
    scene.kbs.put(&format!("default/pp-{}/privateKey", scene.pod), Vec::new())?;
    scene.kbs.restart().await?;
    scene.kbs.wait_for_request(|request| request.path.ends_with("/privateKey"), PATIENCE).await?;
    says(&adaptor, "privateKey: published").await?;
    ensure!(private_key(&scene) == Some(key));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_killed_while_its_disk_is_full_or_read_only_comes_back_to_its_pod() -> Result<()> {
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
async fn a_request_that_the_kbs_swallowed_is_made_again_long_before_it_is_given_up_for_slow() -> Result<()> {
    let scene = scene().await?;
    scene.kbs.set_fault(Fault::Slow(PATIENCE));
    let _adaptor = scene.adaptor()?;
    let publishes = |request: &LoggedRequest| request.method == "POST";
    let first = scene.kbs.wait_for_request(publishes, PATIENCE).await?.at;
    let again = |request: &LoggedRequest| publishes(request) && request.at > first;
    let second = scene.kbs.wait_for_request(again, PATIENCE).await?.at;
    // A slow KBS gets 30 s for its answer, later.
    ensure!(second - first < Duration::from_secs(30), "{:?}", second - first);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_first_question_the_kbs_swallowed_asks_again_long_before_it_gives_up_for_slow()
-> Result<()> {
    // A slow KBS gets 20 s for its first byte, later.
    swallowed(KbsOptions::default(), Duration::from_secs(20), true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_question_the_kbs_swallowed_after_the_tls_handshake_asks_again_long_before_a_fetch_ends()
-> Result<()> {
    // A fetch gets 75 s.
    swallowed(KbsOptions { https: true, ..KbsOptions::default() }, Duration::from_secs(45), false).await
}

/// The time from the question that the KBS swallows to the next one must be below the limit. The adaptor is blamed for it only where it
/// brought nothing at all.
async fn swallowed(kbs: KbsOptions, limit: Duration, blamed: bool) -> Result<()> {
    let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
    let agent = scene.agent().await?;
    scene.kbs.deny("default/sshclient/publicKey");
    let adaptor = scene.adaptor()?;
    says(&adaptor, "keys: attempt").await?;
    scene.kbs.set_fault(Fault::Slow(PATIENCE));
    let asks = |request: &LoggedRequest| request.path == "/kbs/v0/auth";
    let before = scene.kbs.requests().last().context("nobody has asked")?.at;
    let first = |request: &LoggedRequest| asks(request) && request.at > before;
    let first = scene.kbs.wait_for_request(first, PATIENCE).await?.at;
    let second = |request: &LoggedRequest| asks(request) && request.at > first;
    let second = scene.kbs.wait_for_request(second, PATIENCE).await?.at;
    scene.kbs.allow("default/sshclient/publicKey");
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await?;
    ensure!(second - first < limit, "{:?}", second - first);
    ensure!(agent.log().contains("brings no answer from it") == blamed, "{}", agent.log());
    Ok(())
}

/// The whole start, many times over: it must come up every time.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_out_of_twenty_come_up() -> Result<()> {
    for _ in 0..20 {
        let scene = scene().await?;
        let (adaptor, agent) = (scene.adaptor()?, scene.agent().await?);
        timeout(PATIENCE, up(&adaptor)).await.with_context(|| agent.log())??;
    }
    Ok(())
}
