//! Stock SSH clients of every family reach a tunnel of the Kubernetes phase. With the real agent.
//!
//! Each client gets the worker node's key and the pod's host key, and joins its standard input and output to a stream.
#![allow(clippy::unwrap_used)] // a test's helpers fail as the test does

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const TUNNEL: &str = "ECHO";
const USER: &str = "kubernetes";

/// A VM in the Kubernetes phase with an outbound to a server that returns what it gets, up to the end of the stream.
struct Vm {
    scene: Scene,
    keys: PodKeys,
    _agent: Child,
    echo: JoinHandle<()>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.echo.abort();
    }
}

impl Vm {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        let keys = PodKeys::make(scene.path("apf.json").parent().unwrap(), "own").await?;
        let mut user_data = keys.user_data()?;
        let outbound = format!("KUBERNETES_PHASE:{TUNNEL}:{}", listener.local_addr()?);
        user_data.as_object_mut().unwrap().insert("sc-outbounds".into(), outbound.into());
        std::fs::write(scene.path("apf.json"), user_data.to_string())?;
        let agent = scene.debugged_agent().await?;
        Ok(Self { scene, keys, _agent: agent, echo: tokio::spawn(serve_echo(listener)) })
    }

    /// A file next to the agent's, in a directory that is removed with the scene.
    fn path(&self, name: &str) -> PathBuf {
        self.scene.path(name)
    }

    /// The arguments of every client that is a program of tests/stock-clients.
    fn arguments(&self) -> [String; 6] {
        let key = self.keys.node.display().to_string();
        let (host, port) = (self.scene.ssh.ip().to_string(), self.scene.ssh.port().to_string());
        [host, port, USER.into(), key, self.keys.host_public.clone(), TUNNEL.into()]
    }

    /// Runs the client, and checks that it returns what it is given.
    async fn echoes_through(&self, mut command: Command) -> Result<()> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
        let sent: Vec<u8> = (0..1_000_003_u32).map(|n| (n % 251) as u8).collect();
        let mut stdin = child.stdin.take().unwrap();
        let input = sent.clone();
        // A client that ends early reports why on its standard error, which says more than a broken pipe.
        let feed = tokio::spawn(async move { stdin.write_all(&input).await });
        let output = timeout(PATIENCE, child.wait_with_output()).await.context("the client hangs")??;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {stderr}", output.status);
        feed.await??;
        ensure!(output.stdout == sent, "{} of {} bytes came back: {stderr}", output.stdout.len(), sent.len());
        Ok(())
    }
}

async fn serve_echo(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut all = Vec::new();
            if stream.read_to_end(&mut all).await.is_ok() && stream.write_all(&all).await.is_err() {
                eprintln!("the client left before it got everything");
            }
        });
    }
}

/// A program of tests/stock-clients.
fn stock_client(name: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path = root.join("target/stock-clients").join(name);
    ensure!(path.is_file(), "{} is missing: run tests/stock-clients/build", path.display());
    Ok(path)
}

fn python_client(script: &str) -> Result<Command> {
    let mut command = Command::new(stock_client("python/bin/python")?);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("stock-clients").join(script));
    Ok(command)
}

/// Runs a tool to its end, and returns its standard output.
async fn run(command: &mut Command) -> Result<String> {
    let output = timeout(PATIENCE, command.stdin(Stdio::null()).kill_on_drop(true).output())
        .await
        .context("it hangs")?
        .with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn paramiko_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let mut client = python_client("paramiko_client.py")?;
    client.args(vm.arguments());
    vm.echoes_through(client).await
}

#[tokio::test(flavor = "multi_thread")]
async fn asyncssh_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let mut client = python_client("asyncssh_client.py")?;
    client.args(vm.arguments());
    vm.echoes_through(client).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_go_program_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let mut client = Command::new(stock_client("go-client")?);
    client.args(vm.arguments());
    vm.echoes_through(client).await
}

#[tokio::test(flavor = "multi_thread")]
async fn libssh_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let mut client = Command::new(stock_client("libssh-client")?);
    client.args(vm.arguments());
    vm.echoes_through(client).await
}

#[tokio::test(flavor = "multi_thread")]
async fn putty_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let key = vm.path("node.ppk");
    run(Command::new("puttygen").arg(&vm.keys.node).args(["-O", "private", "-o"]).arg(&key)).await?;
    std::fs::write(vm.path("pod.pub"), &vm.keys.host_public)?;
    let fingerprint =
        run(Command::new("ssh-keygen").args(["-l", "-E", "sha256", "-f"]).arg(vm.path("pod.pub"))).await?;
    let fingerprint = fingerprint.split_whitespace().nth(1).context("no fingerprint")?;
    let mut client = Command::new("plink");
    // Its settings would be in the home directory.
    client
        .env("HOME", vm.path(""))
        .args(["-ssh", "-batch", "-noagent", "-hostkey", fingerprint, "-i"])
        .arg(key);
    client.args(["-P", &vm.scene.ssh.port().to_string(), "-nc", &format!("{TUNNEL}:1")]);
    client.arg(format!("{USER}@{}", vm.scene.ssh.ip()));
    vm.echoes_through(client).await
}

#[tokio::test(flavor = "multi_thread")]
async fn dropbear_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let key = vm.path("node.dropbear");
    run(Command::new("dropbearconvert").args(["openssh", "dropbear"]).arg(&vm.keys.node).arg(&key)).await?;
    let mut client = Command::new("dbclient");
    // Accepts any host key: the only file with known keys that it reads is in the user's home directory, by host alone.
    client.args(["-y", "-y"]).env_remove("SSH_AUTH_SOCK").arg("-i").arg(key);
    client.args(["-p", &vm.scene.ssh.port().to_string(), "-B", &format!("{TUNNEL}:1")]);
    client.arg(format!("{USER}@{}", vm.scene.ssh.ip()));
    vm.echoes_through(client).await
}

/// `ssh -W` that offers the five keys of an ssh-agent before the worker node's.
async fn openssh_with_a_full_agent(vm: &Vm) -> Result<(Command, Child)> {
    let socket = vm.path("ssh-agent");
    let mut command = Command::new("ssh-agent");
    let agent = Child::spawn("ssh-agent", {
        command.args(["-D", "-a"]).arg(&socket);
        command
    })?;
    agent.wait_for_text("SSH_AUTH_SOCK", PATIENCE).await?;
    for n in 0..5 {
        let directory = socket.parent().unwrap();
        let (key, _) = OpenSsh::keygen(directory, &format!("other-{n}")).await?;
        run(Command::new("ssh-add").env("SSH_AUTH_SOCK", &socket).arg("-q").arg(key)).await?;
    }
    let known_hosts = vm.path("known_hosts");
    let (host, port) = (vm.scene.ssh.ip(), vm.scene.ssh.port());
    std::fs::write(&known_hosts, format!("[{host}]:{port} {}\n", vm.keys.host_public))?;
    let mut client = Command::new("ssh");
    client.env("SSH_AUTH_SOCK", &socket).args(["-F", "none", "-v", "-o", "BatchMode=yes"]);
    client.args(["-o", &format!("UserKnownHostsFile={}", known_hosts.display())]);
    client.args(["-p", &port.to_string(), "-W", &format!("{TUNNEL}:1"), "-i"]).arg(&vm.keys.node);
    client.arg(format!("{USER}@{host}"));
    Ok((client, agent))
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_with_a_full_agent_reaches_a_tunnel() -> Result<()> {
    let vm = Vm::start().await?;
    let (client, _agent) = openssh_with_a_full_agent(&vm).await?;
    vm.echoes_through(client).await
}
