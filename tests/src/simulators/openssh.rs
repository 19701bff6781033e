//! Command lines for the stock OpenSSH client, independent of the user's configuration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tokio::process::Command;

/// A client with a directory for its files, which is removed when dropped.
#[derive(Debug)]
pub struct OpenSsh {
    dir: TempDir,
    addr: SocketAddr,
    identity: Option<PathBuf>,
    host_key_known: bool,
    options: Vec<String>,
}

impl OpenSsh {
    /// A client of the server at `addr`: it accepts any host key and has no identity.
    ///
    /// # Errors
    /// If the directory can't be made.
    pub fn new(addr: SocketAddr) -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("openssh-").tempdir().context("OpenSSH: temporary directory")?;
        Ok(Self { dir, addr, identity: None, host_key_known: false, options: Vec::new() })
    }

    /// Accepts this host key only: `line` as in a `.pub` file, such as `ssh-ed25519 AAAA..`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn host_key(mut self, line: &str) -> Result<Self> {
        let host = format!("[{}]:{} {}\n", self.addr.ip(), self.addr.port(), line.trim());
        std::fs::write(self.known_hosts(), host).context("OpenSSH: writing known_hosts")?;
        self.host_key_known = true;
        Ok(self)
    }

    /// Authenticates with this private key (PEM text, OpenSSH or PKCS#8 as `ssh` reads it).
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn identity(mut self, private_key: &str) -> Result<Self> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = self.dir.path().join("id");
        // Private from the start: ssh refuses a key that others can read.
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .context("OpenSSH: writing the identity")?;
        file.write_all(private_key.as_bytes()).context("OpenSSH: writing the identity")?;
        self.identity = Some(path);
        Ok(self)
    }

    /// Authenticates with the private key in this file.
    #[must_use]
    pub fn identity_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.identity = Some(path.into());
        self
    }

    /// Adds `-o <option>`, such as `RekeyLimit=1M`. Of two values OpenSSH takes the first, and these come first.
    #[must_use]
    pub fn option(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// Makes an Ed25519 key in `dir` with `ssh-keygen`; returns the private key's file and the public line.
    ///
    /// # Errors
    /// If `ssh-keygen` is not installed or fails.
    pub async fn keygen(dir: &Path, name: &str) -> Result<(PathBuf, String)> {
        let file = dir.join(name);
        let out = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&file)
            .output()
            .await
            .context("running ssh-keygen: is openssh-client installed?")?;
        if !out.status.success() {
            bail!("ssh-keygen: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        let public = file.with_file_name(format!("{name}.pub"));
        let public =
            std::fs::read_to_string(&public).with_context(|| format!("reading {}", public.display()))?;
        Ok((file, public.trim().to_owned()))
    }

    /// `ssh <options> <extra> user@addr <remote>`: `extra` such as `-N -L 7000:KATAAGENT:1`, `remote` such as
    /// `secure-comms` after `-s`.
    #[must_use]
    pub fn command(&self, user: &str, extra: &[&str], remote: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        // `none`: neither ~/.ssh/config nor /etc/ssh/ssh_config.
        command.args(["-F", "none", "-T", "-p", &self.addr.port().to_string()]);
        for option in &self.options {
            command.args(["-o", option]);
        }
        // Never ask, and fail if a forwarding is refused.
        for option in ["BatchMode=yes", "ConnectTimeout=10", "ExitOnForwardFailure=yes", "IdentitiesOnly=yes"]
        {
            command.args(["-o", option]);
        }
        let (strict, known_hosts) = match self.host_key_known {
            true => ("yes", self.known_hosts()),
            false => ("no", PathBuf::from("/dev/null")),
        };
        command.args(["-o", &format!("StrictHostKeyChecking={strict}")]);
        command.args(["-o", &format!("UserKnownHostsFile={}", known_hosts.display())]);
        command.args(["-o", "GlobalKnownHostsFile=/dev/null"]);
        match &self.identity {
            Some(path) => command.arg("-i").arg(path),
            None => command.args(["-o", "IdentityFile=none"]),
        };
        command.args(extra).arg("-l").arg(user).arg(self.addr.ip().to_string()).args(remote);
        // The SSH agent of the user who runs the tests must not offer its keys.
        command.env_remove("SSH_AUTH_SOCK").env("LC_ALL", "C");
        command
    }

    fn known_hosts(&self) -> PathBuf {
        self.dir.path().join("known_hosts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The configuration that `ssh -G` prints, one `key value` per line.
    async fn resolved(ssh: &OpenSsh, user: &str, extra: &[&str]) -> String {
        let out = ssh.command(user, &[&["-G"], extra].concat(), &[]).output().await.unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    #[tokio::test]
    async fn the_stock_client_takes_the_command_line_as_meant() {
        let dir = tempfile::tempdir().unwrap();
        let (key, public) = OpenSsh::keygen(dir.path(), "wn").await.unwrap();
        let ssh = OpenSsh::new("127.0.0.1:2022".parse().unwrap()).unwrap();
        let ssh = ssh.identity(&std::fs::read_to_string(key).unwrap()).unwrap().host_key(&public).unwrap();
        let config = resolved(&ssh, "kubernetes", &["-N", "-L", "7000:KATAAGENT:1"]).await;
        for line in [
            "user kubernetes",
            "hostname 127.0.0.1",
            "port 2022",
            "stricthostkeychecking true",
            "batchmode yes",
            "localforward 7000 [KATAAGENT]:1",
        ] {
            assert!(config.lines().any(|found| found == line), "no {line:?} in\n{config}");
        }
    }

    #[tokio::test]
    async fn any_host_key_does_until_one_is_given() {
        let ssh = OpenSsh::new("[::1]:2022".parse().unwrap()).unwrap().option("RekeyLimit=1M");
        let config = resolved(&ssh, "attestation", &[]).await;
        assert!(config.contains("stricthostkeychecking false"), "{config}");
        assert!(config.contains("rekeylimit 1048576"), "{config}");
    }

    #[tokio::test]
    async fn a_closed_port_is_an_error_and_no_question() {
        // Held, and without a listener: another test gets no server there.
        let closed = tokio::net::TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = closed.local_addr().unwrap();
        let out = OpenSsh::new(addr).unwrap().command("kubernetes", &[], &[]).output().await.unwrap();
        assert_eq!(out.status.code(), Some(255));
        assert!(String::from_utf8_lossy(&out.stderr).contains("Connection refused"));
    }
}
