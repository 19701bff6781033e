//! Host names: `hosts(5)`, then the name servers of `resolv.conf(5)`.
//!
//! Both programs resolve names with this, not with libc. musl, which the agent is linked with, fails a name for which one of
//! its questions got no good answer, and blocks a thread for each lookup (docs/decisions/0022-name-resolution.md).

mod hosts;
mod message;
mod server;
mod settings;

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use secure_comms_protocol::limits::{ADDRESSES_MAX, NAME_GRACE, NAME_LOOKUP, NAME_SERVER_STAGGER};
use tokio::time::{Instant, timeout, timeout_at};

use crate::race::race;
use message::{Answer, Family, Question};
use settings::Settings;

/// The most that is read of a file of the resolver, in bytes.
const FILE_MAX: u64 = 4 * 1024 * 1024;
/// Port of a name server.
const DNS_PORT: u16 = 53;

/// Looks host names up. Its files are read for each name, so that a change counts at once.
#[derive(Clone, Debug)]
pub struct Resolver {
    hosts: PathBuf,
    resolv_conf: PathBuf,
    port: u16,
}

/// Why a host name has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Every name server that was asked says so.
    #[error("the host name {0} has no address")]
    NoAddress(String),
    /// It can't be known.
    #[error("looking up the host name {name}: {fault}")]
    Failed {
        /// The name.
        name: String,
        /// What the name servers did.
        fault: String,
    },
}

impl From<LookupError> for io::Error {
    fn from(error: LookupError) -> Self {
        let kind = match error {
            LookupError::NoAddress(_) => io::ErrorKind::NotFound,
            LookupError::Failed { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

impl Default for Resolver {
    fn default() -> Self {
        Self::with_files("/etc/hosts", "/etc/resolv.conf", DNS_PORT)
    }
}

impl Resolver {
    /// A resolver that reads these files, and whose name servers listen on `port`.
    pub fn with_files(hosts: impl Into<PathBuf>, resolv_conf: impl Into<PathBuf>, port: u16) -> Self {
        Self { hosts: hosts.into(), resolv_conf: resolv_conf.into(), port }
    }

    /// The addresses of a host: at least one and at most [`ADDRESSES_MAX`], IPv6 and IPv4 alternating (RFC 8305 4), each with
    /// `port`. If only one kind of address can be learned, that kind. Returns within [`NAME_LOOKUP`]. Dropping the future
    /// closes its sockets; there are no threads.
    ///
    /// # Errors
    /// The name has no address, or no name server says.
    pub async fn lookup(&self, name: &str, port: u16) -> Result<Vec<SocketAddr>, LookupError> {
        let mut found = match self.without_server(name) {
            Some(found) => found,
            None => self.ask_servers(name).await?.into_iter().map(|ip| (ip, 0).into()).collect(),
        };
        found = alternating(found);
        found.truncate(ADDRESSES_MAX);
        found.iter_mut().for_each(|address| address.set_port(port));
        Ok(found)
    }

    /// What needs no name server: an IP address, a name in the hosts file, and `localhost` (RFC 6761 6.3).
    fn without_server(&self, name: &str) -> Option<Vec<SocketAddr>> {
        if let Some(address) = settings::socket_address(name, 0) {
            return Some(vec![address]);
        }
        let name = name.strip_suffix('.').unwrap_or(name);
        let found = hosts::find(&read(&self.hosts), name);
        if !found.is_empty() {
            return Some(found);
        }
        let top = name.rsplit('.').next().unwrap_or_default();
        let local: [IpAddr; 2] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()];
        top.eq_ignore_ascii_case("localhost").then(|| local.map(|ip| (ip, 0).into()).to_vec())
    }

    async fn ask_servers(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let asker = Asker::new(Settings::parse(&read(&self.resolv_conf), self.port));
        let candidates = asker.settings.candidates(name);
        let end = Instant::now() + NAME_LOOKUP;
        let mut failed = None;
        let mut left = u32::try_from(candidates.len()).unwrap_or(u32::MAX);
        for candidate in candidates {
            // Each gets its share of the time: a suffix whose server is dead must not use up that of the next.
            let share = end.saturating_duration_since(Instant::now()) / left.max(1);
            left = left.saturating_sub(1);
            match asker.addresses(&candidate, share).await {
                Ok(found) if !found.is_empty() => return Ok(found),
                Ok(_) => {}
                Err(fault) => failed = Some(fault),
            }
        }
        let name = name.to_owned();
        Err(match failed {
            Some(fault) => LookupError::Failed { name, fault },
            None => LookupError::NoAddress(name),
        })
    }
}

/// One lookup's questions.
struct Asker {
    settings: Settings,
    /// Index of the server that answered last, which is asked first.
    first: AtomicUsize,
}

impl Asker {
    fn new(settings: Settings) -> Self {
        Self { settings, first: AtomicUsize::new(0) }
    }

    /// The addresses of an absolute name, of both kinds; none if it has none.
    async fn addresses(&self, name: &str, limit: Duration) -> Result<Vec<IpAddr>, String> {
        let v4 = self.ask(name, Family::V4, limit);
        if !self.settings.ipv6 {
            return v4.await.map(ips);
        }
        let v6 = self.ask(name, Family::V6, limit);
        tokio::pin!(v4, v6);
        let (one, other) = tokio::select! {
            v4 = &mut v4 => {
                let grace = grace(&v4, limit);
                (v4, timeout(grace, v6).await)
            }
            v6 = &mut v6 => {
                let grace = grace(&v6, limit);
                (v6, timeout(grace, v4).await)
            }
        };
        match (one, other) {
            (Ok(one), Ok(Ok(other))) => Ok([ips(one), ips(other)].concat()),
            // Either kind will do. The other's server may be broken for that kind only.
            (Ok(one @ Answer::Addresses(_)), _) | (_, Ok(Ok(one @ Answer::Addresses(_)))) => Ok(ips(one)),
            (Ok(Answer::NoSuchName), _) | (_, Ok(Ok(Answer::NoSuchName))) => Ok(Vec::new()),
            (Err(fault), _) | (_, Ok(Err(fault))) => Err(fault),
            (Ok(_), Err(_)) => Err(format!("no answer within {} ms", limit.as_millis())),
        }
    }

    /// Asks the servers for one kind of address of an absolute name: one after the other, each soon after the one before.
    async fn ask(&self, name: &str, family: Family, limit: Duration) -> Result<Answer, String> {
        let Some(question) = Question::new(rand::random(), name, family) else {
            return Ok(Answer::NoSuchName);
        };
        let Settings { servers, attempts, timeout, tcp, .. } = &self.settings;
        let first = self.first.load(Ordering::Relaxed);
        let order: Vec<SocketAddr> =
            servers.iter().cycle().skip(first).take(servers.len()).copied().collect();
        let tries = order.repeat(*attempts);
        // All servers are asked within half of the time.
        let shares = u32::try_from(2 * servers.len()).unwrap_or(u32::MAX);
        let stagger = NAME_SERVER_STAGGER.min(*timeout).min(limit / shares);
        let (each, tcp) = ((*timeout).min(limit), *tcp);
        let attempt = |server| server::ask(server, question.clone(), tcp, each);
        match timeout_at(Instant::now() + limit, race(tries, stagger, attempt, |_| true)).await {
            Ok(Ok((index, answer))) => {
                self.first.store((first + index) % servers.len(), Ordering::Relaxed);
                Ok(answer)
            }
            Ok(Err(faults)) => {
                let mut faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
                faults.truncate(servers.len());
                Err(faults.join(", "))
            }
            Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
        }
    }
}

/// How long the other kind of address is waited for after the answer for one.
fn grace(answer: &Result<Answer, String>, limit: Duration) -> Duration {
    match answer {
        Ok(Answer::Addresses(_) | Answer::NoSuchName) => NAME_GRACE.min(limit),
        Ok(Answer::NoAddress) | Err(_) => limit,
    }
}

fn ips(answer: Answer) -> Vec<IpAddr> {
    match answer {
        Answer::Addresses(ips) => ips,
        Answer::NoAddress | Answer::NoSuchName => Vec::new(),
    }
}

/// IPv6 and IPv4 alternating, IPv6 first. Where there is no IPv6, connecting fails at once.
fn alternating(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let (v6, v4): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv6);
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    let mut mixed = Vec::with_capacity(v6.len() + v4.len());
    loop {
        let before = mixed.len();
        mixed.extend(v6.next());
        mixed.extend(v4.next());
        if mixed.len() == before {
            return mixed;
        }
    }
}

/// The text of a file; empty if it can't be read, as libc has it.
fn read(path: &PathBuf) -> String {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log::warn!("resolver: reading {}: {error}; check the file", path.display()),
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
