//! What is drawn at random for a scene: ports and the pod's id.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Result, bail};

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
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port is free")
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
