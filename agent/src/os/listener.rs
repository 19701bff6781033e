//! The listening socket of the SSH server.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket};

/// Connections that may wait to be accepted; the kernel's limit (net.core.somaxconn) is lower on most systems.
const BACKLOG: u32 = 1024;

/// Binds the listener. `[::]` accepts IPv4 too, whatever net.ipv6.bindv6only says; where the kernel has no IPv6, it is
/// 0.0.0.0.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    if !(address.is_ipv6() && address.ip().is_unspecified()) {
        return TcpListener::bind(address).await;
    }
    match listen_dual(address) {
        Err(error) if no_ipv6(&error) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await,
        listener => listener,
    }
}

fn listen_dual(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    // As TcpListener::bind does: a restart must not wait for TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn no_ipv6(error: &io::Error) -> bool {
    // EAFNOSUPPORT has no kind of its own.
    error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32)
        || error.kind() == io::ErrorKind::AddrNotAvailable
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs `job` on a thread in a network namespace of its own, with these values of sysctls in net/ipv6/.
    fn in_namespace(sysctls: &[(&str, &str)], job: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
                // A child is in the namespace of the thread that starts it.
                assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
                for (name, value) in sysctls {
                    std::fs::write(format!("/proc/sys/net/ipv6/{name}"), value).unwrap();
                }
                job();
            });
            thread.join().unwrap();
        });
    }

    /// Listens on `address` and connects to it through each of `clients`; whether each was accepted.
    fn reaches(address: &str, clients: &[&str]) -> Vec<bool> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(listen(address.parse().unwrap())).unwrap();
        let port = listener.local_addr().unwrap().port();
        let reach = |client: &&str| TcpStream::connect(format!("{client}:{port}")).is_ok();
        clients.iter().map(reach).collect()
    }

    #[test]
    fn the_default_address_accepts_ipv4_whatever_the_sysctl_says() {
        for bindv6only in ["0", "1"] {
            in_namespace(&[("bindv6only", bindv6only)], || {
                assert_eq!(reaches("[::]:0", &["127.0.0.1", "[::1]"]), [true, true], "{bindv6only}");
            });
        }
    }

    #[test]
    fn an_address_of_one_family_is_left_alone() {
        in_namespace(&[("bindv6only", "1")], || {
            assert_eq!(reaches("[::1]:0", &["[::1]", "127.0.0.1"]), [true, false]);
            assert_eq!(reaches("0.0.0.0:0", &["[::1]", "127.0.0.1"]), [false, true]);
        });
    }

    #[test]
    fn without_ipv6_addresses_ipv4_is_served() {
        in_namespace(&[("conf/all/disable_ipv6", "1")], || {
            assert_eq!(reaches("[::]:0", &["127.0.0.1"]), [true]);
        });
    }
}
