//! What is drawn at random for a scene: ports and the pod's id.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Result, bail};
use tokio::net::TcpSocket;

/// Ports below the range from which the kernel hands out others, so no other socket gets them by chance.
const PORTS: u16 = 12_000;
const FIRST_PORT: u16 = 20_000;

/// A free port that this process has not given out before: it may be bound later, and more than once.
///
/// # Errors
/// If none is free.
pub fn free_port() -> Result<SocketAddr> {
    static START: OnceLock<u16> = OnceLock::new();
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    // Each process starts elsewhere in the range, because several may run at a time.
    let random = u16::from_le_bytes(random()?);
    let start = START.get_or_init(|| random % PORTS);
    for _ in 0..PORTS {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed) % PORTS;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + (start + given) % PORTS));
        if is_free(address)? {
            return Ok(address);
        }
    }
    bail!("no port is free")
}

/// Whether a listener could be bound to the address.
///
/// The probe does not listen. A process that another thread starts holds a copy of each socket from its fork to its
/// exec, and a listening copy would keep the port for that long; one that is only bound does not.
fn is_free(address: SocketAddr) -> Result<bool> {
    let probe = TcpSocket::new_v4()?;
    probe.set_reuseaddr(true)?;
    Ok(probe.bind(address).is_ok())
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes)
        .map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
    Ok(bytes)
}

/// A sandbox id as the runtime makes it: 64 hex digits.
///
/// # Errors
/// If the system has no randomness.
pub fn pod_id() -> Result<String> {
    Ok(random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::{free_port, is_free};

    #[test]
    fn a_port_with_a_listener_is_not_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!is_free(address).unwrap());
        drop(listener);
    }

    #[test]
    fn processes_that_start_meanwhile_keep_no_port() {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        Command::new("true").current_dir("/").status().unwrap();
                    }
                });
            }
            let bound =
                (0..2000).map(|_| TcpListener::bind(free_port().unwrap()).map(drop)).find(Result::is_err);
            over.store(true, Ordering::Relaxed);
            assert!(bound.is_none(), "{bound:?}");
        });
    }
}
