//! An agent whose configuration is not what its adaptor expects gets no client. With the real binaries.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::ffi::OsString;

use anyhow::{Context, Result, bail, ensure};
use base64ct::{Base64, Encoding};
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{
    PATIENCE, Scene, SceneOptions, client, endpoint, free_port, kata_client, says, says_after, up, works,
};
use secure_comms_tests::simulators::kata::KataAgent;
use secure_comms_tests::simulators::kata::client::echo_roundtrip;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

const REFUSED: &str = "the agent is refused, no client was connected to it: ";
const SECRET: &[u8] = b"a secret of the pod";

/// Adds to the value of a flag.
fn with_more(command: &Command, flag: &str, edit: impl Fn(&str) -> String) -> Result<Command> {
    let mut edited = Command::new(command.as_std().get_program());
    let mut arguments = command.as_std().get_args().map(|argument| argument.to_str().unwrap().to_owned());
    let mut found = false;
    while let Some(argument) = arguments.next() {
        let is_flag = argument == flag;
        edited.arg(argument);
        if is_flag {
            found = true;
            edited.arg(edit(&arguments.next().context("a flag without a value")?));
        }
    }
    ensure!(found, "{flag} is not given");
    Ok(edited)
}

/// Starts a VM's agent with another configuration, and an adaptor, and checks that the start fails with these words, that
/// the client of KATAAGENT gets no byte, and that no server of either end is reached.
async fn is_refused(scene: &Scene, agent: Command, words: &[&str]) -> Result<()> {
    let mut adaptor = scene.adaptor()?;
    // Its clients wait from the first moment on, at both ends.
    let mut runtime = client(endpoint(&adaptor, "KATAAGENT").await?).await?;
    runtime.write_all(SECRET).await?;
    let agent = Child::spawn("agent", agent)?;
    says(&agent, "inbound NODESERVICE listens on").await?;
    let context = || format!("{}\n{}", adaptor.log(), agent.log());
    let line = adaptor.wait_for_text(REFUSED, PATIENCE).await.with_context(context)?;
    for word in words {
        ensure!(line.contains(word), "no {word:?} in: {line}");
    }
    says(&agent, "the agent is refused").await?;
    let mut answer = Vec::new();
    // A reset is an end, too.
    drop(timeout(PATIENCE, runtime.read_to_end(&mut answer)).await.context("the runtime waits")?);
    ensure!(answer.is_empty(), "the runtime was answered: {}", answer.escape_ascii());
    let code = adaptor.wait_exit(PATIENCE).await?.code();
    ensure!(code == Some(1), "exit code {code:?}");
    ensure!(!adaptor.log().contains("kubernetes phase up"), "{}", adaptor.log());
    let servers = [&scene.kata, &scene.vm_service, &scene.node_service];
    ensure!(servers.iter().all(|server| server.connections() == 0), "a server was reached");
    Ok(())
}

async fn scene() -> Result<Scene> {
    secure_comms_tests::harness::scene::scene().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kata_agent_at_another_host_is_refused() -> Result<()> {
    let scene = scene().await?;
    let evil = KataAgent::tcp("127.0.0.1:0".parse()?).await?;
    let tag = format!("KUBERNETES_PHASE:KATAAGENT:{}", evil.addr().unwrap());
    let agent =
        with_more(&scene.agent_command()?, "-secure-comms-outbounds", |tags| format!("{tags},{tag}"))?;
    let expected = format!("expected KUBERNETES_PHASE:KATAAGENT:{};", scene.kata_socket.display());
    let fault = format!("its outbound {tag} is not expected in the Kubernetes phase");
    is_refused(&scene, agent, &[&fault, &expected, "add it with --pp-outbounds"]).await?;
    ensure!(evil.connections() == 0, "the attacker's kata agent was reached");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kata_agent_at_another_socket_is_refused() -> Result<()> {
    let scene = scene().await?;
    let evil = KataAgent::unix(scene.path("evil.sock"))?;
    let path = scene.path("evil.sock").display().to_string();
    let agent = with_more(&scene.agent_command()?, "-kata-agent-socket", |_| path.clone())?;
    let fault = format!("its outbound KUBERNETES_PHASE:KATAAGENT:{path} is not expected");
    is_refused(&scene, agent, &[&fault, "add it with --kata-agent-socket"]).await?;
    ensure!(evil.connections() == 0, "the attacker's kata agent was reached");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbound_of_the_attestation_phase_is_refused() -> Result<()> {
    let scene = scene().await?;
    let tag = "ATTESTATION_PHASE:PWN:/run/systemd/private";
    let agent =
        with_more(&scene.agent_command()?, "-secure-comms-outbounds", |tags| format!("{tags},{tag}"))?;
    let fault =
        format!("its outbound {tag} is not expected in the Attestation phase: expected none of this name");
    is_refused(&scene, agent, &[&fault]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbound_in_a_broader_phase_is_refused() -> Result<()> {
    let scene = scene().await?;
    let agent = with_more(&scene.agent_command()?, "-secure-comms-outbounds", |tags| {
        tags.replace("KUBERNETES_PHASE:VMSERVICE", "BOTH_PHASES:VMSERVICE")
    })?;
    is_refused(&scene, agent, &["its outbound BOTH_PHASES:VMSERVICE:", "in the Attestation phase"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unexpected_inbound_is_refused() -> Result<()> {
    let scene = scene().await?;
    let tag = "KUBERNETES_PHASE:LOG:0";
    let agent = with_more(&scene.agent_command()?, "-secure-comms-inbounds", |tags| format!("{tags},{tag}"))?;
    let fault = format!("its inbound {tag} is not expected in the Kubernetes phase");
    is_refused(&scene, agent, &[&fault, "add it with --pp-inbounds"]).await
}

/// The agent opens the streams of its clients by itself: they must wait, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_an_inbound_elsewhere_reaches_nothing() -> Result<()> {
    let scene = scene().await?;
    let port = free_port()?.port();
    let own = scene.node_inbound.port().to_string();
    let agent = with_more(&scene.agent_command()?, "-secure-comms-inbounds", |tags| {
        tags.replace(&format!("NODESERVICE:{own}"), &format!("NODESERVICE:{port}"))
    })?;
    // It waits for the worker node from the first moment on.
    let attacker = tokio::spawn(async move {
        loop {
            if let Ok(mut stream) = client(([127, 0, 0, 1], port).into()).await {
                let mut read = Vec::new();
                // A reset is an end, too.
                drop(stream.write_all(SECRET).await);
                drop(stream.read_to_end(&mut read).await);
                return read;
            }
            tokio::task::yield_now().await;
        }
    });
    let fault = format!("its inbound KUBERNETES_PHASE:NODESERVICE:{port} is not expected");
    is_refused(&scene, agent, &[&fault]).await?;
    attacker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_node_key_in_the_list_that_is_not_ours_is_refused() -> Result<()> {
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    // The real worker node and the attacker are let in.
    let attacker = PodKeys::make(scene.path("apf.json").parent().unwrap(), "attacker").await?;
    let file = scene.path("apf.json");
    let mut user_data: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let own = Base64::decode_vec(user_data["sc-wn-pub"].as_str().unwrap()).unwrap();
    let both = [own.as_slice(), b"\n", attacker.node_public.as_bytes()].concat();
    user_data["sc-wn-pub"] = Base64::encode_string(&both).into();
    std::fs::write(&file, user_data.to_string())?;
    let output =
        Command::new("ssh-keygen").arg("-lf").arg(attacker.node.with_extension("pub")).output().await?;
    let fingerprint = String::from_utf8(output.stdout)?;
    let fingerprint = fingerprint.split_whitespace().nth(1).context("a fingerprint")?.to_owned();
    let fault = format!("it lets in the worker-node key {fingerprint}, which is not this node's");
    is_refused(&scene, scene.agent_command()?, &[&fault, "--worker-node-keys"]).await
}

/// After a start the pod is down, not failed: the VM may be replaced by a right one.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_changes_after_the_start_gets_no_client() -> Result<()> {
    let scene = scene().await?;
    let adaptor = scene.adaptor_with_keys_published().await?;
    let mut agent = scene.agent().await?;
    works(&scene, &adaptor).await.with_context(|| format!("{}\n{}", adaptor.log(), agent.log()))?;
    let served = scene.kata.connections();
    agent.kill9().await?;

    let evil = KataAgent::tcp("127.0.0.1:0".parse()?).await?;
    let tag = format!("KUBERNETES_PHASE:KATAAGENT:{}", evil.addr().unwrap());
    let command =
        with_more(&scene.agent_command()?, "-secure-comms-outbounds", |tags| format!("{tags},{tag}"))?;
    let mark = adaptor.mark();
    let mut agent = Child::spawn("agent", command)?;
    let mut runtime = kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?;
    // Retried, with the same result.
    says_after(&adaptor, mark, &format!("{REFUSED}its outbound {tag} is not expected")).await?;
    let again = adaptor.mark();
    says_after(&agent, 0, "the agent is refused").await?;
    says_after(&adaptor, again, REFUSED).await?;
    agent.kill9().await?;
    ensure!(evil.connections() == 0, "the attacker's kata agent was reached");

    // The runtime has waited for the right one.
    let agent = scene.agent().await?;
    let echo = timeout(PATIENCE, echo_roundtrip(&mut runtime, 200, 1));
    let answered = echo.await.context("the runtime waits")?;
    answered.with_context(|| format!("{}\n{}", adaptor.log(), agent.log()))?;
    ensure!(scene.kata.connections() > served, "another kata agent answered");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_that_the_operator_expects_are_accepted() -> Result<()> {
    let mut scene = scene().await?;
    let more = KataAgent::tcp("127.0.0.1:0".parse()?).await?;
    let tags = format!("KUBERNETES_PHASE:KATAAGENT:{}", more.addr().unwrap());
    scene.agent_outbounds += &format!(",{tags}");
    let agent =
        with_more(&scene.agent_command()?, "-secure-comms-outbounds", |flag| format!("{flag},{tags}"))?;
    let _agent = Child::spawn("agent", agent)?;
    let adaptor = scene.adaptor()?;
    up(&adaptor).await?;
    let mut runtime = kata_client(endpoint(&adaptor, "KATAAGENT").await?).await?;
    timeout(PATIENCE, echo_roundtrip(&mut runtime, 200, 1)).await??;
    ensure!(more.connections() == 1 && scene.kata.connections() == 0);
    Ok(())
}

/// The variables that `user-data` reads say the same to `connect`.
#[tokio::test(flavor = "multi_thread")]
async fn the_tags_of_the_user_data_are_those_that_connect_expects() -> Result<()> {
    let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    let tag = format!("KUBERNETES_PHASE:MORE:{}", scene.vm_service.addr().unwrap());
    let variable = ("SECURE_COMMS_PP_OUTBOUNDS", tag.as_str());
    let mut user_data = Command::new(&scene.binaries().adaptor);
    user_data.args(["user-data", "--pod-id", &scene.pod]).env(variable.0, variable.1);
    user_data.arg("--store").arg(scene.path("store")).arg("--output").arg(scene.path("apf.json"));
    ensure!(user_data.status().await?.success());
    // The tags of the fragment alone.
    let agent = with_more(&scene.agent_command()?, "-secure-comms-outbounds", |_| String::new())?;
    let agent = with_more(&agent, "-secure-comms-inbounds", |tags| {
        tags.split(',').next().unwrap_or_default().to_owned()
    })?;
    let agent = Child::spawn("agent", agent)?;
    says(&agent, "inbound KBS listens on").await?;
    let adaptor = |with_variable: bool| -> Result<Child> {
        let command = scene.adaptor_command(&[scene.ssh])?;
        let mut adaptor = Command::new(command.as_std().get_program());
        let arguments: Vec<OsString> = command.as_std().get_args().map(ToOwned::to_owned).collect();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            if argument == "--pp-inbounds" || argument == "--pp-outbounds" {
                drop(arguments.next());
            } else {
                adaptor.arg(argument);
            }
        }
        if with_variable {
            adaptor.env(variable.0, variable.1);
        }
        Child::spawn("adaptor", adaptor)
    };
    let mut without = adaptor(false)?;
    says(&without, &format!("its outbound {tag} is not expected")).await?;
    if without.wait_exit(PATIENCE).await?.success() {
        bail!("the start succeeded: {}", without.log());
    }
    up(&adaptor(true)?).await
}
