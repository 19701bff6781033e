//! What feeds the agent: user data, which the cloud writes, decides nothing that matters; init-data counts once the keys are
//! here; and the keys come as one resource. With the real binaries.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::{AgentConfig, Control, Hello, PhaseName};
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, free_port, pod_id, says, scene, works,
};
use secure_comms_tests::harness::test_namespace::TestNamespace;
use secure_comms_tests::simulators::kata::KataAgent;
use secure_comms_tests::simulators::openssh::OpenSsh;
use serde_json::{Value, json};
use tokio::process::Command;

/// A scene whose keys come from the KBS, with an apf.json that the cloud wrote.
async fn fed(mode: &'static str, user_data: &Value) -> Result<Scene> {
    let mut scene = scene().await?;
    scene.user_data_mode = mode;
    std::fs::write(scene.path("apf.json"), user_data.to_string())?;
    Ok(scene)
}

async fn keys_of(scene: &Scene, name: &str) -> Result<PodKeys> {
    PodKeys::make(scene.path("x").parent().unwrap(), name).await
}

/// Gives the VM the pod's keys, through a connection in the Attestation phase that leads to the scene's KBS.
async fn attested(scene: &Scene) -> Result<()> {
    let peer = Stranger::attest(scene.ssh, &scene.pod, Answer::Relays(scene.kbs.addr())).await?;
    peer.hears(|message| matches!(message, Control::Upgrade(_))).await?;
    peer.ends().await
}

fn is_hello(message: &Control) -> bool {
    matches!(message, Control::Hello(_))
}

/// The agent's hello to a peer that says none.
async fn hello(peer: &mut Stranger) -> Result<Hello> {
    peer.open_control().await?;
    match peer.hears(is_hello).await? {
        Control::Hello(hello) => Ok(hello),
        other => anyhow::bail!("{other:?} is no hello"),
    }
}

fn config(hello: Hello) -> Result<AgentConfig> {
    hello.config.context("the hello has no config")
}

/// Attack 1a and 1b: sockets of the VM, such as that of PID 1 or of the kata agent, for a stranger before the attestation.
#[tokio::test(flavor = "multi_thread")]
async fn user_data_opens_nothing_of_the_vm_to_a_stranger() -> Result<()> {
    for (mode, warning) in [("none", "'sc-outbounds' ignored"), ("tunnels", "refused")] {
        let mut scene = fed(mode, &json!({})).await?;
        let socket = scene.path("private.sock");
        let private = KataAgent::unix(&socket)?;
        let port = private_port(&scene)?;
        let (socket, kata) = (socket.display(), scene.kata_socket.display());
        let targets = [
            ("ATTESTATION_PHASE", format!("{socket}")),
            ("BOTH_PHASES", format!("{socket}")),
            ("attestation_phase", format!("{socket}")),
            ("Both_Phases", format!("{kata}")),
            ("ATTESTATION_PHASE", format!("{kata}")),
            ("ATTESTATION_PHASE", format!("127.0.0.1:{port}")),
            ("BOTH_PHASES", format!("localhost:{port}")),
            ("BOTH_PHASES", format!("[::1]:{port}")),
            ("ATTESTATION_PHASE", port.to_string()),
            ("KUBERNETES_PHASE", format!("{socket}")),
        ];
        let names: Vec<String> = (0..targets.len()).map(|number| format!("PWN{number}")).collect();
        let tags =
            names.iter().zip(&targets).map(|(name, (phase, target))| format!("{phase}:{name}:{target}"));
        let tags: Vec<String> = tags.collect();
        let names: Vec<&str> = names.iter().map(String::as_str).chain(["KATAAGENT", "kbs"]).collect();
        let more = [format!("ATTESTATION_PHASE:kataagent:{kata}"), format!("BOTH_PHASES:Kbs:{port}")];
        let list = [tags, more.to_vec()].concat().join(",");
        std::fs::write(scene.path("apf.json"), json!({"sc-outbounds": list}).to_string())?;
        scene.deadline = 300;
        let agent = scene.agent().await?;
        let stranger = Stranger::attestation(scene.ssh, Answer::Silent).await?;
        for name in names {
            ensure!(stranger.open(name).await.is_err(), "{mode}: a stranger reaches {name}");
        }
        ensure!(private.connections() == 0 && scene.kata.connections() == 0, "{mode}: reached");
        ensure!(scene.vm_service.connections() == 0, "{mode}: reached");
        says(&agent, warning).await?;
        // The honest pod does not mind.
        let adaptor = scene.adaptor()?;
        works(&scene, &adaptor).await.with_context(|| agent.log())?;
        ensure!(private.connections() == 0, "{mode}: reached");
    }
    Ok(())
}

/// The port of a server in the VM.
fn private_port(scene: &Scene) -> Result<u16> {
    Ok(scene.vm_service.addr().context("it listens on TCP")?.port())
}

/// Attack 1c: the runtime's requests to an attacker's server.
#[tokio::test(flavor = "multi_thread")]
async fn user_data_redirects_neither_the_kata_agent_nor_the_kbs() -> Result<()> {
    let evil = KataAgent::tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let port = evil.addr().context("it listens on TCP")?.port();
    for mode in ["none", "tunnels"] {
        for tag in [
            format!("KUBERNETES_PHASE:KATAAGENT:127.0.0.1:{port}"),
            format!("kubernetes_phase:kataagent:{port}"),
            format!("BOTH_PHASES:KataAgent:localhost:{port}"),
        ] {
            let kbs = free_port()?.port();
            let user_data = json!({
                "sc-outbounds": tag,
                "sc-inbounds": format!("BOTH_PHASES:kbs:{kbs},KUBERNETES_PHASE:KATAAGENT:{kbs}"),
            });
            let scene = fed(mode, &user_data).await?;
            let agent = scene.agent().await?;
            let adaptor = scene.adaptor()?;
            works(&scene, &adaptor).await.with_context(|| format!("{mode}: {tag}\n{}", agent.log()))?;
            ensure!(evil.connections() == 0, "{mode}: {tag}: the attacker has the kata agent's place");
            ensure!(!agent.log().contains(&format!("127.0.0.1:{kbs}")), "{mode}: it listens on {kbs}");
            says(&agent, if mode == "none" { "'sc-outbounds' ignored" } else { "may not move KATAAGENT" })
                .await?;
        }
    }
    Ok(())
}

/// Attack 1d: an image that was built to attest, with keys of the attacker's.
#[tokio::test(flavor = "multi_thread")]
async fn sc_true_with_an_attackers_keys_switches_nothing_on() -> Result<()> {
    for mode in ["none", "tunnels"] {
        let scene = fed(mode, &json!({})).await?;
        let attacker = keys_of(&scene, "attacker").await?;
        let mut user_data = attacker.user_data()?;
        if mode == "tunnels" {
            // It restricts who attests: to the attacker, who then has no keys to give.
            user_data.as_object_mut().unwrap().remove("sc-wn-pub");
        }
        std::fs::write(scene.path("apf.json"), user_data.to_string())?;
        let agent = scene.agent().await?;
        ensure!(Stranger::kubernetes(scene.ssh, &attacker.node).await.is_err(), "{mode}: he is let in");
        for key in ["'sc' ignored", "'sc-pp-prv' ignored"] {
            let line = agent.wait_for_text(key, PATIENCE).await?;
            ensure!(line.contains("-secure-comms-user-data all"), "{line}");
        }
        let adaptor = scene.adaptor()?;
        works(&scene, &adaptor).await.with_context(|| agent.log())?;
        ensure!(Stranger::kubernetes(scene.ssh, &attacker.node).await.is_err(), "{mode}: he is let in");
        ensure!(scene.kbs.attestations() > 0, "{mode}: it has not attested");
        let pem = std::fs::read_to_string(&attacker.host)?;
        let secret = pem.lines().nth(2).unwrap();
        ensure!(!agent.log().contains(secret), "the log has the key");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn user_data_adds_tunnels_within_the_vm_where_the_image_says_so() -> Result<()> {
    let mut scene = scene().await?;
    let namespace = TestNamespace::new("userdata")?;
    scene.user_data_mode = "tunnels";
    scene.pod_namespace = namespace.path().display().to_string();
    let (name, path, service) = (namespace.name(), namespace.path(), private_port(&scene)?);
    let user_data = json!({
        "sc-inbounds": format!(
            "KUBERNETES_PHASE:GOOD:{name}:7001,KUBERNETES_PHASE:BYPATH:{}:7002,KUBERNETES_PHASE:OTHER:x{name}:7003,\
             BOTH_PHASES:EARLY:0,KUBERNETES_PHASE:SOCKET:{}",
            path.display(),
            scene.path("inbound.sock").display()
        ),
        "sc-outbounds": format!(
            "KUBERNETES_PHASE:INSIDE:127.0.0.1:{service},KUBERNETES_PHASE:OUTSIDE:10.213.0.1:{service},\
             KUBERNETES_PHASE:LISTED:10.213.0.2:{service}"
        ),
    });
    std::fs::write(scene.path("apf.json"), user_data.to_string())?;
    scene.agent_flags =
        vec!["-secure-comms-user-data-hosts".into(), format!("db.example,10.213.0.2:{service}")];
    let agent = scene.agent().await?;
    says(&agent, "inbound GOOD listens on").await?;
    for (tag, rule) in [
        ("KUBERNETES_PHASE:BYPATH:", "by its name, in the pod's"),
        ("KUBERNETES_PHASE:OTHER:", "by its name, in the pod's"),
        ("BOTH_PHASES:EARLY:", "give it KUBERNETES_PHASE"),
        ("KUBERNETES_PHASE:SOCKET:", "may name no unix socket"),
        ("KUBERNETES_PHASE:OUTSIDE:", "list the host in -secure-comms-user-data-hosts"),
    ] {
        let line = agent.wait_for_text(tag, PATIENCE).await?;
        ensure!(line.contains("refused") && line.contains(rule), "{line}");
    }
    for refused in ["INSIDE", "LISTED"] {
        ensure!(!agent.log().contains(&format!(":{refused}:")), "{refused} is refused: {}", agent.log());
    }
    Ok(())
}

/// Finding 2: with two fetches, one in the middle lets the pod's key through and forges the worker node's.
#[tokio::test(flavor = "multi_thread")]
async fn the_keys_come_as_one_resource_and_by_one_attestation() -> Result<()> {
    let scene = scene().await?;
    let attacker = keys_of(&scene, "attacker").await?;
    // What he would answer. Nothing asks.
    scene.kbs.put("default/sshclient/publicKey", attacker.node_public.clone())?;
    let agent = scene.agent().await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    let of_vm = |text: &str| scene.kbs.requests().iter().any(|r| r.method == "GET" && r.path.contains(text));
    ensure!(of_vm(&format!("/default/pp-{}/keys", scene.pod)), "no request for the one resource");
    ensure!(!of_vm("sshclient") && !of_vm("privateKey"), "{:?}", scene.kbs.requests());
    ensure!(scene.cdh.fetches() == 1, "{} attestations", scene.cdh.fetches());
    ensure!(Stranger::kubernetes(scene.ssh, &attacker.node).await.is_err(), "the attacker is let in");
    Ok(())
}

/// Half of the resource is not completed from another answer, in any place.
#[tokio::test(flavor = "multi_thread")]
async fn a_resource_without_lines_is_no_reason_to_ask_again() -> Result<()> {
    let scene = scene().await?;
    let (own, attacker) = (keys_of(&scene, "own").await?, keys_of(&scene, "attacker").await?);
    let keys = format!("default/pp-{}/keys", scene.pod);
    scene.kbs.put(&keys, std::fs::read_to_string(&own.host)?)?;
    scene.kbs.put("default/sshclient/publicKey", attacker.node_public.clone())?;
    let agent = scene.agent().await?;
    let peer = Stranger::attest(scene.ssh, &scene.pod, Answer::Relays(scene.kbs.addr())).await?;
    let failed = |message: &Control| matches!(message, Control::Keys(keys) if keys.error.is_some());
    let Control::Keys(progress) = peer.hears(failed).await? else { unreachable!() };
    let error = progress.error.unwrap();
    ensure!(error.contains("no line next to the private key"), "{error}");
    let asked = scene.kbs.requests();
    ensure!(!asked.iter().any(|request| request.path.contains("sshclient")), "{asked:?}");
    // Once it is whole, the next attempt has it.
    own.publish(&scene.kbs, &scene.pod)?;
    peer.hears(|message| matches!(message, Control::Upgrade(_))).await?;
    says(&agent, "Kubernetes phase, fresh").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_separate_resources_need_a_flag_and_are_warned_of() -> Result<()> {
    let mut scene = scene().await?;
    scene.agent_flags = vec!["-secure-comms-separate-resources".into()];
    let own = keys_of(&scene, "own").await?;
    scene.kbs.put(&format!("default/pp-{}/privateKey", scene.pod), std::fs::read_to_string(&own.host)?)?;
    scene.kbs.put("default/sshclient/publicKey", own.node_public.clone())?;
    let agent = scene.agent().await?;
    says(&agent, "-secure-comms-separate-resources: nothing binds").await?;
    attested(&scene).await?;
    drop(Stranger::kubernetes(scene.ssh, &own.node).await?);
    ensure!(!scene.kbs.requests().iter().any(|request| request.path.ends_with("/keys")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_digest_of_init_data_names_the_keys_and_is_in_both_hellos() -> Result<()> {
    let mut scene = scene().await?;
    let file = scene.path("initdata.digest");
    std::fs::write(&file, format!("{}\n", "AB".repeat(48)))?;
    scene.agent_flags = vec!["-secure-comms-init-data-digest".into(), file.display().to_string()];
    let digest = "ab".repeat(32);
    let own = keys_of(&scene, "own").await?;
    // An attacker's VM has another digest; what is there is not for this one.
    let attacker = keys_of(&scene, "attacker").await?;
    attacker.publish(&scene.kbs, &scene.pod)?;
    let text = std::fs::read_to_string(&own.host)? + &own.node_public;
    scene.kbs.put(&format!("default/pp-{}/{digest}", scene.pod), text)?;
    let agent = scene.agent().await?;
    let mut peer = Stranger::attestation(scene.ssh, Answer::Silent).await?;
    let first = hello(&mut peer).await?;
    ensure!(first.init_data.as_deref() == Some(&*digest), "{first:?}");
    ensure!(first.config.is_none(), "a stranger hears the configuration: {first:?}");
    drop(peer);
    attested(&scene).await?;
    let mut node = Stranger::kubernetes(scene.ssh, &own.node).await?;
    let second = hello(&mut node).await?;
    ensure!(second.init_data.as_deref() == Some(&*digest), "{second:?}");
    ensure!(!agent.log().contains("no digest of init-data"), "{}", agent.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubernetes_hello_and_the_status_say_what_the_agent_runs_with() -> Result<()> {
    let mut scene = fed("tunnels", &json!({"sc-outbounds": "kubernetes_phase:extra:7"})).await?;
    scene.user_data_mode = "tunnels";
    let (own, other) = (keys_of(&scene, "own").await?, keys_of(&scene, "other").await?);
    let lines = format!("{}\n{}\n", own.node_public.trim_end(), other.node_public);
    let text = std::fs::read_to_string(&own.host)? + &lines;
    scene.kbs.put(&format!("default/pp-{}/keys", scene.pod), text)?;
    let agent = scene.agent().await?;
    attested(&scene).await?;
    let mut node = Stranger::kubernetes(scene.ssh, &own.node).await?;
    let hello = hello(&mut node).await?;
    ensure!(hello.phase == Some(PhaseName::Kubernetes) && hello.init_data.is_none(), "{hello:?}");
    let config = config(hello)?;
    ensure!(config.pod_id.as_deref() == Some(&*scene.pod) && config.user_data == "tunnels", "{config:?}");
    let fingerprints = [fingerprint(&own).await?, fingerprint(&other).await?];
    ensure!(config.worker_nodes == fingerprints, "{config:?} {fingerprints:?}");
    let service = private_port(&scene)?;
    let kata = scene.kata_socket.display();
    let outbounds = [
        format!("KUBERNETES_PHASE:VMSERVICE:127.0.0.1:{service}"),
        "KUBERNETES_PHASE:extra:127.0.0.1:7".to_owned(),
        format!("KUBERNETES_PHASE:KATAAGENT:{kata}"),
    ];
    ensure!(config.outbounds == outbounds, "{config:?}");
    let (kbs, service) = (scene.kbs_inbound.port(), scene.node_inbound.port());
    let inbounds = [format!("BOTH_PHASES:KBS:{kbs}"), format!("KUBERNETES_PHASE:NODESERVICE:{service}")];
    ensure!(config.inbounds == inbounds, "{config:?}");
    let ssh = OpenSsh::new(scene.ssh)?.identity_file(&own.node).host_key(&own.host_public)?;
    let output = ssh.command("kubernetes", &["-s"], &["secure-comms-status"]).output().await?;
    let status: Value = serde_json::from_slice(&output.stdout).with_context(|| agent.log())?;
    ensure!(status["config"] == serde_json::to_value(&config)?, "{status}");
    ensure!(status["init_data"].is_null(), "{status}");
    Ok(())
}

/// As ssh-keygen has it.
async fn fingerprint(keys: &PodKeys) -> Result<String> {
    let output = Command::new("ssh-keygen").arg("-lf").arg(&keys.node).output().await?;
    let text = String::from_utf8(output.stdout)?;
    text.split(' ').nth(1).map(ToOwned::to_owned).with_context(|| text.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn init_data_adds_tunnels_once_the_keys_are_here() -> Result<()> {
    let mut scene = scene().await?;
    let file = scene.path("secure-comms.toml");
    let service = private_port(&scene)?;
    std::fs::write(
        &file,
        format!("sc-outbounds = 'KUBERNETES_PHASE:EXTRA:{service}'\nsc-pod-id = '{}'", scene.pod),
    )?;
    scene.agent_flags = vec!["-secure-comms-init-data".into(), file.display().to_string()];
    let own = keys_of(&scene, "own").await?;
    own.publish(&scene.kbs, &scene.pod)?;
    let _agent = scene.agent().await?;
    let stranger = Stranger::attestation(scene.ssh, Answer::Silent).await?;
    ensure!(stranger.open("EXTRA").await.is_err(), "a stranger reaches it");
    ensure!(scene.vm_service.connections() == 0);
    attested(&scene).await?;
    let node = Stranger::kubernetes(scene.ssh, &own.node).await?;
    node.open("EXTRA").await?;
    Ok(())
}

/// Finding 5: addresses are used again, and a stranger could have the VM become another pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_one_pod_attests_for_no_other() -> Result<()> {
    let mut scene = scene().await?;
    scene.agent_flags = vec!["-secure-comms-pod-id".into(), scene.pod.clone()];
    let (other, agent) = (pod_id()?, scene.agent().await?);
    let keys = keys_of(&scene, "other").await?;
    keys.publish(&scene.kbs, &other)?;
    let peer = Stranger::attest(scene.ssh, &other, Answer::Relays(scene.kbs.addr())).await?;
    let reason = format!("this VM is pod {}'s, not pod {other}'s", scene.pod);
    peer.ends().await?;
    // The disconnect may come before the bye.
    let bye = |message: &Control| matches!(message, Control::Bye(bye) if bye.reason == reason);
    let disconnect = peer.reason().is_some_and(|text| text.contains(&reason));
    ensure!(disconnect || peer.heard().iter().any(bye), "{:?} {:?}", peer.reason(), peer.heard());
    ensure!(scene.cdh.fetches() == 0, "it fetched another pod's keys");
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())
}

/// As on a worker node without Trustee: the operator says in the image that the pod is not confidential.
#[tokio::test(flavor = "multi_thread")]
async fn keys_by_user_data_need_the_flag_all() -> Result<()> {
    let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    let agent = scene.agent().await?;
    says(&agent, "from the user data, no attestation").await?;
    let adaptor = scene.adaptor()?;
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    drop((adaptor, agent));
    scene.user_data_mode = "none";
    let agent: Child = scene.agent().await?;
    says(&agent, "Attestation phase: waiting for a worker node").await
}
