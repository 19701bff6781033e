//! A cloud whose VMs are agents at addresses of their own in one network namespace, which is linked with a worker node's.
//! Each VM has its own /run, kata agent and guest components. Needs root, iproute2, nftables.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use secure_comms_tunnel::netns::Namespace;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::harness::process::{Child, ensure_built};
use crate::harness::test_namespace::TestNamespace;
use crate::simulators::caa::{Cloud, Instance, apf};
use crate::simulators::guest::{Backend, Cdh, CdhOptions, Rest};
use crate::simulators::kata_api::server::{KataServer, OWN_DIRECTORY};

/// Device of the link at both of its ends.
const DEVICE: &str = "cable";
/// The worker node's address.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 82, 0, 1);
/// Port of the agents.
pub const SSH_PORT: u16 = 2222;
/// First of the ports that a VM needs on 127.0.0.1, which all VMs share.
const FIRST_PORT: u16 = 20_000;

/// The cloud; its VMs end when it is dropped.
#[derive(Debug)]
pub struct TestCloud {
    vms: Mutex<Vms>,
    directory: TempDir,
    namespace: TestNamespace,
}

#[derive(Debug)]
struct Vms {
    by_id: HashMap<String, Arc<Vm>>,
    created: u16,
    next_address: Option<IpAddr>,
    boots: bool,
    deleted: Vec<String>,
}

/// A VM. Its agent runs once it has booted.
#[derive(Debug)]
pub struct Vm {
    /// Its address.
    pub address: IpAddr,
    /// Its kata agent, which exits at the sandbox's end.
    pub kata: KataServer,
    /// Its AA and CDH.
    pub cdh: Arc<Cdh>,
    agent: Mutex<Option<Child>>,
    directory: TempDir,
    kbs_port: u16,
    guest: Rest,
}

impl TestCloud {
    /// A cloud without VMs, on a link of the node's. VMs boot as soon as they are created.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub async fn new(node: &TestNamespace) -> Result<Self> {
        let namespace = TestNamespace::new("cloud")?;
        namespace.veth(DEVICE, node, DEVICE)?;
        node.address(DEVICE, &format!("{NODE}/16"))?;
        nft(
            &namespace,
            "table inet faults {
                 set cut { type ipv4_addr; }
                 chain into { type filter hook input priority filter; ip daddr @cut drop; }
                 chain out { type filter hook output priority filter; ip saddr @cut drop; }
             }",
        )
        .await?;
        let vms =
            Vms { by_id: HashMap::new(), created: 0, next_address: None, boots: true, deleted: Vec::new() };
        let directory = tempfile::Builder::new().prefix("sc-cloud-").tempdir()?;
        Ok(Self { vms: Mutex::new(vms), directory, namespace })
    }

    /// The VM of a sandbox.
    ///
    /// # Errors
    /// If there is none.
    pub fn vm(&self, id: &str) -> Result<Arc<Vm>> {
        self.vms().by_id.get(id).cloned().with_context(|| format!("cloud: {id} has no VM"))
    }

    /// The ids of the sandboxes whose VMs were deleted, in that order.
    #[must_use]
    pub fn deleted(&self) -> Vec<String> {
        self.vms().deleted.clone()
    }

    /// Whether VMs that are created from now on boot at once; else by [`TestCloud::boot`].
    pub fn boots(&self, at_once: bool) {
        self.vms().boots = at_once;
    }

    /// The address of the next VM, which an earlier one may have had.
    pub fn next_address(&self, address: IpAddr) {
        self.vms().next_address = Some(address);
    }

    /// Drops each packet to and from the VM, or lets them pass again.
    ///
    /// # Errors
    /// If nftables refuses it.
    pub async fn cut(&self, vm: &Vm, cut: bool) -> Result<()> {
        let verb = if cut { "add" } else { "delete" };
        nft(&self.namespace, &format!("{verb} element inet faults cut {{ {} }}", vm.address)).await
    }

    /// Boots the VM of a sandbox.
    ///
    /// # Errors
    /// If there is none, or its agent can't be started.
    pub async fn boot(&self, id: &str) -> Result<()> {
        let vm = self.vm(id)?;
        let binaries = ensure_built().await?;
        // Its own /run, where an agent has its files by default. `ip netns exec` has made a mount namespace.
        let mut command = self.namespace.command("sh");
        command
            .args(["-c", "mount --bind \"$0\" /run && exec \"$@\""])
            .arg(vm.run())
            .arg(&binaries.agent)
            .args(["-secure-comms", "-pod-namespace", "", "-secure-comms-state-dir-on-disk"])
            .args(["-secure-comms-listen", &SocketAddr::new(vm.address, SSH_PORT).to_string()])
            .args(["-secure-comms-guest-api", &vm.guest.addr().to_string()])
            .args(["-secure-comms-inbounds", &format!("BOTH_PHASES:KBS:{}", vm.kbs_port)]);
        let agent = Child::spawn(format!("agent of {}", vm.address), command)?;
        *vm.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent);
        Ok(())
    }

    async fn make(&self, id: &str, apf_json: Value) -> Result<()> {
        let (number, address) = self.draw()?;
        let text = address.to_string();
        let given = self.namespace.show(["address"])?.to_string().contains(&format!("\"{text}\""));
        if !given {
            self.namespace.address(DEVICE, &format!("{text}/16"))?;
        }
        let directory = tempfile::Builder::new().prefix("vm").tempdir_in(self.directory.path())?;
        let run = directory.path().join("run");
        std::fs::create_dir_all(run.join("peerpod"))?;
        std::fs::create_dir(run.join(OWN_DIRECTORY))?;
        apf::write(&run.join("peerpod/apf.json"), &apf_json)?;
        let (kbs_port, guest_port) = (FIRST_PORT + number * 2, FIRST_PORT + number * 2 + 1);
        let namespace = Namespace::new(self.namespace.name());
        let mut options = CdhOptions::new(format!("http://127.0.0.1:{kbs_port}"));
        options.namespace = Some(namespace.clone());
        let cdh = Arc::new(Cdh::new(options)?);
        let guest = SocketAddr::from((Ipv4Addr::LOCALHOST, guest_port));
        let vm = Vm {
            address,
            kata: KataServer::start(run.join(OWN_DIRECTORY).join("agent.sock")).await?,
            guest: Rest::start_in(Some(&namespace), guest, Backend::Local(Arc::clone(&cdh))).await?,
            cdh,
            agent: Mutex::default(),
            directory,
            kbs_port,
        };
        self.vms().by_id.insert(id.to_owned(), Arc::new(vm));
        Ok(())
    }

    /// A number that no VM had, and an address.
    fn draw(&self) -> Result<(u16, IpAddr)> {
        let mut vms = self.vms();
        vms.created += 1;
        let [high, low] = vms.created.checked_add(255).context("cloud: too many VMs")?.to_be_bytes();
        let address = vms.next_address.take().unwrap_or_else(|| Ipv4Addr::new(10, 82, high, low).into());
        Ok((vms.created, address))
    }

    fn vms(&self) -> MutexGuard<'_, Vms> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Cloud for TestCloud {
    async fn create(&self, instance: Instance) -> Result<IpAddr> {
        let mut apf_json = instance.apf_json;
        // The pod's own network has its own tests.
        if let Some(object) = apf_json.as_object_mut() {
            object.remove("pod-network");
        }
        self.make(&instance.id, apf_json).await?;
        if self.vms().boots {
            self.boot(&instance.id).await?;
        }
        Ok(self.vm(&instance.id)?.address)
    }

    async fn delete(&self, id: &str) -> Result<()> {
        let mut vms = self.vms();
        // The agent is killed when the last user of the VM has dropped it.
        if let Some(vm) = vms.by_id.remove(id) {
            drop(vm.agent.lock().unwrap_or_else(PoisonError::into_inner).take());
            vms.deleted.push(id.to_owned());
        }
        Ok(())
    }
}

impl Vm {
    /// Its /run.
    fn run(&self) -> std::path::PathBuf {
        self.directory.path().join("run")
    }

    /// Its agent's log; empty before it boots and after it was deleted.
    #[must_use]
    pub fn log(&self) -> String {
        let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent.as_ref().map(Child::log).unwrap_or_default()
    }
}

/// Runs nftables in a namespace.
///
/// # Errors
/// If it refuses the rules.
pub async fn nft(namespace: &TestNamespace, rules: &str) -> Result<()> {
    let mut command: Command = namespace.command("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("starting nft")?;
    let mut stdin = child.stdin.take().context("nft has no input")?;
    stdin.write_all(rules.as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    ensure!(output.status.success(), "nft {rules}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
