//! A machine to install on: the node of a stand-in CAA, with file systems and processes of its own.
//!
//! In: the commands of an operator. Out: what they print. /etc, /run, /usr/local and /var are the machine's own, so that
//! nothing of this one is touched.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use secure_comms_tests::harness::caa_node::{CaaNode, NodeOptions};
use secure_comms_tests::harness::process::{Child, Output, ensure_built};
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::kbs::HttpsFront;
use tokio::net::UnixDatagram;
use tokio::process::Command;

/// The KBS of the document, and its ports.
const KBS: (&str, u16, u16) = ("kbs.example", 8080, 8443);

/// The machine; all of its processes are killed when it is dropped.
pub(crate) struct Machine {
    /// CAA, the cloud and the KBS.
    pub(crate) node: CaaNode,
    /// The first process of its namespace.
    first: Child,
    https: HttpsFront,
}

impl Machine {
    /// A machine with CAA, and what the operator has at hand in the working directory of the commands.
    ///
    /// # Errors
    /// If a step fails; names it.
    pub(crate) async fn new() -> Result<Self> {
        let (name, http, https) = KBS;
        let node = CaaNode::new(NodeOptions { kbs_port: http, ..NodeOptions::default() }).await?;
        let https = node.kbs.https_front(name, https).await?;
        file_systems(&node)?;
        working_directory(&node, &https).await?;
        let mut command = node.namespace.command("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"]);
        command
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/install/enter.sh"))
            .arg(node.path("root"));
        let first = Child::spawn("machine", command)?;
        first.wait_for_text("mounted", PATIENCE).await?;
        Ok(Self { node, first, https })
    }

    /// A file of the machine, as this process sees it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.node.path("root").join(path)
    }

    /// PEM of the KBS's CA.
    pub(crate) fn ca_pem(&self) -> &str {
        self.https.ca_pem()
    }

    /// Files in a directory as kubelet mounts those of a ConfigMap or Secret: by links, in a directory that all may write.
    ///
    /// # Errors
    /// If they can't be written.
    pub(crate) fn mount(&self, directory: &str, files: &[(&str, String)]) -> Result<()> {
        let directory = self.path(directory);
        fs::create_dir_all(directory.join("..2026"))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777))?;
        symlink("..2026", directory.join("..data"))?;
        for (name, text) in files {
            let file = directory.join("..2026").join(name);
            fs::write(&file, text)?;
            // As the manifest has it: defaultMode 0400 for the Secret, and 0644 unless set.
            let mode = if *name == "privateKey" { 0o400 } else { 0o644 };
            fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
            symlink(Path::new("..data").join(name), directory.join(name))?;
        }
        Ok(())
    }

    /// Runs shell commands as the operator does, each only if the one before it has succeeded; returns what they print.
    ///
    /// # Errors
    /// If one fails or warns, with the output and the service's log.
    pub(crate) async fn run(&self, commands: &str) -> Result<String> {
        let of_first = |what: &str| format!("/proc/{}/ns/{what}", self.first.pid());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount={}", of_first("mnt")))
            .arg(format!("--pid={}", of_first("pid_for_children")))
            .arg(format!("--net={}", self.node.namespace.path().display()))
            .args(["env", "-i", "HOME=/root"])
            .arg("PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .args(["sh", "-c", "cd \"$0\" && exec sh -euc \"$1\""])
            .arg(self.node.path("work"))
            .arg(commands);
        let mut operator = Child::spawn("operator", command)?;
        let status = operator.wait_exit(PATIENCE).await?;
        let log = fs::read_to_string(self.path("run/test/log")).unwrap_or_default();
        let warns = operator.lines().iter().any(|line| line.text.contains(" WARN "));
        ensure!(
            status.success() && !warns,
            "{status}\n{commands}\n{}\nthe service's log:\n{log}",
            operator.log()
        );
        let lines = operator.lines().into_iter().filter(|line| line.output == Output::Stdout);
        Ok(lines.flat_map(|line| [line.text, "\n".to_owned()]).collect())
    }

    /// As [`Machine::run`], for commands that start the service: passes its READY=1 on to the stand-in for systemctl.
    ///
    /// # Errors
    /// As there, or if the service is ready before or without having said so.
    pub(crate) async fn run_with_notify(&self, commands: &str) -> Result<String> {
        let notify = UnixDatagram::bind(self.path("run/test/notify"))?;
        let ready = async {
            let mut message = [0; 4096];
            loop {
                let size = notify.recv(&mut message).await?;
                let text = String::from_utf8_lossy(message.get(..size).unwrap_or_default()).into_owned();
                if text.lines().any(|line| line == "READY=1") {
                    // The stand-in has it open: this does not block.
                    tokio::fs::write(self.path("run/test/started"), "READY=1\n").await?;
                    return anyhow::Ok(());
                }
            }
        };
        let run = self.run(commands);
        tokio::pin!(run);
        tokio::select! {
            ended = &mut run => {
                ended?;
                anyhow::bail!("the commands ended, and no READY=1 came");
            }
            ready = ready => ready?,
        }
        run.await
    }
}

/// Its own file systems, as far as they are not this machine's.
fn file_systems(node: &CaaNode) -> Result<()> {
    let root = node.path("root");
    for directory in ["etc/systemd/system", "run/test", "usr/local/bin", "var/lib", "var/tmp"] {
        fs::create_dir_all(root.join(directory)).context(directory)?;
    }
    let (name, ..) = KBS;
    fs::write(root.join("etc/hosts"), format!("127.0.0.1 localhost {name}\n"))?;
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files\n")?;
    // A link and no mount: /proc/net/unix has the paths by which the stand-in CAA, outside, has bound its sockets.
    symlink(node.path("peerpod"), root.join("run/peerpod"))?;
    // Where the node looks for the service's files.
    symlink(root.join("run/secure-comms"), node.path("run"))?;
    symlink(root.join("var/lib/secure-comms-adaptor"), node.path("store"))?;
    nix::unistd::mkfifo(&root.join("run/test/started"), Mode::S_IRUSR | Mode::S_IWUSR)?;
    let systemctl = root.join("usr/local/bin/systemctl");
    fs::write(&systemctl, include_str!("systemctl"))?;
    Ok(fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755))?)
}

/// The directory in which the operator is: a checkout after the build, with the KBS's files.
async fn working_directory(node: &CaaNode, https: &HttpsFront) -> Result<()> {
    let work = node.path("work");
    fs::create_dir_all(work.join("target/release"))?;
    symlink(&ensure_built().await?.adaptor, work.join("target/release/secure-comms-adaptor"))?;
    symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").canonicalize()?, work.join("deploy"))?;
    fs::write(work.join("kbs-admin.pem"), node.kbs.admin_key_pem())?;
    Ok(fs::write(work.join("kbs-ca.pem"), https.ca_pem())?)
}
