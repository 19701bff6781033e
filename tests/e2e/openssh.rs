//! Stock OpenSSH as the other end (docs/PROTOCOL.md: plain RFC 4254), and what the agent refuses. With the real agent.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, message};
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::harness::control_channel::ControlChannel;
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, free_port, kata_client};
use secure_comms_tests::simulators::kata::client::{EchoSession, bulk_both_ways};
use secure_comms_tests::simulators::kata::framed::Framed;
use secure_comms_tests::simulators::openssh::OpenSsh;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;

/// A VM with a running agent, and the keys of its pod.
struct Vm {
    scene: Scene,
    keys: PodKeys,
    agent: Child,
}

impl Vm {
    /// In the Kubernetes phase, by user data; `more` is added to apf.json, `outbounds` to the flag.
    async fn kubernetes_with(more: Value, outbounds: &str) -> Result<Self> {
        let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        let keys = PodKeys::make(scene.path("apf.json").parent().unwrap(), "own").await?;
        let mut user_data = keys.user_data()?;
        user_data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(scene.path("apf.json"), user_data.to_string())?;
        scene.more_outbounds = outbounds.to_owned();
        let agent = scene.debugged_agent().await?;
        Ok(Self { scene, keys, agent })
    }

    async fn kubernetes() -> Result<Self> {
        Self::kubernetes_with(json!({}), "").await
    }

    /// In the Attestation phase.
    async fn attestation() -> Result<Self> {
        let scene = Scene::new(SceneOptions::default()).await?;
        let keys = PodKeys::make(scene.path("apf.json").parent().unwrap(), "own").await?;
        let agent = scene.debugged_agent().await?;
        Ok(Self { scene, keys, agent })
    }

    /// The worker node's client: its key, and the pod's host key only.
    fn ssh(&self) -> Result<OpenSsh> {
        OpenSsh::new(self.scene.ssh)?.identity_file(&self.keys.node).host_key(&self.keys.host_public)
    }

    /// A client without a key, for the Attestation phase.
    fn keyless(&self) -> Result<OpenSsh> {
        OpenSsh::new(self.scene.ssh)
    }

    /// Checks that the agent still serves the worker node.
    async fn serves(&self) -> Result<()> {
        let ssh = self.ssh()?;
        let (tunnel, local) = forward(&ssh, "kubernetes", "KATAAGENT").await?;
        timeout(PATIENCE, bulk_both_ways(kata_client(local).await?, 1000, 1)).await??;
        drop(tunnel);
        Ok(())
    }
}

/// Runs `ssh -N -L`; returns once it listens.
async fn forward(ssh: &OpenSsh, user: &str, tunnel: &str) -> Result<(Child, std::net::SocketAddr)> {
    let local = free_port()?;
    let spec = format!("{local}:{tunnel}:1");
    let tunnel = Child::spawn("ssh -L", ssh.command(user, &["-v", "-N", "-L", &spec], &[]))?;
    tunnel.wait_for_text("Entering interactive session", PATIENCE).await?;
    Ok((tunnel, local))
}

/// Result of an `ssh` that has ended.
struct Ended {
    success: bool,
    stderr: String,
}

impl Ended {
    /// Checks that it failed with these words.
    fn refused(&self, words: &[&str]) -> Result<()> {
        ensure!(!self.success, "it was not refused: {}", self.stderr);
        for word in words {
            ensure!(self.stderr.contains(word), "no {word:?} in {}", self.stderr);
        }
        Ok(())
    }
}

async fn run(mut command: Command) -> Result<Ended> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.context("ssh hangs")??;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(Ended { success: output.status.success(), stderr })
}

fn control(ssh: &OpenSsh, user: &str) -> Command {
    ssh.command(user, &["-s"], &["secure-comms"])
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_dash_l_reaches_the_kata_agent_both_ways_and_half_closes() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let (_tunnel, local) = forward(&vm.ssh()?, "kubernetes", "KATAAGENT").await?;
    let mut session = EchoSession::open(kata_client(local).await?).await?;
    timeout(PATIENCE, session.roundtrip(200, 1)).await??;
    timeout(PATIENCE, session.finish()).await??;
    // Half-closed at once after sending, while most of the echo is still in flight.
    timeout(PATIENCE, bulk_both_ways(kata_client(local).await?, 8 * MIB, 2)).await??;
    ensure!(vm.scene.kata.connections() == 2, "{} connections", vm.scene.kata.connections());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_name_is_compared_without_regard_to_case() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let (_tunnel, local) = forward(&vm.ssh()?, "kubernetes", "kataAgent").await?;
    timeout(PATIENCE, bulk_both_ways(kata_client(local).await?, 1000, 1)).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_dash_r_serves_a_worker_node_tunnel() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let spec = format!("NODESERVICE:7:{}", vm.scene.node_service.addr().unwrap());
    let ssh = vm.ssh()?;
    let tunnel = Child::spawn("ssh -R", ssh.command("kubernetes", &["-v", "-N", "-R", &spec], &[]))?;
    tunnel.wait_for_text("remote forward success", PATIENCE).await?;
    timeout(PATIENCE, bulk_both_ways(client(vm.scene.node_inbound).await?, 8 * MIB, 3)).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_dash_r_serves_the_kbs_for_an_attestation() -> Result<()> {
    let vm = Vm::attestation().await?;
    vm.keys.publish(&vm.scene.kbs, &vm.scene.pod)?;
    let keyless = vm.keyless()?;
    // A client that only serves tunnels, to a port without a server, stays connected and disturbs nothing.
    let silent = Child::spawn(
        "ssh -R",
        keyless.command("attestation", &["-v", "-N", "-R", "KBS:8080:127.0.0.1:1"], &[]),
    )?;
    silent.wait_for_text("remote forward success", PATIENCE).await?;
    ensure!(vm.scene.cdh.fetches() == 0, "a peer that drives no pod was asked for its keys");

    let spec = format!("KBS:8080:{}", vm.scene.kbs.addr());
    let mut peer = ControlChannel::open(&keyless, "attestation", &["-R", &spec])?;
    let hello = peer.hears("hello").await?;
    ensure!(hello["phase"] == "attestation" && hello["inbounds"] == json!(["KBS"]), "{hello}");
    let pod = &vm.scene.pod;
    peer.say(
        &json!({"hello": {"version": 1, "pod_id": pod, "inbounds": [], "outbounds": ["KBS"]}}).to_string(),
    )
    .await?;
    peer.hears("upgrade").await?;
    peer.ends().await?;
    ensure!(vm.scene.kbs.attestations() >= 1 && vm.scene.cdh.most_at_once() == 1);
    vm.serves().await?;
    vm.agent.wait_for_text("Kubernetes phase, latched", PATIENCE).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_channel_sends_hello_and_answers_pings() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = vm.ssh()?;
    let closed = Child::spawn("ssh -s", control(&ssh, "kubernetes"))?;
    let line = closed.wait_for(|line| line.starts_with('{'), PATIENCE).await?;
    let hello = &serde_json::from_str::<Value>(&line)?["hello"];
    ensure!(hello["version"] == 2 && hello["phase"] == "kubernetes", "{hello}");
    let names = |key: &str| -> Vec<String> { serde_json::from_value(hello[key].clone()).unwrap() };
    ensure!(names("outbounds").contains(&"KATAAGENT".into()), "{hello}");
    ensure!(names("inbounds").contains(&"NODESERVICE".into()), "{hello}");
    ensure!(hello["instance"].as_str().is_some_and(|id| id.len() == 16), "{hello}");

    let mut open = ControlChannel::open(&ssh, "kubernetes", &[])?;
    open.hears("hello").await?;
    open.say(r#"{"ping":41}"#).await?;
    ensure!(open.hears("pong").await? == 41);
    // Blank lines and messages of a later version are ignored.
    open.say("\n{\"later\":{\"x\":1}}\n{\"ping\":42}").await?;
    ensure!(open.hears("pong").await? == 42);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_garbage_control_line_ends_only_its_connection() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let long = format!("{{\"ping\":{}1}}", " ".repeat(70_000));
    for (line, reason) in [
        ("this is no JSON", "not a control message"),
        (r#"{"ping":"many"}"#, "not a control message"),
        ("[1]", "expected a JSON object"),
        (long.as_str(), "longer than 65536 bytes"),
        (r#"{"hello":{"version":1,"pod_id":"../../etc"}}"#, "pod id"),
    ] {
        let mark = vm.agent.mark();
        let ssh = vm.ssh()?;
        let mut open = ControlChannel::open(&ssh, "kubernetes", &[])?;
        open.hears("hello").await?;
        // Cut in the middle of a long line, ssh can't write all of it.
        drop(open.say(line).await);
        vm.agent.wait_from(mark, |line| line.contains(reason), PATIENCE).await?;
        open.ends().await?;
    }
    vm.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_shells_ptys_and_other_subsystems_are_refused() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = vm.ssh()?;
    for (extra, remote, in_log) in [
        (&[][..], &["id"][..], "exec refused"),
        (&[], &[], "a shell refused"),
        (&["-tt"], &[], "a pty refused"),
        (&["-tt"], &["id"], "a pty refused"),
        (&["-s"], &["sftp"], "a subsystem refused"),
        (&["-s"], &["secure-comms2"], "a subsystem refused"),
    ] {
        let mark = vm.agent.mark();
        let ended = run(ssh.command("kubernetes", extra, remote)).await?;
        ended.refused(&[]).with_context(|| format!("{extra:?} {remote:?}"))?;
        vm.agent.wait_from(mark, |line| line.contains(in_log), PATIENCE).await?;
    }
    vm.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sftp_client_is_refused() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let mut sftp = Command::new("sftp");
    sftp.args(["-F", "none", "-b", "-", "-P", &vm.scene.ssh.port().to_string()]);
    sftp.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
        .arg("-i")
        .arg(&vm.keys.node);
    sftp.arg(format!("kubernetes@{}", vm.scene.ssh.ip())).env_remove("SSH_AUTH_SOCK");
    run(sftp).await?.refused(&["subsystem request failed"])?;
    vm.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_forwarding_gives_no_agent_and_x11_is_refused() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = vm.ssh()?;
    // The stream of the key request, and one to be forwarded.
    let (own, forwarded) = (vm.scene.path("agent.sock"), vm.scene.path("forwarded.sock"));
    let own_listener = UnixListener::bind(&own)?;
    let forwarded_listener = UnixListener::bind(&forwarded)?;
    let closes = tokio::spawn(async move { while own_listener.accept().await.is_ok() {} });
    let option = format!("ForwardAgent={}", forwarded.display());
    let mut command = ssh.command("kubernetes", &["-A", "-o", &option, "-s"], &["secure-comms"]);
    command.env("SSH_AUTH_SOCK", &own);
    let mut open = ControlChannel::start(command)?;
    open.hears("hello").await?;
    vm.agent.wait_for_text("agent forwarding refused", PATIENCE).await?;
    open.say(r#"{"ping":1}"#).await?;
    open.hears("pong").await?;
    ensure!(
        timeout(std::time::Duration::ZERO, forwarded_listener.accept()).await.is_err(),
        "an agent was used"
    );
    closes.abort();

    let mut command =
        ssh.command("kubernetes", &["-X", "-o", "ForwardX11Trusted=yes", "-s"], &["secure-comms"]);
    command.env("DISPLAY", "127.0.0.1:77");
    run(command).await?.refused(&["X11 forwarding request failed"])?;
    vm.agent.wait_for_text("X11 forwarding refused", PATIENCE).await?;
    vm.serves().await
}

/// Opens a stream through `ssh -L` that the agent refuses; returns ssh's message.
async fn refused_open(ssh: &OpenSsh, user: &str, remote: &str) -> Result<String> {
    let local = free_port()?;
    let spec = format!("{local}:{remote}");
    let tunnel = Child::spawn("ssh -L", ssh.command(user, &["-v", "-N", "-L", &spec], &[]))?;
    tunnel.wait_for_text("Entering interactive session", PATIENCE).await?;
    let mut stream = client(local).await?;
    let line = tunnel.wait_for_text("open failed", PATIENCE).await?;
    let end = timeout(PATIENCE, tokio::io::AsyncReadExt::read(&mut stream, &mut [0])).await?;
    ensure!(matches!(end, Ok(0) | Err(_)), "bytes from a refused stream");
    Ok(line)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_names_the_tunnel_the_phase_and_the_cause() -> Result<()> {
    let dead = free_port()?;
    let tags = format!(",KUBERNETES_PHASE:DEAD:{dead},ATTESTATION_PHASE:EARLY:{dead}");
    let vm = Vm::kubernetes_with(json!({}), &tags).await?;
    let ssh = vm.ssh()?;
    let prohibited = "administratively prohibited";
    let no_outbound = "no outbound of this name in this phase";
    for (remote, words) in [
        ("NOPE:1", [prohibited, "tunnel NOPE, Kubernetes phase", no_outbound]),
        ("EARLY:1", [prohibited, "tunnel EARLY, Kubernetes phase", no_outbound]),
        // An inbound does not serve as an outbound.
        ("NODESERVICE:1", [prohibited, "tunnel NODESERVICE, Kubernetes phase", no_outbound]),
        ("127.0.0.1:22", [prohibited, "tunnel 127.0.0.1, Kubernetes phase", no_outbound]),
        ("DEAD:1", ["connect failed", "tunnel DEAD, Kubernetes phase", "Connection refused"]),
        ("/run/docker.sock", [prohibited, "open failed", ""]),
    ] {
        let line = refused_open(&ssh, "kubernetes", remote).await?;
        for word in words {
            ensure!(line.contains(word), "-L {remote}: no {word:?} in {line}");
        }
    }
    vm.serves().await?;

    let vm = Vm::attestation().await?;
    for tunnel in ["KATAAGENT", "VMSERVICE"] {
        let line = refused_open(&vm.keyless()?, "attestation", &format!("{tunnel}:1")).await?;
        let words = format!("{prohibited}: tunnel {tunnel}, Attestation phase: {no_outbound}");
        ensure!(line.contains(&words), "{line}");
    }
    ensure!(vm.scene.kata.connections() == 0 && vm.scene.vm_service.connections() == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_forward_of_a_name_that_is_no_inbound_is_refused() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = vm.ssh()?;
    for spec in ["NOPE:1:127.0.0.1:1", "KATAAGENT:1:127.0.0.1:1", "0:127.0.0.1:1", "/tmp/no.sock:127.0.0.1:1"]
    {
        let ended = run(ssh.command("kubernetes", &["-N", "-R", spec], &[])).await?;
        ended
            .refused(&["remote port forwarding failed"])
            .or_else(|_| ended.refused(&["forwarding failed"]))?;
    }
    vm.agent.wait_for_text("tunnel NOPE, Kubernetes phase", PATIENCE).await?;
    vm.serves().await?;
    let vm = Vm::attestation().await?;
    let spec = "NODESERVICE:1:127.0.0.1:1";
    let keyless = vm.keyless()?;
    let ended = run(keyless.command("attestation", &["-N", "-R", spec], &[])).await?;
    ended.refused(&["remote port forwarding failed"])?;
    vm.agent.wait_for_text("tunnel NODESERVICE, Attestation phase", PATIENCE).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_login_but_the_worker_nodes_key_is_refused() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let other = PodKeys::make(vm.scene.path("x").parent().unwrap(), "other").await?;
    let denied = ["Permission denied"];
    let with = |key: &std::path::Path| anyhow::Ok(OpenSsh::new(vm.scene.ssh)?.identity_file(key));
    let own = vm.ssh()?;
    let mark = vm.agent.mark();
    // The pod's own key is not the worker node's.
    for key in [&other.node, &vm.keys.host] {
        let ssh = with(key)?;
        run(ssh.command("kubernetes", &["-N"], &[])).await?.refused(&denied)?;
    }
    let refusals = "not a key of this pod's worker node";
    vm.agent.wait_from(mark, |line| line.contains(refusals), PATIENCE).await?;
    let rsa = vm.scene.path("rsa");
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f"]).arg(&rsa);
    ensure!(run(keygen).await?.success, "ssh-keygen failed");
    let with_rsa = with(&rsa)?;
    run(with_rsa.command("kubernetes", &["-N"], &[])).await?.refused(&denied)?;
    let password = OpenSsh::new(vm.scene.ssh)?
        .option("PreferredAuthentications=password,keyboard-interactive")
        .option("BatchMode=no");
    let mut command = password.command("kubernetes", &["-N"], &[]);
    command.env("SSH_ASKPASS", "/bin/echo").env("SSH_ASKPASS_REQUIRE", "force");
    run(command).await?.refused(&["Permission denied (publickey)"])?;
    let mut stranger = Stranger::connect(vm.scene.ssh, Answer::Refuses).await?;
    ensure!(!stranger.handle().authenticate_password("kubernetes", "password").await?.success());
    for user in ["root", "", "Kubernetes", "kubernetes\n", "a\"; drop"] {
        let ended = run(own.command(user, &["-N"], &[])).await?;
        ended.refused(&[]).with_context(|| format!("user {user:?}"))?;
    }
    ensure!(vm.scene.kata.connections() == 0);
    vm.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_of_the_other_phase_is_refused_with_a_banner() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = vm.ssh()?;
    let ended = run(ssh.command("attestation", &["-v", "-N"], &[])).await?;
    ended.refused(&["Permission denied", "Secure Comms agent in the Kubernetes phase"])?;
    // No method is left to try, and none has delayed the client.
    ensure!(ended.stderr.contains("Permission denied ()"), "{}", ended.stderr);
    let vm = Vm::attestation().await?;
    let ended =
        run(vm.keyless()?.identity_file(&vm.keys.node).command("kubernetes", &["-v", "-N"], &[])).await?;
    ended.refused(&["Permission denied", "Secure Comms agent in the Attestation phase"])?;
    ensure!(ended.stderr.contains("Permission denied ()"), "{}", ended.stderr);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_host_key_is_refused_by_the_client() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let ssh = OpenSsh::new(vm.scene.ssh)?.identity_file(&vm.keys.node).host_key(&vm.keys.node_public)?;
    run(ssh.command("kubernetes", &["-N"], &[])).await?.refused(&["Host key verification failed"])
}

#[tokio::test(flavor = "multi_thread")]
async fn old_algorithms_are_refused_and_nothing_is_compressed() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    for option in [
        "KexAlgorithms=diffie-hellman-group14-sha256",
        "KexAlgorithms=ecdh-sha2-nistp256",
        "Ciphers=aes128-ctr",
        "Ciphers=aes128-gcm@openssh.com",
        "HostKeyAlgorithms=rsa-sha2-512",
    ] {
        let ssh = vm.ssh()?.option(option);
        let ended = run(ssh.command("kubernetes", &["-N"], &[])).await?;
        ended.refused(&["Unable to negotiate"]).with_context(|| option.to_owned())?;
    }
    // OpenSSH asks for compression and accepts none; a client that insists is refused.
    let ssh = vm.ssh()?.option("Compression=yes");
    let open = Child::spawn("ssh", ssh.command("kubernetes", &["-v", "-N"], &[]))?;
    let line = open.wait_for_text("kex: server->client", PATIENCE).await?;
    ensure!(line.contains("compression: none"), "{line}");
    let mark = vm.agent.mark();
    let zlib = Offer { compression: "zlib@openssh.com,zlib", ..Offer::default() };
    ensure!(Raw::secured(vm.scene.ssh, zlib).await.is_err(), "compression was negotiated");
    vm.agent.wait_from(mark, |line| line.contains("ended: "), PATIENCE).await?;
    // Both ciphers of the profile work, with the only key exchange that the agent shares with Debian's client.
    for cipher in ["aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"] {
        let ssh = vm.ssh()?.option(format!("Ciphers={cipher}"));
        let (_tunnel, local) = forward(&ssh, "kubernetes", "KATAAGENT").await?;
        timeout(PATIENCE, bulk_both_ways(kata_client(local).await?, MIB, 1)).await??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_strict_key_exchange_is_refused_with_advice() -> Result<()> {
    let vm = Vm::attestation().await?;
    let lax = Offer { kex: "curve25519-sha256", ..Offer::default() };
    ensure!(Raw::secured(vm.scene.ssh, lax).await.is_err(), "keys were exchanged");
    let line = vm.agent.wait_for_text("strict key exchange", PATIENCE).await?;
    ensure!(line.contains("CVE-2023-48795"), "{line}");
    Raw::attestation(vm.scene.ssh).await.map(drop)
}

/// Checks that the request gets this refusal.
async fn refuses(raw: &mut Raw, packet: Packet, refusal: u8) -> Result<()> {
    raw.send(&packet).await?;
    // The reply numbers of each kind of request are adjacent.
    let answer = raw.expect(&[refusal - 1, refusal]).await.with_context(|| format!("{packet:?}"))?;
    ensure!(answer[0] == refusal, "{packet:?} was granted");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unserved_requests_are_refused_and_the_connection_stays() -> Result<()> {
    let vm = Vm::attestation().await?;
    let mut raw = Raw::attestation(vm.scene.ssh).await?;
    let opens = [
        Packet::open("x11", 1).string("127.0.0.1").uint(6000),
        Packet::open("forwarded-tcpip", 2).string("KBS").uint(1).string("127.0.0.1").uint(1),
        Packet::open("direct-tcpip", 3).string("KATAAGENT").uint(1).string("127.0.0.1").uint(1),
        Packet::open("direct-tcpip", 3).string("127.0.0.1").uint(22).string("127.0.0.1").uint(1),
        Packet::open("direct-streamlocal@openssh.com", 4).string("/run/docker.sock").string("").uint(0),
        Packet::open("forwarded-streamlocal@openssh.com", 5).string("/run/docker.sock").string(""),
        Packet::open("auth-agent@openssh.com", 6),
        Packet::open("tun@openssh.com", 7).uint(1).uint(1),
        Packet::open("unheard-of", 8).bytes(b"whatever"),
    ];
    for open in opens {
        // russh refuses unknown types twice; the second refusal precedes the reply to the next request.
        refuses(&mut raw, open, message::CHANNEL_OPEN_FAILURE).await?;
        refuses(&mut raw, Packet::global("unheard-of"), message::REQUEST_FAILURE).await?;
    }
    let globals = [
        Packet::global("tcpip-forward").string("KATAAGENT").uint(1),
        Packet::global("tcpip-forward").string("").uint(0),
        Packet::global("tcpip-forward").string("0.0.0.0").uint(8080),
        Packet::global("cancel-tcpip-forward").string("KBS").uint(1),
        Packet::global("streamlocal-forward@openssh.com").string("/run/x.sock"),
        Packet::global("cancel-streamlocal-forward@openssh.com").string("/run/x.sock"),
        Packet::global("hostkeys-prove-00@openssh.com").string("key"),
        Packet::global("unheard-of").bytes(b"whatever"),
    ];
    for global in globals {
        refuses(&mut raw, global, message::REQUEST_FAILURE).await?;
    }
    // Requests on the one session channel are refused, and the channel stays open; a second one is refused.
    raw.send(&Packet::open("session", 9)).await?;
    let opened = raw.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?;
    let id = u32::from_be_bytes(opened[5..9].try_into()?);
    refuses(&mut raw, Packet::open("session", 10), message::CHANNEL_OPEN_FAILURE).await?;
    let requests = [
        Packet::request(id, "env").string("LD_PRELOAD").string("/tmp/x.so"),
        Packet::request(id, "auth-agent-req@openssh.com"),
        Packet::request(id, "window-change").uint(1).uint(1).uint(1).uint(1),
        Packet::request(id, "unheard-of").bytes(b"whatever"),
        Packet::request(id, "pty-req").string("xterm").uint(1).uint(1).uint(0).uint(0).string([0]),
        Packet::request(id, "x11-req").byte(0).string("MIT-MAGIC-COOKIE-1").string("00").uint(0),
        Packet::request(id, "shell"),
        Packet::request(id, "exec").string("id"),
        Packet::request(id, "subsystem").string("sftp"),
        // After another request the channel can't become the control channel.
        Packet::request(id, "subsystem").string("secure-comms"),
    ];
    for request in requests {
        refuses(&mut raw, request, message::CHANNEL_FAILURE).await?;
    }
    // Unexpected data, on channels that do not exist and on one that does, are discarded.
    for channel in [id, 77, u32::MAX] {
        for _ in 0..100 {
            raw.send(&Packet::new(message::CHANNEL_DATA).uint(channel).string([0; 1000])).await?;
        }
    }
    refuses(&mut raw, Packet::global("unheard-of"), message::REQUEST_FAILURE).await?;
    // The tunnels still work.
    raw.send(&Packet::global("tcpip-forward").string("KBS").uint(8080)).await?;
    raw.expect(&[message::REQUEST_SUCCESS]).await?;
    ensure!(vm.scene.kata.connections() == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_node_too_gets_nothing_that_is_not_served() -> Result<()> {
    let vm = Vm::kubernetes().await?;
    let mut node = Stranger::kubernetes(vm.scene.ssh, &vm.keys.node).await?;
    let handle = node.handle();
    let first = handle.channel_open_session().await?;
    ensure!(handle.channel_open_session().await.is_err(), "a second session channel");
    ensure!(handle.channel_open_x11("127.0.0.1", 1).await.is_err(), "x11");
    ensure!(handle.channel_open_direct_streamlocal("/run/docker.sock").await.is_err(), "streamlocal");
    ensure!(handle.channel_open_direct_tcpip("NOPE", 1, "127.0.0.1", 3).await.is_err(), "unknown tunnel");
    ensure!(handle.streamlocal_forward("/run/x.sock").await.is_err(), "streamlocal-forward");
    ensure!(handle.tcpip_forward("NOPE", 1).await.is_err(), "tcpip-forward");
    ensure!(handle.send_global_request("unheard-of", b"", true).await.is_err(), "an unknown global request");
    drop(first);
    let stream = Framed::new(node.open("KATAAGENT").await?);
    timeout(PATIENCE, bulk_both_ways(stream, MIB, 1)).await??;
    vm.serves().await
}
