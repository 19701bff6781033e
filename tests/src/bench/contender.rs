//! Secure Comms, or OpenSSH: connected, with one tunnel from the worker node to the server in the VM.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tokio::process::Command;

use super::load::{self, Load};
use super::place::Place;
use crate::harness::pod_keys::PodKeys;
use crate::harness::process::{Binaries, Child, ensure_built};
use crate::harness::scene::{PATIENCE, free_port, pod_id};
use crate::simulators::openssh::OpenSsh;

/// Cipher of both contenders, so that neither has the faster one: the first choice of Secure Comms.
const CIPHER: &str = "aes256-gcm@openssh.com";
/// An absolute path: sshd executes itself for each connection.
const SSHD: &str = "/usr/sbin/sshd";
/// Pause between attempts to reach a tunnel that is not up yet: short compared with what is measured.
const AGAIN: Duration = Duration::from_micros(500);

/// The two contenders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// Secure Comms: the adaptor and the agent.
    Ours,
    /// `ssh` and `sshd`.
    OpenSsh,
}

/// The two programs of a contender, ready to connect.
#[derive(Debug)]
pub(super) struct Prepared {
    who: Who,
    directory: TempDir,
    keys: PodKeys,
    /// The server at the VM's end, which listens.
    server: Child,
    ssh: SocketAddr,
    inbound: SocketAddr,
    kata_inbound: SocketAddr,
    target: SocketAddr,
    pod: String,
}

/// A contender with a working tunnel.
#[derive(Debug)]
pub(super) struct Contender {
    /// Address that clients on the worker node connect to.
    pub inbound: SocketAddr,
    /// The same for the tunnel to the kata agent; it leads to the same server.
    pub kata_inbound: SocketAddr,
    /// Process at the worker node's end.
    pub node: End,
    /// Process at the VM's end that serves this connection.
    pub vm: End,
    // Killed when this is dropped.
    _client: Child,
    _openssh: OpenSsh,
    _prepared: Prepared,
}

/// A process at one end.
#[derive(Clone, Copy, Debug)]
pub(super) struct End(i32);

impl Prepared {
    /// Makes keys and starts the server's side in the VM; `target` is the end of the tunnel in the VM.
    ///
    /// # Errors
    /// If a program is not installed or does not start.
    pub(super) async fn new(who: Who, place: &Place, target: SocketAddr) -> Result<Self> {
        // Short: with the pod's id, the path of a socket below it may have 107 bytes.
        let directory = tempfile::Builder::new().prefix("sc-bench-").tempdir()?;
        let (inbound, kata_inbound) = (free_port()?, free_port()?);
        let ssh = SocketAddr::new(place.vm(), free_port()?.port());
        let pod = pod_id()?;
        let keys = PodKeys::make(directory.path(), "bench").await?;
        let server = match who {
            Who::Ours => agent(place, directory.path(), ssh, target, &pod).await?,
            Who::OpenSsh => sshd(place, directory.path(), ssh, &keys).await?,
        };
        Ok(Self { who, directory, keys, server, ssh, inbound, kata_inbound, target, pod })
    }

    /// Address that its server listens on.
    #[must_use]
    pub(super) fn ssh(&self) -> SocketAddr {
        self.ssh
    }

    /// Starts the client with an address of the server, and waits until the tunnel works. Returns also when the process
    /// started and when the first answer came.
    ///
    /// # Errors
    /// If the tunnel does not work in time.
    pub(super) async fn connect(self, place: &Place, ssh: SocketAddr) -> Result<(Contender, Range<Instant>)> {
        let openssh = self.openssh(ssh)?;
        let command = match self.who {
            Who::Ours => self.adaptor(ssh).await?,
            Who::OpenSsh => {
                let forward = |from: SocketAddr| format!("{}:{}", from.port(), self.target);
                let [bulk, kata] = [self.inbound, self.kata_inbound].map(forward);
                openssh.command("root", &["-N", "-L", &bulk, "-L", &kata], &[])
            }
        };
        let inbound = self.inbound;
        let began = Instant::now();
        let client = Child::spawn("client", place.on_node(command))?;
        let carried = place.at_node(move || first_answer(inbound)).await;
        let carried = carried.with_context(|| format!("{}\n{}", client.log(), self.server.log()))?;
        let node = End(client.pid());
        let vm = match self.who {
            Who::Ours => End(self.server.pid()),
            Who::OpenSsh => End(only_child(self.server.pid())?),
        };
        let kata_inbound = self.kata_inbound;
        let contender = Contender {
            inbound,
            kata_inbound,
            node,
            vm,
            _client: client,
            _openssh: openssh,
            _prepared: self,
        };
        Ok((contender, began..carried))
    }

    async fn adaptor(&self, ssh: SocketAddr) -> Result<Command> {
        let mut command = Command::new(&ensure_built().await?.adaptor);
        command.args(["connect", "--no-trustee", "--pod-id", &self.pod, "--address", &ssh.to_string()]);
        command.arg("--store").arg(self.path("store"));
        let [bulk, kata] = [self.inbound, self.kata_inbound].map(|inbound| inbound.port());
        command.args([
            "--inbounds",
            &format!("KUBERNETES_PHASE:BENCH:{bulk},KUBERNETES_PHASE:KATAAGENT:{kata}"),
        ]);
        command.args(["--pp-outbounds", &outbounds(self.target)]);
        command.arg("--run-dir").arg(self.path(""));
        Ok(command)
    }

    fn openssh(&self, ssh: SocketAddr) -> Result<OpenSsh> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        let client = OpenSsh::new(ssh)?.option(format!("Ciphers={CIPHER}"));
        client.host_key(&self.keys.host_public)?.identity(&read(&self.keys.node)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// The agent of Secure Comms, with the keys in its user data.
async fn agent(
    place: &Place,
    directory: &Path,
    ssh: SocketAddr,
    target: SocketAddr,
    pod: &str,
) -> Result<Child> {
    let Binaries { agent, adaptor, .. } = ensure_built().await?;
    let (user_data, store) = (directory.join("apf.json"), directory.join("store"));
    let mut command = Command::new(adaptor);
    command.args(["user-data", "--pod-id", pod]).arg("--store").arg(store).arg("--output").arg(&user_data);
    let output = command.output().await?;
    ensure!(output.status.success(), "user-data: {}", String::from_utf8_lossy(&output.stderr));
    let mut command = Command::new(agent);
    command.args(["-secure-comms", "-pod-namespace", "", "-secure-comms-listen", &ssh.to_string()]);
    // Any port: several agents run at a time, and none uses this inbound. No user data may move it.
    command.args(["-secure-comms-inbounds", "BOTH_PHASES:KBS:0"]);
    command.args(["-secure-comms-outbounds", &outbounds(target)]);
    command.args(["-secure-comms-user-data", "all"]).arg("-config").arg(user_data);
    command
        .arg("-secure-comms-state-dir")
        .arg(directory.join("state"))
        .arg("-secure-comms-state-dir-on-disk");
    let agent = Child::spawn("agent", place.in_vm(command))?;
    agent.wait_for_text("listens on", PATIENCE).await?;
    Ok(agent)
}

/// The agent's outbounds, all to one server.
fn outbounds(target: SocketAddr) -> String {
    ["BENCH", "KATAAGENT"].map(|name| format!("KUBERNETES_PHASE:{name}:{target}")).join(",")
}

/// A stock sshd that lets root log in by key and forward; all other settings are its defaults.
async fn sshd(place: &Place, directory: &Path, ssh: SocketAddr, keys: &PodKeys) -> Result<Child> {
    // Directory for its unprivileged child, which Debian's unit makes.
    std::fs::create_dir_all("/run/sshd").context("making /run/sshd, as root")?;
    let (config, authorized) = (directory.join("sshd_config"), directory.join("authorized_keys"));
    std::fs::write(&authorized, &keys.node_public)?;
    let text = format!(
        "ListenAddress {ssh}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nPidFile none\nUsePAM no\n\
         PermitRootLogin prohibit-password\nCiphers {CIPHER}\n",
        keys.host.display(),
        authorized.display(),
    );
    std::fs::write(&config, text)?;
    let mut command = Command::new(SSHD);
    command.args(["-D", "-e", "-f"]).arg(config);
    let sshd = Child::spawn("sshd", place.in_vm(command)).context("is openssh-server installed?")?;
    sshd.wait_for_text("Server listening on", PATIENCE).await?;
    Ok(sshd)
}

/// Retries until the tunnel answers; returns when it did.
fn first_answer(inbound: SocketAddr) -> Result<Instant> {
    let until = Instant::now() + PATIENCE;
    loop {
        // ssh listens only once it is logged in; the adaptor holds the client until then.
        let answered = load::open(inbound, Load::Echo).and_then(|mut stream| load::echo(&mut stream, 0));
        match answered {
            Ok(_) => return Ok(Instant::now()),
            Err(error) if Instant::now() > until => return Err(error.context("the tunnel carries nothing")),
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

/// The one process that serves a connection of `sshd`. (Root's sessions are not split in two.)
fn only_child(pid: i32) -> Result<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut children = children.split_whitespace();
    match (children.next(), children.next()) {
        (Some(child), None) => Ok(child.parse()?),
        _ => bail!("sshd does not serve one connection with one process: {path} has others"),
    }
}

impl End {
    /// Processor time of all its threads so far.
    ///
    /// # Errors
    /// If it has ended.
    pub(super) fn cpu(self) -> Result<Duration> {
        let mut nanoseconds = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.0))? {
            // proc(5): time on the processor, time waiting for one, time slices.
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let first = text.split_whitespace().next().context("an empty schedstat")?;
            nanoseconds += first.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// A size of `/proc/PID/status` in KiB: `VmRSS`, or `VmHWM`, its peak.
    ///
    /// # Errors
    /// If it has ended.
    pub(super) fn memory(self, field: &str) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let value = line.with_context(|| format!("no {field}"))?.trim().trim_end_matches(" kB");
        Ok(value.parse()?)
    }
}
