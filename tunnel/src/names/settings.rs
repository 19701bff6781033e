//! `resolv.conf(5)`: the name servers, and how they are asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use nix::net::if_::if_nametoindex;

/// Name servers that are used, as in glibc and musl.
const SERVERS_MAX: usize = 3;
/// Suffixes that are tried, as many as Kubernetes allows.
const SEARCH_MAX: usize = 32;
const NDOTS_MAX: usize = 15;
const ATTEMPTS_MAX: usize = 5;
const TIMEOUT_MAX: u64 = 30;

/// What a `resolv.conf` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// Name servers, at least one, in the order in which they are asked.
    pub(super) servers: Vec<SocketAddr>,
    /// Suffixes, without a dot at the end. The empty one is the root.
    search: Vec<String>,
    ndots: usize,
    /// Timeout of one question to one server.
    pub(super) timeout: Duration,
    /// Times that each server is asked.
    pub(super) attempts: usize,
    /// Asks over TCP only.
    pub(super) tcp: bool,
    /// Asks for IPv6 addresses, too.
    pub(super) ipv6: bool,
}

impl Settings {
    /// Reads a `resolv.conf`; each server listens on `port`. What is not known is ignored, as libc does.
    pub(super) fn parse(text: &str, port: u16) -> Self {
        let mut settings = Self {
            servers: Vec::new(),
            search: Vec::new(),
            ndots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            tcp: false,
            ipv6: true,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| socket_address(word, port));
                    settings.servers.extend(server.filter(|_| settings.servers.len() < SERVERS_MAX));
                }
                // The last such line counts.
                Some("search") => settings.search = words.take(SEARCH_MAX).map(suffix).collect(),
                Some("domain") => settings.search = words.take(1).map(suffix).collect(),
                Some("options") => words.for_each(|word| settings.option(word)),
                _ => {}
            }
        }
        if settings.servers.is_empty() {
            settings.servers.push((Ipv4Addr::LOCALHOST, port).into());
        }
        settings
    }

    fn option(&mut self, word: &str) {
        let (name, value) = word.split_once(':').unwrap_or((word, ""));
        match (name, value.parse::<u64>()) {
            ("ndots", Ok(n)) => self.ndots = usize::try_from(n).unwrap_or(NDOTS_MAX).min(NDOTS_MAX),
            ("timeout", Ok(n)) => self.timeout = Duration::from_secs(n.clamp(1, TIMEOUT_MAX)),
            ("attempts", Ok(n)) => {
                self.attempts = usize::try_from(n).unwrap_or(ATTEMPTS_MAX).clamp(1, ATTEMPTS_MAX);
            }
            ("use-vc", _) => self.tcp = true,
            ("no-aaaa", _) => self.ipv6 = false,
            _ => {}
        }
    }

    /// The absolute names that `name` may stand for, in the order in which they are asked for, as in glibc: one with many
    /// dots is tried as it is first, others with each suffix first. Never empty; without the dot at the end.
    pub(super) fn candidates(&self, name: &str) -> Vec<String> {
        if let Some(absolute) = name.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let as_it_is = name.to_owned();
        let suffixed = self.search.iter().map(|suffix| match suffix.as_str() {
            "" => name.to_owned(),
            suffix => format!("{name}.{suffix}"),
        });
        let mut all: Vec<String> = if name.matches('.').count() >= self.ndots {
            std::iter::once(as_it_is).chain(suffixed).collect()
        } else {
            suffixed.chain([as_it_is]).collect()
        };
        let mut seen = Vec::new();
        all.retain(|candidate| {
            let new = !seen.contains(candidate);
            seen.push(candidate.clone());
            new
        });
        all
    }
}

fn suffix(word: &str) -> String {
    word.trim_matches('.').to_owned()
}

/// An IP address as the files of the resolver hold it: one of IPv6 may name its interface.
pub(super) fn socket_address(text: &str, port: u16) -> Option<SocketAddr> {
    let Some((ip, interface)) = text.split_once('%') else {
        return text.parse::<IpAddr>().ok().map(|ip| (ip, port).into());
    };
    let scope = interface.parse().ok().or_else(|| if_nametoindex(interface).ok())?;
    Some(SocketAddrV6::new(ip.parse::<Ipv6Addr>().ok()?, port, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(resolv_conf: &str, name: &str) -> Vec<String> {
        Settings::parse(resolv_conf, 53).candidates(name)
    }

    #[test]
    fn servers_and_options_are_read_as_libc_reads_them() {
        let settings = Settings::parse(
            "# comment\n; comment\nnameserver\t10.0.0.2 # the first\r\n nameserver ::1\nnameserver x\n\
             nameserver fe80::1%1\nnameserver 10.0.0.3\n\
             options ndots:5 timeout:1\toptions attempts:9 rotate use-vc edns0 no-aaaa ndots:x\n",
            53,
        );
        let servers: Vec<String> = settings.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.0.0.2:53", "[::1]:53", "[fe80::1%1]:53"]);
        assert_eq!((settings.ndots, settings.timeout.as_secs(), settings.attempts), (5, 1, 5));
        assert!(settings.tcp && !settings.ipv6);
    }

    #[test]
    fn without_a_name_server_it_is_this_machine() {
        for text in ["", "nameserver\n", "nameserver 1.2.3\n", "search a"] {
            let settings = Settings::parse(text, 53);
            assert_eq!(settings.servers, ["127.0.0.1:53".parse().unwrap()], "{text:?}");
            assert_eq!((settings.ndots, settings.timeout.as_secs(), settings.attempts), (1, 5, 2));
        }
    }

    #[test]
    fn a_server_names_its_interface_by_name_or_number() {
        let one = socket_address("fe80::1%1", 53).unwrap();
        assert_eq!(socket_address("fe80::1%lo", 53), Some(one));
        assert_eq!(socket_address("fe80::1%nosuch", 53), None);
        assert_eq!(socket_address("127.0.0.1%lo", 53), None);
    }

    #[test]
    fn suffixes_come_first_for_names_with_few_dots() {
        let kubernetes = "search ns.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n";
        assert_eq!(
            candidates(kubernetes, "kbs.ns"),
            ["kbs.ns.ns.svc.cluster.local", "kbs.ns.svc.cluster.local", "kbs.ns.cluster.local", "kbs.ns"]
        );
        assert_eq!(candidates("search a b", "kbs.x"), ["kbs.x", "kbs.x.a", "kbs.x.b"]);
        assert_eq!(candidates("search a b", "kbs"), ["kbs.a", "kbs.b", "kbs"]);
        assert_eq!(candidates("search a b", "kbs."), ["kbs"]);
        assert_eq!(candidates("domain a b\n", "kbs"), ["kbs.a", "kbs"]);
        assert_eq!(candidates("search a\ndomain c.\n", "kbs"), ["kbs.c", "kbs"], "the last line counts");
    }

    #[test]
    fn the_root_as_a_suffix_is_the_name_as_it_is() {
        assert_eq!(candidates("search .\noptions ndots:5", "kbs.x"), ["kbs.x"]);
        assert_eq!(candidates("search . a", "kbs"), ["kbs", "kbs.a"]);
    }

    #[test]
    fn a_long_list_of_suffixes_is_used() {
        let long: Vec<String> = (0..40).map(|n| format!("a-rather-long-suffix-{n}.example")).collect();
        let all = candidates(&format!("search {}", long.join("  ")), "kbs");
        assert_eq!(all.len(), SEARCH_MAX + 1);
    }
}
