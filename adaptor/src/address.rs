//! The address of a pod VM's agent.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use secure_comms_protocol::limits::SSH_PORT;
use secure_comms_protocol::tag::{Host, Tag};
use secure_comms_protocol::{OutboundTag, Target};

/// `HOST[:PORT]`: a name, an IPv4 address, or an IPv6 address with or without brackets; the port is 2222 unless given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Host name or IP address.
    pub host: Host,
    /// TCP port, never 0.
    pub port: u16,
}

/// The text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected HOST, HOST:PORT, an IPv6 address or [IPv6]:PORT (port 1 to 65535, {SSH_PORT} if left out)")]
pub struct AddressError;

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Ok(ip) = text.parse::<Ipv6Addr>() {
            return Ok(Self { host: Host::Ip(IpAddr::V6(ip)), port: SSH_PORT });
        }
        let has_port = if text.starts_with('[') { text.contains("]:") } else { text.contains(':') };
        let (host, port) = if has_port {
            host_port(text).ok_or(AddressError)?
        } else {
            host_port(&format!("{text}:{SSH_PORT}")).ok_or(AddressError)?
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Target::Tcp { host: self.host.clone(), port: self.port }.fmt(f)
    }
}

/// Parses `HOST:PORT` by the rules of an outbound tag, so that there is one definition of a host. `None` if it is
/// invalid.
pub fn host_port(text: &str) -> Option<(Host, u16)> {
    if !text.contains(':') || text.contains(char::is_whitespace) {
        return None;
    }
    match OutboundTag::parse(&format!("BOTH_PHASES:X:{text}")).ok()?.target {
        Target::Tcp { host, port } => Some((host, port)),
        Target::Unix(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_port_of_an_address_is_2222() {
        for (text, shown) in [
            ("vm", "vm:2222"),
            ("vm.example:22", "vm.example:22"),
            ("10.0.0.1", "10.0.0.1:2222"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("::1", "[::1]:2222"),
            ("[fd00::2]", "[fd00::2]:2222"),
            ("[fd00::2]:65535", "[fd00::2]:65535"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse(), Ok(address));
        }
    }

    #[test]
    fn a_text_that_is_not_an_address_is_refused() {
        for text in [
            "",
            ":22",
            "vm:",
            "vm:0",
            "vm:65536",
            "vm:x",
            "[::1",
            "[::1]x",
            "[::1]:",
            "::1]:22",
            "a b",
            "1.2.3",
            "/run/x",
            "/run/x:22",
            "user@vm",
            "ssh://vm",
            "[vm]:22",
            "vm:22:22",
            "[fe80::1%eth0]",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_text_parses_back_from_its_display(text in "\\PC{0,12}|[a-z0-9.:\\[\\]]{0,30}") {
            if let Ok(address) = text.parse::<Address>() {
                proptest::prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
