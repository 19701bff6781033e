//! The values of a `pod-network` that exist only if valid.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The longest name of an interface, in bytes: IFNAMSIZ without its end.
const NAME_MAX: usize = 15;

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    pub(crate) const EXPECTED: &str = "an address with its prefix length, such as 10.244.1.7/24";

    /// A prefix; none if `length` is too long for the address.
    pub(crate) fn new(address: IpAddr, length: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (length <= bits).then_some(Self { address, length })
    }

    /// The prefix of the default route of an address' family.
    pub(crate) fn default_of(address: IpAddr) -> Self {
        let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        Self { address: any, length: 0 }
    }

    /// The address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// How many bits of the address name its network.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether the prefix is a single address.
    pub fn is_host(&self) -> bool {
        self.length == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// The network, with the host's bits cleared.
    pub fn network(&self) -> Self {
        let address = match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        };
        Self { address, length: self.length }
    }

    /// Whether `address` is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && Self { address, length: self.length }.network() == self.network()
    }
}

impl FromStr for Prefix {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (address, length) = text.split_once('/').ok_or(())?;
        let address: IpAddr = address.parse().map_err(drop)?;
        // The parser would accept a sign.
        let length: u8 = if length.starts_with('+') { Err(()) } else { length.parse().map_err(drop) }?;
        match (address, address.to_canonical()) {
            // Go's netlink library gives an IPv4 address 16 bytes, but counts the length from its last 4. So the
            // cloud-api-adaptor writes ::ffff:0.0.0.0/0 for the default route. Others count it from the first.
            (IpAddr::V6(_), address @ IpAddr::V4(_)) => match length {
                0..=32 => Self::new(address, length),
                _ => length.checked_sub(96).and_then(|length| Self::new(address, length)),
            },
            (address, _) => Self::new(address, length),
        }
        .ok_or(())
    }
}

/// An address alone. An IPv4 address that is written as an IPv6 one is an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address(pub(super) IpAddr);

impl Address {
    pub(super) const EXPECTED: &str = "an address";
}

impl FromStr for Address {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().map(|address: IpAddr| Self(address.to_canonical())).map_err(drop)
    }
}

/// The destination of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// All addresses of the gateway's family, or of the pod's.
    Default,
    /// All addresses of a network.
    Network(Prefix),
}

impl Destination {
    pub(super) const EXPECTED: &str =
        "'default', or an address with its prefix length, such as 10.244.0.0/16";
}

impl FromStr for Destination {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if ["default", "any", "all"].iter().any(|word| word.eq_ignore_ascii_case(text)) {
            return Ok(Self::Default);
        }
        if let Ok(Address(address)) = text.parse() {
            let host = if address.is_ipv4() { 32 } else { 128 };
            let length = if address.is_unspecified() { 0 } else { host };
            return Prefix::new(address, length).map(Self::Network).ok_or(());
        }
        text.parse().map(Self::Network)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// The name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The expected form, for errors.
    pub const EXPECTED: &str = "an interface's name: at most 15 bytes, no '/', ':', '%' or blank";

    /// The name, as the kernel takes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        // The kernel would replace '%d' by a number, and refuses the others.
        let strange = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
        let valid =
            (1..=NAME_MAX).contains(&text.len()) && !matches!(text, "." | "..") && !text.contains(strange);
        if valid { Ok(Self(text.to_owned())) } else { Err(()) }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareAddress([u8; 6]);

impl HardwareAddress {
    pub(super) const EXPECTED: &str = "an Ethernet address, such as 0a:58:0a:f4:01:07";

    /// The bytes, in wire order.
    pub fn bytes(&self) -> &[u8; 6] {
        &self.0
    }
}

impl FromStr for HardwareAddress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let byte = |text: &str| match text.len() {
            // from_str_radix would accept a sign.
            2 if text.bytes().all(|c| c.is_ascii_hexdigit()) => u8::from_str_radix(text, 16).map_err(drop),
            _ => Err(()),
        };
        let bytes: Vec<u8> = text.split([':', '-']).map(byte).collect::<Result<_, _>>()?;
        bytes.try_into().map(Self).map_err(drop)
    }
}
