//! Keeps the tunnel's packets out of connection tracking: it would spend time and table space on them, and drop them
//! when the table is full. Two rules of nftables, in a table of our own.

use std::io;
use std::net::IpAddr;

use super::nftables::{
    APPEND, Batch, CREATE, DELETE_TABLE, NEW_CHAIN, NEW_RULE, NEW_TABLE, attribute, nested, number,
};

/// The name of the table, of both families.
const TABLE: &[u8] = b"secure-comms\0";

/// The hook that a chain is attached to.
#[derive(Clone, Copy)]
enum Hook {
    /// For packets from the worker node.
    Prerouting,
    /// For packets to the worker node.
    Output,
}

/// Adds the rules. Replaces our table, if it exists.
pub(super) fn add(worker_node: IpAddr, port: u16) -> io::Result<()> {
    let mut batch = Batch::default();
    delete_table(&mut batch);
    batch.put(NEW_TABLE, CREATE, &[attribute(attr::TABLE_NAME, TABLE)]);
    for hook in [Hook::Prerouting, Hook::Output] {
        batch.put(NEW_CHAIN, CREATE, &chain(hook));
        batch.put(NEW_RULE, CREATE | APPEND, &rule(hook, worker_node, port));
    }
    batch.send()
}

/// Removes the rules, if they exist.
pub(super) fn remove() -> io::Result<()> {
    let mut batch = Batch::default();
    delete_table(&mut batch);
    match batch.send() {
        // Without nftables in the kernel there are no rules.
        Err(error) if matches!(error.raw_os_error(), Some(code) if ABSENT.contains(&code)) => Ok(()),
        other => other,
    }
}

const ABSENT: [i32; 2] = [nix::errno::Errno::EPROTONOSUPPORT as i32, nix::errno::Errno::EOPNOTSUPP as i32];

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
}

/// NFT_REG_1, the register that all expressions here use.
const REGISTER: u32 = 1;
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

/// A rule: no tracking for UDP packets to `port` that come from the worker node, or go to it.
fn rule(hook: Hook, worker_node: IpAddr, port: u16) -> [Vec<u8>; 3] {
    let ((family, source, destination), address) = match worker_node {
        IpAddr::V4(address) => (IPV4, address.octets().to_vec()),
        IpAddr::V6(address) => (IPV6, address.octets().to_vec()),
    };
    let offset = match hook {
        Hook::Prerouting => source,
        Hook::Output => destination,
    };
    let length = u32::try_from(address.len()).unwrap_or(0);
    let expressions = [
        meta(META_FAMILY),
        equals(&[family]),
        payload(NETWORK_HEADER, offset, length),
        equals(&address),
        meta(META_TRANSPORT),
        equals(&[UDP]),
        payload(TRANSPORT_HEADER, UDP_DESTINATION.0, UDP_DESTINATION.1),
        equals(&port.to_be_bytes()),
        expression(b"notrack\0", &[]),
    ];
    [
        attribute(attr::RULE_TABLE, TABLE),
        attribute(attr::RULE_CHAIN, hook.chain()),
        nested(attr::RULE_EXPRESSIONS, &expressions),
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
