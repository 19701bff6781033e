//! The rules for the tunnel's packets, in a table of nftables of our own.
//!
//! Only the worker node's packets may enter the tunnel. The kernel takes a VXLAN packet with the right id and port from any
//! source: a fixed remote end and no learning limit what is *sent*. And no packet of the tunnel is tracked: connection tracking
//! would spend time and table space on them, and drop them when the table is full.

use std::io;
use std::net::IpAddr;

use nix::errno::Errno;

use super::nftables::{
    APPEND, Batch, CREATE, DELETE_TABLE, NEW_CHAIN, NEW_RULE, NEW_TABLE, attribute, nested, number,
};

/// The name of the table, of both families.
const TABLE: &[u8] = b"secure-comms\0";

/// The hook that a chain is attached to.
#[derive(Clone, Copy)]
enum Hook {
    /// For packets to the tunnel, from any sender.
    Prerouting,
    /// For packets to the worker node.
    Output,
}

/// Whether connection tracking sees the tunnel's packets.
#[derive(Clone, Copy)]
enum Tracking {
    Off,
    AsUsual,
}

/// The tunnel, as its packets show it.
#[derive(Clone, Copy)]
struct Tunnel {
    worker_node: IpAddr,
    port: u16,
}

/// Drops all packets to `port` that `worker_node` did not send, and keeps the others out of connection tracking. Replaces our
/// table, if it exists, in one transaction: at no time is there no table.
///
/// Returns why the tunnel's packets are tracked, if the kernel has no `notrack`.
///
/// # Errors
/// The kernel refuses the rules. Then nothing has changed, and a tunnel must not be made: anyone could send into it.
pub(super) fn put_up(worker_node: IpAddr, port: u16) -> io::Result<Option<io::Error>> {
    let tunnel = Tunnel { worker_node, port };
    match write(tunnel, Tracking::Off) {
        Ok(()) => Ok(None),
        Err(error) => write(tunnel, Tracking::AsUsual).map(|()| Some(error)),
    }
}

fn write(tunnel: Tunnel, tracking: Tracking) -> io::Result<()> {
    let mut batch = Batch::default();
    delete_table(&mut batch);
    batch.put(NEW_TABLE, CREATE, &[attribute(attr::TABLE_NAME, TABLE)]);
    let mut put_chain = |hook, rules: &[Vec<Vec<u8>>]| {
        batch.put(NEW_CHAIN, CREATE, &chain(hook));
        for expressions in rules {
            batch.put(NEW_RULE, CREATE | APPEND, &rule(hook, expressions));
        }
    };
    // The order counts: what the first rule accepts, the second does not see. Of a packet in fragments only the first has a
    // port; without it the others are never put together.
    let ours = [tunnel.with_worker_node(Hook::Prerouting), tunnel.to_port(), tracking.off(), verdict(ACCEPT)];
    let foreign = [tunnel.to_port(), verdict(DROP)];
    put_chain(Hook::Prerouting, &[ours.concat(), foreign.concat()]);
    if matches!(tracking, Tracking::Off) {
        let sent = [tunnel.with_worker_node(Hook::Output), tunnel.to_port(), tracking.off()];
        put_chain(Hook::Output, &[sent.concat()]);
    }
    batch.send()
}

/// Removes the rules, if they exist.
pub(super) fn remove() -> io::Result<()> {
    let mut batch = Batch::default();
    delete_table(&mut batch);
    match batch.send() {
        // Without nftables in the kernel there are no rules.
        Err(error) if lacks_nftables(&error) => Ok(()),
        other => other,
    }
}

/// Whether the kernel has no nf_tables.
pub(super) fn lacks_nftables(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP))
}

/// Deletes the table. Makes it first, because deleting a missing one would fail the transaction.
fn delete_table(batch: &mut Batch) {
    batch.put(NEW_TABLE, CREATE, &[attribute(attr::TABLE_NAME, TABLE)]);
    batch.put(DELETE_TABLE, 0, &[attribute(attr::TABLE_NAME, TABLE)]);
}

impl Hook {
    fn chain(self) -> &'static [u8] {
        match self {
            Self::Prerouting => b"prerouting\0",
            Self::Output => b"output\0",
        }
    }

    /// NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT.
    fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Output => 3,
        }
    }
}

impl Tracking {
    /// The expression that turns it off, where it is.
    fn off(self) -> Vec<Vec<u8>> {
        match self {
            Self::Off => vec![expression(b"notrack\0", &[])],
            Self::AsUsual => Vec::new(),
        }
    }
}

impl Tunnel {
    /// Matches packets that the worker node sent, or that go to it.
    fn with_worker_node(self, hook: Hook) -> Vec<Vec<u8>> {
        let ((family, source, destination), address) = match self.worker_node {
            IpAddr::V4(address) => (IPV4, address.octets().to_vec()),
            IpAddr::V6(address) => (IPV6, address.octets().to_vec()),
        };
        let offset = match hook {
            Hook::Prerouting => source,
            Hook::Output => destination,
        };
        let length = u32::try_from(address.len()).unwrap_or(0);
        vec![meta(META_FAMILY), equals(&[family]), payload(NETWORK_HEADER, offset, length), equals(&address)]
    }

    /// Matches packets to the tunnel's port, of either family.
    fn to_port(self) -> Vec<Vec<u8>> {
        vec![
            meta(META_TRANSPORT),
            equals(&[UDP]),
            payload(TRANSPORT_HEADER, UDP_DESTINATION.0, UDP_DESTINATION.1),
            equals(&self.port.to_be_bytes()),
        ]
    }
}

/// Attribute types: NFTA_*.
mod attr {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const EXPRESSION_NAME: u16 = 1;
    pub(super) const EXPRESSION_DATA: u16 = 2;
    pub(super) const META_REGISTER: u16 = 1;
    pub(super) const META_KEY: u16 = 2;
    pub(super) const PAYLOAD_REGISTER: u16 = 1;
    pub(super) const PAYLOAD_BASE: u16 = 2;
    pub(super) const PAYLOAD_OFFSET: u16 = 3;
    pub(super) const PAYLOAD_LENGTH: u16 = 4;
    pub(super) const COMPARE_REGISTER: u16 = 1;
    pub(super) const COMPARE_OPERATION: u16 = 2;
    pub(super) const COMPARE_DATA: u16 = 3;
    pub(super) const DATA_VALUE: u16 = 1;
    pub(super) const DATA_VERDICT: u16 = 2;
    pub(super) const IMMEDIATE_REGISTER: u16 = 1;
    pub(super) const IMMEDIATE_DATA: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
}

/// NFT_REG_1, the register that all comparisons here use.
const REGISTER: u32 = 1;
/// NFT_REG_VERDICT.
const VERDICT: u32 = 0;
/// NF_DROP.
const DROP: u32 = 0;
/// NF_ACCEPT: for this chain, chains behind it may still drop the packet.
const ACCEPT: u32 = 1;
/// NFT_META_NFPROTO: the packet's family.
const META_FAMILY: u32 = 15;
/// NFT_META_L4PROTO: the packet's transport protocol.
const META_TRANSPORT: u32 = 16;
/// NFT_PAYLOAD_NETWORK_HEADER.
const NETWORK_HEADER: u32 = 1;
/// NFT_PAYLOAD_TRANSPORT_HEADER.
const TRANSPORT_HEADER: u32 = 2;
/// NFT_CMP_EQ.
const EQUAL: u32 = 0;
/// NFPROTO_IPV4, with the offsets of source and destination in its header.
const IPV4: (u8, u32, u32) = (2, 12, 16);
/// NFPROTO_IPV6, with the offsets of source and destination in its header.
const IPV6: (u8, u32, u32) = (10, 8, 24);
/// IPPROTO_UDP.
const UDP: u8 = 17;
/// Offset and length of the destination port in a UDP header.
const UDP_DESTINATION: (u32, u32) = (2, 2);

/// A chain of type filter at the priority of iptables' table "raw" (-300): before connection tracking.
fn chain(hook: Hook) -> [Vec<u8>; 4] {
    let place =
        [number(attr::HOOK_NUMBER, hook.number()), attribute(attr::HOOK_PRIORITY, &(-300_i32).to_be_bytes())];
    [
        attribute(attr::CHAIN_TABLE, TABLE),
        attribute(attr::CHAIN_NAME, hook.chain()),
        nested(attr::CHAIN_HOOK, &place),
        attribute(attr::CHAIN_TYPE, b"filter\0"),
    ]
}

fn rule(hook: Hook, expressions: &[Vec<u8>]) -> [Vec<u8>; 3] {
    [
        attribute(attr::RULE_TABLE, TABLE),
        attribute(attr::RULE_CHAIN, hook.chain()),
        nested(attr::RULE_EXPRESSIONS, expressions),
    ]
}

fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    let data = if data.is_empty() { Vec::new() } else { nested(attr::EXPRESSION_DATA, data) };
    nested(attr::LIST_ELEMENT, &[attribute(attr::EXPRESSION_NAME, name), data])
}

/// Loads a property of the packet into the register.
fn meta(key: u32) -> Vec<u8> {
    expression(b"meta\0", &[number(attr::META_REGISTER, REGISTER), number(attr::META_KEY, key)])
}

/// Loads bytes of a header into the register.
fn payload(base: u32, offset: u32, length: u32) -> Vec<u8> {
    let data = [
        number(attr::PAYLOAD_REGISTER, REGISTER),
        number(attr::PAYLOAD_BASE, base),
        number(attr::PAYLOAD_OFFSET, offset),
        number(attr::PAYLOAD_LENGTH, length),
    ];
    expression(b"payload\0", &data)
}

/// Continues with the next expression if the register has this value.
fn equals(value: &[u8]) -> Vec<u8> {
    let data = [
        number(attr::COMPARE_REGISTER, REGISTER),
        number(attr::COMPARE_OPERATION, EQUAL),
        nested(attr::COMPARE_DATA, &[attribute(attr::DATA_VALUE, value)]),
    ];
    expression(b"cmp\0", &data)
}

/// Ends the chain with this verdict.
fn verdict(code: u32) -> Vec<Vec<u8>> {
    let verdict = nested(attr::DATA_VERDICT, &[number(attr::VERDICT_CODE, code)]);
    let data = [number(attr::IMMEDIATE_REGISTER, VERDICT), nested(attr::IMMEDIATE_DATA, &[verdict])];
    vec![expression(b"immediate\0", &data)]
}
