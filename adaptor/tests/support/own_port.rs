//! A port for a test. The tests of the node and of the agent have it, too.

use std::sync::atomic::{AtomicU16, Ordering};

/// A port of 127.0.0.1 that no other test of this process gets, also once it is closed: the kernel gives out none below 32768.
///
/// Each process begins elsewhere, because several may run at a time. The probe does not listen: a process that another thread
/// starts holds a copy of each socket until its exec, and a listening copy would keep the port.
pub fn own_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id().wrapping_mul(97) % 20_000;
    for _ in 0..20_000 {
        let offset = (start + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % 20_000;
        let port = 10_000 + u16::try_from(offset).unwrap();
        let probe = tokio::net::TcpSocket::new_v4().unwrap();
        probe.set_reuseaddr(true).unwrap();
        if probe.bind((std::net::Ipv4Addr::LOCALHOST, port).into()).is_ok() {
            return port;
        }
    }
    panic!("no port is free");
}
