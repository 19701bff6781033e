//! Keeps the tunnel's packets out of connection tracking: it would spend time and table space on them, and drop them
//! when the table is full.
//!
//! Two rules of nftables, in a table of our own. The messages are built here: the crates that know nftables are GPL, or
//! bind C libraries, or know neither this expression nor transactions. See the kernel's `nf_tables.h`, `nfnetlink.h`.

use std::io;
use std::net::IpAddr;

use rtnetlink::packet_core::{ErrorBuffer, NLMSG_ERROR, NetlinkBuffer};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// The name of the table, of both families.
const TABLE: &[u8] = b"secure-comms\0";

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
const NEW_TABLE: u16 = NFTABLES << 8;
const DELETE_TABLE: u16 = NFTABLES << 8 | 2;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NEW_RULE: u16 = NFTABLES << 8 | 6;
/// NFPROTO_INET: rules that see both IPv4 and IPv6.
const INET: u8 = 1;
const NESTED: u16 = 1 << 15;

/// Where a rule looks.
#[derive(Clone, Copy)]
enum Hook {
    /// What comes from the worker node.
    Prerouting,
    /// What goes to the worker node.
    Output,
}

/// Adds the rules, in place of what is there of ours.
pub(super) fn add(worker_node: IpAddr, port: u16) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.forget_table();
    batch.put(NEW_TABLE, CREATE, &[attribute(1, TABLE)]);
    for hook in [Hook::Prerouting, Hook::Output] {
        batch.put(NEW_CHAIN, CREATE, &chain(hook));
        batch.put(NEW_RULE, CREATE | APPEND, &rule(hook, worker_node, port));
    }
    batch.send()
}

/// Removes the rules, if they are there.
pub(super) fn remove() -> io::Result<()> {
    let mut batch = Batch::default();
    batch.forget_table();
    match batch.send() {
        // Without nftables in the kernel there are no rules.
        Err(error) if matches!(error.raw_os_error(), Some(code) if ABSENT.contains(&code)) => Ok(()),
        other => other,
    }
}

const ABSENT: [i32; 2] = [nix::errno::Errno::EPROTONOSUPPORT as i32, nix::errno::Errno::EOPNOTSUPP as i32];

/// Requests of one transaction: all or none.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    requests: u32,
}

impl Batch {
    /// Whether the table is there or not: made, then deleted.
    fn forget_table(&mut self) {
        self.put(NEW_TABLE, CREATE, &[attribute(1, TABLE)]);
        self.put(DELETE_TABLE, 0, &[attribute(1, TABLE)]);
    }

    fn put(&mut self, kind: u16, flags: u16, attributes: &[Vec<u8>]) {
        self.requests += 1;
        let request = message(kind, flags | ACK, self.requests, INET, 0, &attributes.concat());
        self.bytes.extend(request);
    }

    /// The kernel does what it is asked, and has answered, by the time the request is sent.
    fn send(self) -> io::Result<()> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        let begin = message(BATCH_BEGIN, 0, 0, 0, NFTABLES, &[]);
        let end = message(BATCH_END, 0, self.requests + 1, 0, NFTABLES, &[]);
        socket.send(&[begin, self.bytes, end].concat(), 0)?;
        let mut done = 0;
        loop {
            let answers = match socket.recv_from_full() {
                Ok((answers, _)) => answers,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            done += acknowledged(&answers)?;
        }
        if done == self.requests {
            Ok(())
        } else {
            Err(io::Error::other("the kernel did not answer all of it"))
        }
    }
}

/// How many requests succeeded; the first that failed is an error.
fn acknowledged(mut answers: &[u8]) -> io::Result<u32> {
    let strange = |_| io::Error::other("an answer of the kernel that is none");
    let mut done = 0;
    while !answers.is_empty() {
        let answer = NetlinkBuffer::new_checked(answers).map_err(strange)?;
        if answer.message_type() == NLMSG_ERROR {
            let error = ErrorBuffer::new_checked(answer.payload()).map_err(strange)?;
            if let Some(code) = error.code() {
                return Err(io::Error::from_raw_os_error(code.get().saturating_abs()));
            }
            done += 1;
        }
        let length = usize::try_from(answer.length()).unwrap_or(usize::MAX).next_multiple_of(4);
        answers = answers.get(length..).unwrap_or_default();
    }
    Ok(done)
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(20 + attributes.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | REQUEST).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel knows who we are.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// One attribute, padded to a multiple of four.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
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

/// A chain of type filter at the priority of iptables' table "raw" (-300): before connection tracking.
fn chain(hook: Hook) -> [Vec<u8>; 4] {
    let place = [number(1, hook.number()), attribute(2, &(-300_i32).to_be_bytes())];
    [attribute(1, TABLE), attribute(3, hook.chain()), nested(4, &place), attribute(7, b"filter\0")]
}

/// UDP, the port, and the worker node's address where the packet comes from or goes to: no tracking.
fn rule(hook: Hook, worker_node: IpAddr, port: u16) -> [Vec<u8>; 3] {
    let (family, offset, address) = match (worker_node, hook) {
        (IpAddr::V4(address), Hook::Prerouting) => (2, 12, address.octets().to_vec()),
        (IpAddr::V4(address), Hook::Output) => (2, 16, address.octets().to_vec()),
        (IpAddr::V6(address), Hook::Prerouting) => (10, 8, address.octets().to_vec()),
        (IpAddr::V6(address), Hook::Output) => (10, 24, address.octets().to_vec()),
    };
    let length = u32::try_from(address.len()).unwrap_or(0);
    let expressions = [
        meta(15),
        equals(&[family]),
        payload(1, offset, length),
        equals(&address),
        meta(16),
        equals(&[17]),
        payload(2, 2, 2),
        equals(&port.to_be_bytes()),
        expression(b"notrack\0", &[]),
    ];
    [attribute(1, TABLE), attribute(2, hook.chain()), nested(4, &expressions)]
}

fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    let data = if data.is_empty() { Vec::new() } else { nested(2, data) };
    nested(1, &[attribute(1, name), data])
}

/// Loads a fact about the packet into register 1: its family (15), its transport protocol (16).
fn meta(key: u32) -> Vec<u8> {
    expression(b"meta\0", &[number(1, 1), number(2, key)])
}

/// Loads bytes of the network header (1) or the transport header (2) into register 1.
fn payload(base: u32, offset: u32, length: u32) -> Vec<u8> {
    expression(b"payload\0", &[number(1, 1), number(2, base), number(3, offset), number(4, length)])
}

/// Goes on if register 1 has this value.
fn equals(value: &[u8]) -> Vec<u8> {
    expression(b"cmp\0", &[number(1, 1), number(2, 0), nested(3, &[attribute(1, value)])])
}
