//! The directory of a scene: temporary, or kept, so that a later process continues the scene.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::drawn::{free_port, pod_id};

/// Directory of a scene.
#[derive(Debug)]
pub(super) enum Directory {
    /// Removed with the scene.
    Temporary(TempDir),
    /// Stays; the lock is held by the scene.
    Kept(PathBuf, #[expect(dead_code, reason = "held until dropped")] File),
}

impl Directory {
    pub(super) fn temporary() -> Result<Self> {
        Ok(Self::Temporary(tempfile::Builder::new().prefix("secure-comms-").tempdir()?))
    }

    /// Makes the directory (0700) if it is missing, locks it, and ends the process that an earlier scene left behind.
    pub(super) fn kept(path: &Path) -> Result<Self> {
        private_directory(path)?;
        let lock = File::create(path.join("lock")).with_context(|| format!("locking {}", path.display()))?;
        if !locked_soon(&lock) {
            bail!("{}: another program uses it: end that, or give another --dir", path.display());
        }
        end_leftover(path)?;
        Ok(Self::Kept(path.to_owned(), lock))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Temporary(directory) => directory.path(),
            Self::Kept(path, _) => path,
        }
    }
}

/// Makes a directory for us alone, or checks that it is one.
///
/// # Errors
/// It can't be made, or others may access it.
pub fn private_directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("making {}", path.display()))?;
    let there = fs::symlink_metadata(path)?;
    let ours = there.is_dir() && there.uid() == geteuid().as_raw() && there.mode() & 0o077 == 0;
    ensure!(ours, "{}: not a directory of ours alone: give another --dir", path.display());
    Ok(())
}

fn child_file(directory: &Path) -> PathBuf {
    directory.join("child.pid")
}

/// Remembers the process of a kept scene, which stays if ours is killed.
///
/// # Errors
/// The file can't be written.
pub fn remember_child(directory: &Path, pid: i32) -> Result<()> {
    Ok(fs::write(child_file(directory), pid.to_string())?)
}

/// Kills the remembered process, if it still runs and is of this directory: its number may be another's by now.
fn end_leftover(directory: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(child_file(directory)) else { return Ok(()) };
    let Ok(pid) = text.trim().parse::<i32>() else { return Ok(()) };
    let runs = || {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(&*directory.to_string_lossy())
    };
    for _ in 0..500 {
        if !runs() {
            return Ok(());
        }
        // It may end in between.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("process {pid} of an earlier run does not end")
}

/// An earlier holder may keep the lock a moment longer: a process that another of its threads starts holds a copy of each
/// file until its exec.
fn locked_soon(lock: &File) -> bool {
    for _ in 0..300 {
        if lock.try_lock().is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// What a continued scene must have in common with the earlier one.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) pod: String,
    pub(super) ssh: SocketAddr,
    pub(super) kbs_inbound: SocketAddr,
    pub(super) node_inbound: SocketAddr,
    /// The adaptor expects the agent's tunnels where they were.
    pub(super) vm_service: SocketAddr,
}

impl Names {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            pod: pod_id()?,
            ssh: free_port()?,
            kbs_inbound: free_port()?,
            node_inbound: free_port()?,
            vm_service: free_port()?,
        })
    }

    /// Those of the directory; makes them at its first use.
    pub(super) fn of(directory: &Directory) -> Result<Self> {
        let Directory::Kept(path, _) = directory else { return Self::new() };
        let file = path.join("scene.json");
        match fs::read(&file) {
            Ok(json) => Self::read(&json).with_context(|| {
                format!("{}: not written by this program: remove {}", file.display(), path.display())
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let names = Self::new()?;
                let unfinished = path.join("scene.json.new");
                fs::write(&unfinished, names.json().to_string())?;
                fs::rename(unfinished, file)?;
                Ok(names)
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
        }
    }

    fn json(&self) -> Value {
        json!({
            "pod": self.pod,
            "ssh": self.ssh,
            "kbs_inbound": self.kbs_inbound,
            "node_inbound": self.node_inbound,
            "vm_service": self.vm_service,
        })
    }

    fn read(json: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(json)?;
        let text =
            |name: &str| json.get(name).and_then(Value::as_str).with_context(|| format!("{name} is missing"));
        let address = |name: &str| -> Result<SocketAddr> { Ok(text(name)?.parse()?) };
        Ok(Self {
            pod: text("pod")?.to_owned(),
            ssh: address("ssh")?,
            kbs_inbound: address("kbs_inbound")?,
            node_inbound: address("node_inbound")?,
            vm_service: address("vm_service")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_scene_has_the_same_names_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scene");
        let first = Names::of(&Directory::kept(&path).unwrap()).unwrap();
        let again = Names::of(&Directory::kept(&path).unwrap()).unwrap();
        assert_eq!(first.json(), again.json());
    }

    #[test]
    fn a_directory_in_use_or_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scene");
        let held = Directory::kept(&path).unwrap();
        let error = Directory::kept(&path).unwrap_err().to_string();
        assert!(error.contains("another program uses it"), "{error}");
        drop(held);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(Directory::kept(&path).unwrap_err().to_string().contains("not a directory of ours alone"));
    }

    #[test]
    fn only_a_process_of_the_directory_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scene");
        private_directory(&path).unwrap();
        let start = |argument: &str| {
            let script = "while :; do sleep 0.1; done";
            std::process::Command::new("sh").args(["-c", script, argument]).spawn().unwrap()
        };
        let mut ours = start(&path.to_string_lossy());
        let mut other = start("other");
        remember_child(&path, i32::try_from(other.id()).unwrap()).unwrap();
        end_leftover(&path).unwrap();
        assert!(other.try_wait().unwrap().is_none(), "another's process");
        remember_child(&path, i32::try_from(ours.id()).unwrap()).unwrap();
        end_leftover(&path).unwrap();
        other.kill().unwrap();
        assert!(!ours.wait().unwrap().success() && !other.wait().unwrap().success());
    }
}
