//! Names of routing protocols, scopes and neighbour states.
//!
//! The cloud-api-adaptor writes the names that Go's netlink library gives the numbers; people write those of iproute2. Both
//! are read, and numbers.

use std::ops::RangeInclusive;

/// RTPROT_BOOT: the default of `ip route add`.
pub(super) const PROTOCOL_BOOT: u8 = 3;
/// RT_SCOPE_LINK: the destination is on the link itself.
pub(super) const SCOPE_LINK: u8 = 253;
/// NUD_PERMANENT.
pub(super) const STATE_PERMANENT: u16 = 0x80;

/// A kind of number that has names.
pub(super) struct Names {
    /// The kind, in messages.
    pub(super) kind: &'static str,
    pub(super) range: RangeInclusive<u16>,
    /// What is taken if there is no usable value, in messages.
    pub(super) default: &'static str,
    names: &'static [(&'static str, u16)],
}

/// RTPROT_*: who made a route.
pub(super) const PROTOCOLS: Names = Names {
    kind: "routing protocol",
    range: 0..=0xff,
    default: "'boot'",
    names: &[
        ("unspec", 0),
        ("redirect", 1),
        ("kernel", 2),
        ("boot", PROTOCOL_BOOT as u16),
        ("static", 4),
        ("gated", 8),
        ("ra", 9),
        ("mrt", 10),
        ("zebra", 11),
        ("bird", 12),
        ("dnrouted", 13),
        ("xorp", 14),
        ("ntk", 15),
        ("dhcp", 16),
        ("mrouted", 17),
        ("keepalived", 18),
        ("babel", 42),
        ("openr", 99),
        ("bgp", 186),
        ("isis", 187),
        ("ospf", 188),
        ("rip", 189),
        ("eigrp", 192),
    ],
};

/// RT_SCOPE_*: how far away a destination is.
pub(super) const SCOPES: Names = Names {
    kind: "scope",
    range: 0..=0xff,
    default: "the route's own scope",
    names: &[
        ("universe", 0),
        ("global", 0),
        ("site", 200),
        ("link", SCOPE_LINK as u16),
        ("host", 254),
        ("nowhere", 255),
    ],
};

/// NUD_*: what is known about a neighbour.
pub(super) const STATES: Names = Names {
    kind: "neighbour state",
    range: 0..=u16::MAX,
    default: "'permanent'",
    names: &[
        ("none", 0),
        ("incomplete", 0x01),
        ("reachable", 0x02),
        ("stale", 0x04),
        ("delay", 0x08),
        ("probe", 0x10),
        ("failed", 0x20),
        ("noarp", 0x40),
        ("permanent", STATE_PERMANENT),
    ],
};

impl Names {
    /// The number of a name in any case, or of a text that is a number.
    pub(super) fn number(&self, text: &str) -> Option<u16> {
        let known = self.names.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        known.map(|(_, number)| *number).or_else(|| {
            let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
            // from_str_radix would accept a sign.
            let number = u16::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))?;
            self.range.contains(&number).then_some(number)
        })
    }
}
