//! The pod's keys at the KBS: one resource, which is there only while the VM needs it, and which nothing can be mixed with.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::stranger::Stranger;
use secure_comms_tests::harness::process::{Child, Signal};
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, endpoint, kata_client, says, says_after, scene, up, works,
};
use secure_comms_tests::simulators::kata::client::bulk_both_ways;
use secure_comms_tests::simulators::kbs::{Fault, KbsOptions, LoggedRequest};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const GONE: &str = "the VM has its keys: deleted from the KBS";
const NOT_DELETED: &str = "the pod's key could not be deleted from the KBS: ";

fn is_at_kbs(scene: &Scene) -> bool {
    scene.kbs.resource(&scene.keys()).is_some_and(|keys| !keys.is_empty())
}

/// Every path under which a version of the adaptor has published a private key.
fn secret_paths(scene: &Scene) -> [String; 2] {
    [scene.keys(), format!("default/pp-{}/privateKey", scene.pod)]
}

/// What a container does: `curl http://127.0.0.1:8006/cdh/resource/<path>`. Returns the whole answer.
async fn curl(guest: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(guest).await?;
    let request = format!("GET /cdh/resource/{path} HTTP/1.1\r\nHost: {guest}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Checks that no container can read the pod's key.
async fn no_container_reads_it(scene: &Scene) -> Result<()> {
    for path in secret_paths(scene) {
        let answer = curl(scene.guest.addr(), &path).await?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        // A KBS that cannot delete has emptied it.
        let is_empty = scene.kbs.is_old() && body.is_empty();
        ensure!(!head.starts_with("HTTP/1.1 200 ") || is_empty, "a container read {path}: {head}");
    }
    Ok(())
}

/// The first client is here before the pod is. Once it is served it behaves as a container.
#[tokio::test(flavor = "multi_thread")]
async fn no_container_ever_reads_the_pods_key() -> Result<()> {
    for old in [false, true] {
        // An old KBS cannot delete, so that the resource is emptied: the guest gets nothing.
        let kbs = KbsOptions { old, ..KbsOptions::default() };
        let scene = Scene::new(SceneOptions { kbs, ..SceneOptions::default() }).await?;
        let adaptor = scene.adaptor_with_keys_published().await?;
        ensure!(is_at_kbs(&scene), "the keys were never published: this test is none");
        let kata = endpoint(&adaptor, "KATAAGENT").await?;
        let first = tokio::spawn(async move { bulk_both_ways(kata_client(kata).await?, 1, 1).await });
        let agent = scene.agent().await?;
        timeout(PATIENCE, first).await.with_context(|| agent.log())???;
        no_container_reads_it(&scene).await.context("as the first client was served")?;
        works(&scene, &adaptor).await?;
        no_container_reads_it(&scene).await.context("later")?;
        says(&adaptor, GONE).await?;
    }
    Ok(())
}

/// One in the middle between the adaptor and the KBS of its tunnel. It can't read the pod's keys, which Trustee encrypts
/// for the TEE, so it lets them pass. It answers for the worker-node keys itself: those of the real one, and its own.
struct Forger {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    lines: Arc<Mutex<String>>,
    serving: JoinHandle<()>,
}

impl Drop for Forger {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Forger {
    async fn before(kbs: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (asked, lines) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<String>>::default());
        let (logged, forged) = (asked.clone(), lines.clone());
        let serving = tokio::spawn(async move {
            while let Ok((victim, _)) = listener.accept().await {
                // Ends when either end does.
                drop(tokio::spawn(forge(victim, kbs, logged.clone(), forged.clone())));
            }
        });
        Ok(Self { address, asked, lines, serving })
    }
}

async fn forge(
    mut victim: TcpStream,
    kbs: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    lines: Arc<Mutex<String>>,
) -> Result<()> {
    let mut head = Vec::new();
    while !head.contains(&b'\n') && victim.read_buf(&mut head).await? > 0 {}
    let request = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    asked.lock().unwrap().push(request.clone());
    if request.contains("sshclient/publicKey") {
        let lines = lines.lock().unwrap().clone();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{lines}", lines.len());
        return Ok(victim.write_all(answer.as_bytes()).await?);
    }
    let mut server = TcpStream::connect(kbs).await?;
    server.write_all(&head).await?;
    copy_bidirectional(&mut victim, &mut server).await?;
    Ok(())
}

/// The arguments of a command with other values after these flags.
fn with_values(command: &Command, binary: &std::path::Path, values: &[(&str, &str)]) -> Command {
    let mut changed = Command::new(binary);
    let mut next = None;
    for arg in command.as_std().get_args() {
        let text = arg.to_str().unwrap();
        changed.arg(next.take().unwrap_or(text));
        next = values.iter().find(|(flag, _)| *flag == text).map(|(_, value)| *value);
    }
    changed
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_worker_node_keys_let_nobody_into_a_pod_that_runs() -> Result<()> {
    let scene = scene().await?;
    let forger = Forger::before(scene.kbs.addr()).await?;
    let (attackers, attackers_line) = OpenSsh::keygen(&scene.path(""), "attacker").await?;
    let command = scene.adaptor_command(&[scene.ssh])?;
    let through = forger.address.to_string();
    let command = with_values(&command, &scene.binaries().adaptor, &[("--kbs", &through)]);
    let adaptor = Child::spawn("adaptor", command)?;
    endpoint(&adaptor, "KATAAGENT").await?;
    // The adaptor shows it to any server that asks for a key.
    let shown = Command::new("ssh-keygen")
        .arg("-yf")
        .arg(scene.path("store").join("worker-node.key"))
        .output()
        .await?;
    let real = String::from_utf8(shown.stdout)?;
    ensure!(real.starts_with("ssh-ed25519 "), "{}", String::from_utf8_lossy(&shown.stderr));
    *forger.lines.lock().unwrap() = format!("{real}{attackers_line}\n");
    let agent = scene.agent().await?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    let asked = forger.asked.lock().unwrap().clone();
    ensure!(
        asked.iter().any(|request| request.contains(&scene.keys())),
        "the keys did not pass it: {asked:?}"
    );
    ensure!(
        !asked.iter().any(|request| request.contains("sshclient")),
        "the VM asked for keys alone: {asked:?}"
    );
    ensure!(Stranger::kubernetes(scene.ssh, &attackers).await.is_err(), "the attacker is in a pod that runs");
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_nodes_that_share_a_kbs_do_not_lock_each_other_out() -> Result<()> {
    let (one, two) = (scene().await?, scene().await?);
    let (address, url) = (one.kbs.addr().to_string(), one.kbs.url());
    let key = one.path("kbs-admin.pem");
    let values =
        [("--kbs", address.as_str()), ("--kbs-url", &url), ("--kbs-admin-key", key.to_str().unwrap())];
    let command = with_values(&two.adaptor_command(&[two.ssh])?, &two.binaries().adaptor, &values);
    let _agents = (one.agent().await?, two.agent().await?);
    // The other node publishes between the publication and the fetch.
    one.kbs.deny(&one.keys());
    let first = one.adaptor()?;
    says(&first, "keys: attempt").await?;
    let second = Child::spawn("adaptor of another node", command)?;
    works(&two, &second).await?;
    one.kbs.allow(&one.keys());
    works(&one, &first).await?;
    works(&two, &second).await?;
    ensure!(one.kbs.resource("default/sshclient/publicKey").is_none(), "a resource is shared");
    let node = |scene: &Scene| std::fs::read(scene.path("store").join("worker-node.key"));
    ensure!(node(&one)? != node(&two)?, "the nodes have one key: this test is none");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebooted_vm_gets_its_keys_again_and_they_go_again() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    for _ in 0..2 {
        ensure!(!is_at_kbs(&scene), "the key is at the KBS while the pod runs");
        let (mark, fetches) = (adaptor.mark(), scene.cdh.fetches());
        agent.kill9().await?;
        std::fs::remove_dir_all(scene.path("agent-state"))?;
        agent = scene.agent().await?;
        says_after(&adaptor, mark, "keys published to the KBS again").await?;
        says_after(&adaptor, mark, GONE).await?;
        says_after(&adaptor, mark, "kubernetes phase up").await?;
        works(&scene, &adaptor).await?;
        ensure!(scene.cdh.fetches() > fetches, "the VM was not rebooted");
        no_container_reads_it(&scene).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_is_served_while_the_key_cannot_be_deleted() -> Result<()> {
    let scene = scene().await?;
    let adaptor = scene.adaptor_with_keys_published().await?;
    let kata = endpoint(&adaptor, "KATAAGENT").await?;
    let first = tokio::spawn(async move { bulk_both_ways(kata_client(kata).await?, 1, 1).await });
    scene.kbs.set_fault(Fault::ReadOnly);
    let _agent = scene.agent().await?;
    let line = adaptor.wait_for_text(NOT_DELETED, PATIENCE).await?;
    ensure!(line.contains("no client is served until it is"), "{line}");
    // Down as a whole, and back with a storage that works.
    scene.kbs.kill().await?;
    let down = |line: &str| line.contains(NOT_DELETED) && line.contains("onnect");
    adaptor.wait_for(down, PATIENCE).await?;
    ensure!(!first.is_finished() && !adaptor.log().contains("kubernetes phase up"), "{}", adaptor.log());
    ensure!(is_at_kbs(&scene), "the key is gone: this test is none");
    scene.kbs.set_fault(Fault::None);
    scene.kbs.restart().await?;
    timeout(PATIENCE, first).await???;
    no_container_reads_it(&scene).await?;
    works(&scene, &adaptor).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_adaptor_deletes_what_a_killed_one_published() -> Result<()> {
    let scene = scene().await?;
    // Killed before there is a VM, and killed between the keys' arrival and their deletion.
    let mut adaptor = scene.adaptor_with_keys_published().await?;
    adaptor.kill9().await?;
    let mut adaptor = scene.adaptor_with_keys_published().await?;
    scene.kbs.set_fault(Fault::ReadOnly);
    let _agent = scene.agent().await?;
    says(&adaptor, NOT_DELETED).await?;
    adaptor.kill9().await?;
    ensure!(is_at_kbs(&scene), "the key is gone: this test is none");
    let adaptor = scene.adaptor()?;
    says(&adaptor, NOT_DELETED).await?;
    ensure!(!adaptor.log().contains("kubernetes phase up"), "{}", adaptor.log());
    scene.kbs.set_fault(Fault::None);
    works(&scene, &adaptor).await?;
    no_container_reads_it(&scene).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kbs_that_is_down_does_not_keep_a_running_pod_from_reconnecting() -> Result<()> {
    let scene = scene().await?;
    let mut agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await?;
    scene.kbs.kill().await?;
    let mark = adaptor.mark();
    agent.kill9().await?;
    let _agent = scene.agent().await?;
    says_after(&adaptor, mark, "kubernetes phase up").await?;
    works(&scene, &adaptor).await
}

/// An adaptor that deletes the pod at its end, whose KBS stores a publication late: the VM was rebooted, and the keys are
/// being published again.
async fn publishing_late(scene: &Scene, late: Duration) -> Result<(Child, Child)> {
    let mut agent = scene.agent().await?;
    let mut command = scene.adaptor_command(&[scene.ssh])?;
    command.arg("--delete-on-exit");
    let adaptor = Child::spawn("adaptor", command)?;
    works(scene, &adaptor).await?;
    scene.kbs.set_fault(Fault::LatePost(late));
    let before = scene.kbs.requests().len();
    agent.kill9().await?;
    std::fs::remove_dir_all(scene.path("agent-state"))?;
    let agent = scene.agent().await?;
    let posts = |request: &LoggedRequest| request.method == "POST" && request.path.contains("/resource/");
    timeout(PATIENCE, async {
        while !scene.kbs.requests()[before..].iter().any(posts) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await?;
    Ok((adaptor, agent))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_stored_late_does_not_outlive_the_stop() -> Result<()> {
    let scene = scene().await?;
    let (mut adaptor, _agent) = publishing_late(&scene, Duration::from_secs(1)).await?;
    adaptor.signal(Signal::SIGTERM)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.success(), "{}", adaptor.log());
    scene.kbs.wait_until_stored().await;
    let requests = scene.kbs.requests();
    let last = requests.iter().rfind(|request| request.path.contains(&scene.keys())).unwrap();
    ensure!(!is_at_kbs(&scene), "the private key is left in the KBS: {requests:?}");
    ensure!(last.method == "DELETE", "{requests:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_says_that_a_publication_has_no_answer() -> Result<()> {
    let scene = scene().await?;
    let (mut adaptor, _agent) = publishing_late(&scene, Duration::from_secs(60)).await?;
    adaptor.signal(Signal::SIGTERM)?;
    ensure!(adaptor.wait_exit(PATIENCE).await?.code() == Some(1), "{}", adaptor.log());
    let line = adaptor.wait_for_text("stop the pod again", PATIENCE).await?;
    ensure!(line.contains(&scene.keys()) && line.contains("may still carry it out"), "{line}");
    ensure!(scene.pod_key().is_some(), "the store has forgotten a pod whose key may be in the KBS");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_comes_up_although_its_keys_are_published_late() -> Result<()> {
    let scene = scene().await?;
    scene.kbs.set_fault(Fault::LatePost(Duration::from_secs(7)));
    // The first request is given up after 5 s, and stored all the same.
    let (adaptor, agent) = (scene.adaptor()?, scene.agent().await?);
    up(&adaptor).await.with_context(|| agent.log())?;
    scene.kbs.wait_until_stored().await;
    no_container_reads_it(&scene).await?;
    works(&scene, &adaptor).await
}
