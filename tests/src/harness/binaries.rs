//! Finds the binaries under test, and makes sure that they are built from this source.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::Command;
use tokio::sync::OnceCell;

/// Directory that holds the binaries; nothing is built if it is set.
pub(super) const BIN_DIR: &str = "SECURE_COMMS_BIN_DIR";
/// Directory of binaries of an earlier version, for a comparison.
pub(super) const OLD_BIN_DIR: &str = "SECURE_COMMS_OLD_BIN_DIR";
/// With a program of this package: without one, cargo builds the shared dependencies again, with other features.
const PROGRAMS: [&str; 4] = ["agent-protocol-forwarder", "secure-comms-adaptor", "simulator", "double"];

const OWN_PACKAGE: [&str; 4] =
    ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PRIMARY_PACKAGE", "CARGO_BIN_NAME"];

/// The programs that tests run.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `agent-protocol-forwarder`.
    pub agent: PathBuf,
    /// `secure-comms-adaptor`.
    pub adaptor: PathBuf,
    /// `simulator`: its first argument names the system to simulate.
    pub simulator: PathBuf,
}

/// Builds the release binaries, once per process, or finds them in `$SECURE_COMMS_BIN_DIR`.
///
/// # Errors
/// If the build fails (with the compiler's output) or a binary does not exist.
pub async fn ensure_built() -> Result<&'static Binaries> {
    static BUILT: OnceCell<Binaries> = OnceCell::const_new();
    BUILT
        .get_or_try_init(|| async {
            match std::env::var_os(BIN_DIR) {
                Some(dir) => Binaries::find(Path::new(&dir)).with_context(|| format!("{BIN_DIR} is set")),
                None => build().await,
            }
        })
        .await
}

/// The binaries of an earlier version in `$SECURE_COMMS_OLD_BIN_DIR`; none if it is not set.
///
/// # Errors
/// If a binary does not exist.
pub fn old_binaries() -> Result<Option<Binaries>> {
    let Some(dir) = std::env::var_os(OLD_BIN_DIR) else { return Ok(None) };
    Binaries::find(Path::new(&dir)).map(Some).with_context(|| format!("{OLD_BIN_DIR} is set"))
}

async fn build() -> Result<Binaries> {
    let exe = std::env::current_exe().context("finding the path of this program")?;
    let target = target_dir(&exe)
        .with_context(|| format!("{} is in no cargo target directory: set {BIN_DIR}", exe.display()))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(&cargo);
    command.args(["build", "--release", "--workspace", "--target-dir"]).arg(target);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    for program in PROGRAMS {
        command.args(["--bin", program]);
    }
    // Variables that `cargo run` sets for this program; build scripts such as ring's run again when they differ.
    let own = |name: &str| name.starts_with("CARGO_PKG_") || OWN_PACKAGE.contains(&name);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(own)) {
        command.env_remove(name);
    }
    if std::io::stderr().is_terminal() {
        // It takes minutes: a person sees how far it is.
        command.stderr(Stdio::inherit());
    }
    let out = command.output().await.with_context(|| format!("running {}", cargo.display()))?;
    if !out.status.success() {
        bail!("building the binaries under test failed:\n{}", String::from_utf8_lossy(&out.stderr));
    }
    Binaries::find(&target.join("release"))
}

/// `<target>/<profile>/program` or `<target>/<profile>/deps/test-program`.
fn target_dir(exe: &Path) -> Option<&Path> {
    let dir = exe.parent()?;
    let profile = if dir.ends_with("deps") { dir.parent()? } else { dir };
    profile.parent()
}

impl Binaries {
    fn find(dir: &Path) -> Result<Self> {
        let binary = |name: &str| {
            let path = dir.join(name);
            if !path.is_file() {
                bail!("{} is not there: build it, or unset {BIN_DIR}", path.display());
            }
            Ok(path)
        };
        Ok(Self {
            agent: binary("agent-protocol-forwarder")?,
            adaptor: binary("secure-comms-adaptor")?,
            simulator: binary("simulator")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_directory_is_found_from_any_program() {
        let target = Some(Path::new("/w/target"));
        assert_eq!(target_dir(Path::new("/w/target/release/double")), target);
        assert_eq!(target_dir(Path::new("/w/target/debug/deps/e2e-0123")), target);
    }

    #[test]
    fn a_missing_binary_is_named() {
        let error = Binaries::find(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/agent-protocol-forwarder is not there"), "{error}");
    }
}
