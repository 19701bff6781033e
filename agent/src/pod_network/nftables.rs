//! Messages of nftables: a transaction of requests, and their attributes.
//!
//! Built here, because the crates for nftables are GPL, or bind C libraries, or support neither `notrack` nor transactions. The
//! numbers are from the kernel's `netlink.h`, `nfnetlink.h` and `nf_tables.h`.

use std::io;

use rtnetlink::packet_core::{ErrorBuffer, NLMSG_ERROR, NetlinkBuffer};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

const REQUEST: u16 = 1;
const ACK: u16 = 4;
pub(super) const CREATE: u16 = 0x400;
pub(super) const APPEND: u16 = 0x800;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
pub(super) const NEW_TABLE: u16 = NFTABLES << 8;
pub(super) const DELETE_TABLE: u16 = NFTABLES << 8 | 2;
pub(super) const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
pub(super) const NEW_RULE: u16 = NFTABLES << 8 | 6;
/// NFPROTO_INET: rules that see both IPv4 and IPv6.
const INET: u8 = 1;
const NESTED: u16 = 1 << 15;

/// Requests of one transaction: all or none.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    requests: u32,
}

impl Batch {
    /// Adds a request.
    pub(super) fn put(&mut self, kind: u16, flags: u16, attributes: &[Vec<u8>]) {
        self.requests += 1;
        let header = Header { kind, flags: flags | ACK, sequence: self.requests, family: INET, resource: 0 };
        self.bytes.extend(message(&header, &attributes.concat()));
    }

    /// Sends the transaction. Does not wait: the kernel executes and answers it before the socket's `send` returns.
    ///
    /// # Errors
    /// A request failed, or was not acknowledged; then none has an effect.
    pub(super) fn send(self) -> io::Result<()> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        let mark = |kind, sequence| {
            message(&Header { kind, flags: 0, sequence, family: 0, resource: NFTABLES }, &[])
        };
        let (begin, end) = (mark(BATCH_BEGIN, 0), mark(BATCH_END, self.requests + 1));
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
            Err(io::Error::other(format!(
                "missing ACKs: {done} of {} requests were acknowledged",
                self.requests
            )))
        }
    }
}

/// Counts the requests that succeeded.
///
/// # Errors
/// The first request that failed, or a malformed reply.
fn acknowledged(mut answers: &[u8]) -> io::Result<u32> {
    let malformed = |_| io::Error::other("malformed netlink reply");
    let mut done = 0;
    while !answers.is_empty() {
        let answer = NetlinkBuffer::new_checked(answers).map_err(malformed)?;
        if answer.message_type() == NLMSG_ERROR {
            let error = ErrorBuffer::new_checked(answer.payload()).map_err(malformed)?;
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

/// The variable parts of a netlink header and of the nfnetlink header behind it.
struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    /// The subsystem, in the messages that begin and end a batch.
    resource: u16,
}

/// Bytes of both headers.
const HEADERS: usize = 20;

fn message(header: &Header, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADERS + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADERS + attributes.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(header.kind.to_ne_bytes());
    bytes.extend((header.flags | REQUEST).to_ne_bytes());
    bytes.extend(header.sequence.to_ne_bytes());
    // The port id of the sender: the kernel fills it in.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([header.family, 0]);
    bytes.extend(header.resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// One attribute, padded to a multiple of four.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds a number.
pub(super) fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// An attribute that holds attributes.
pub(super) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}
