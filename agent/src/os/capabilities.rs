//! The capabilities of this process, given up once nothing needs them.
//!
//! Linux has capabilities per thread, and only a thread itself can change its own. The agent runs on one thread; those that
//! it starts for a moment (to enter a network namespace, to make a directory) inherit its capabilities at their start. So
//! the agent's own thread gives them up, and then waits until the threads that began before have ended.

use std::fs;
use std::io;
use std::time::Duration;

pub use caps::Capability;
use caps::errors::CapsError;
use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use tokio::time::{Instant, sleep};

/// The threads of this process (proc_pid_task(5)).
const THREADS: &str = "/proc/self/task";
/// Time that threads which began earlier have to end. The longest step of one is a file system's.
const THREADS_END: Duration = Duration::from_secs(60);
/// Pause between two looks at them.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Why this process keeps capabilities that it should give up.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// The kernel refused.
    #[error(
        "giving up capabilities: {0}; the service's system call filter must allow capset (SystemCallFilter=capset)"
    )]
    Refused(String),
    /// The ban on new capabilities was refused.
    #[error(
        "giving up capabilities: forbidding new ones: {0}; the service's system call filter must allow prctl"
    )]
    NoNewPrivileges(io::Error),
    /// The threads can't be listed.
    #[error("giving up capabilities: reading {THREADS}: {0}; mount /proc")]
    Threads(#[from] io::Error),
    /// A thread that began earlier does not end.
    #[error(
        "giving up capabilities: thread '{name}' still has some after {} s; is a file system of the VM hanging?",
        THREADS_END.as_secs()
    )]
    Hangs {
        /// Name of the thread.
        name: String,
    },
}

impl From<CapsError> for CapabilityError {
    fn from(error: CapsError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// Checks that capabilities can be given up later, if this process has any.
///
/// # Errors
/// They can't: a process that would keep them must not begin to serve.
pub fn check() -> Result<(), CapabilityError> {
    if caps::read(None, CapSet::Permitted)?.is_empty() {
        return Ok(());
    }
    let effective = caps::read(None, CapSet::Effective)?;
    // The same ones: a filter refuses the call all the same.
    Ok(caps::set(None, CapSet::Effective, &effective)?)
}

/// Gives up all capabilities but `keep`, in every thread and for good: no program that this process could execute gets any
/// back. Without the right to shrink the bounding set (`CAP_SETPCAP`) that set stays; "no new privileges" makes it void.
/// Returns what is left.
///
/// # Errors
/// Some remain.
pub async fn keep_only(keep: &[Capability]) -> Result<Vec<Capability>, CapabilityError> {
    let keep: CapsHashSet = keep.iter().copied().collect();
    give_up(&keep)?;
    let deadline = Instant::now() + THREADS_END;
    let allowed = keep.iter().fold(0, |mask, capability| mask | capability.bitmask());
    while let Some(name) = thread_with_more(allowed)? {
        if Instant::now() >= deadline {
            return Err(CapabilityError::Hangs { name });
        }
        // No event shows the end of a thread of our own.
        sleep(LOOK_AGAIN).await;
    }
    Ok(caps::read(None, CapSet::Permitted)?.into_iter().collect())
}

/// Gives up the capabilities of this thread.
fn give_up(keep: &CapsHashSet) -> Result<(), CapabilityError> {
    nix::sys::prctl::set_no_new_privs().map_err(|errno| CapabilityError::NoNewPrivileges(errno.into()))?;
    let permitted = caps::read(None, CapSet::Permitted)?;
    if permitted.is_empty() {
        return Ok(());
    }
    // First, because it needs a capability.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::all().difference(keep) {
            // Those that this kernel does not know are an error.
            if caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, *capability)?;
            }
        }
    }
    let left = permitted.intersection(keep).copied().collect();
    // In this order: what is not permitted can't be effective. The ambient set follows the inheritable one.
    caps::set(None, CapSet::Effective, &left)?;
    caps::clear(None, CapSet::Inheritable)?;
    Ok(caps::set(None, CapSet::Permitted, &left)?)
}

/// A thread of this process that may use a capability which is not in `allowed`.
fn thread_with_more(allowed: u64) -> Result<Option<String>, io::Error> {
    for thread in fs::read_dir(THREADS)? {
        let status = match fs::read_to_string(thread?.path().join("status")) {
            Ok(status) => status,
            // It has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => continue,
            Err(error) => return Err(error),
        };
        if permitted(&status)? & !allowed != 0 {
            let name = field(&status, "Name:").unwrap_or_default();
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// The permitted capabilities in a file `status` of /proc, as a mask.
fn permitted(status: &str) -> Result<u64, io::Error> {
    let mask = field(status, "CapPrm:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    mask.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no line CapPrm"))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str =
        "Name:\tnetns\nState:\tR (running)\nCapInh:\t0000000000000000\nCapPrm:\t0000000000201000\n";

    #[test]
    fn a_status_has_the_permitted_capabilities() {
        let mask = Capability::CAP_SYS_ADMIN.bitmask() | Capability::CAP_NET_ADMIN.bitmask();
        assert_eq!(permitted(STATUS).unwrap(), mask);
        assert_eq!(field(STATUS, "Name:"), Some("netns"));
        for broken in ["", "CapPrm:\n", "CapPrm:\tx\n", "CapEff:\t0\n"] {
            assert!(permitted(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_thread_that_gives_up_its_capabilities_gets_none_back() {
        // On a thread of its own: the others of this test program keep theirs.
        let left = std::thread::spawn(|| {
            check().unwrap();
            give_up(&CapsHashSet::from([Capability::CAP_NET_ADMIN])).unwrap();
            let had = caps::read(None, CapSet::Permitted).unwrap();
            assert!(caps::set(None, CapSet::Permitted, &caps::all()).is_err(), "it got some back");
            give_up(&CapsHashSet::new()).unwrap();
            let left = [CapSet::Permitted, CapSet::Effective, CapSet::Inheritable, CapSet::Ambient];
            let left: Vec<_> = left.map(|set| caps::read(None, set).unwrap()).into_iter().flatten().collect();
            assert!(left.is_empty(), "{left:?}");
            had
        });
        let had = left.join().unwrap();
        assert!(had.iter().all(|capability| *capability == Capability::CAP_NET_ADMIN), "{had:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thread_that_keeps_its_capabilities_is_named() {
        let root = caps::has_cap(None, CapSet::Permitted, Capability::CAP_SYS_ADMIN).unwrap();
        let allowed = if root { 0 } else { u64::MAX };
        // The other threads of this test program.
        assert_eq!(thread_with_more(allowed).unwrap().is_some(), root);
        assert_eq!(thread_with_more(u64::MAX).unwrap(), None);
    }
}
