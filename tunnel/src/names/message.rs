//! DNS messages (RFC 1035 4): a question for addresses, and what a name server answers.
//!
//! An answer comes from the network. It is read in one pass that follows no pointer, so that nothing in it can make the
//! reader loop or allocate much.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use secure_comms_protocol::limits::ADDRESSES_MAX;

const HEADER: usize = 12;
const LABEL_MAX: usize = 63;
/// Longest name as text, without the dot at its end.
const NAME_MAX: usize = 253;

const RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const RCODE: u16 = 0x000f;
const CLASS_IN: u16 = 1;

/// A kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn record(self) -> u16 {
        match self {
            Self::V4 => 1,
            Self::V6 => 28,
        }
    }

    fn address(self, data: &[u8]) -> Option<IpAddr> {
        match self {
            Self::V4 => <[u8; 4]>::try_from(data).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
            Self::V6 => <[u8; 16]>::try_from(data).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        }
    }
}

/// What a name server says about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Its addresses of the kind that was asked for, at least one and at most [`ADDRESSES_MAX`].
    Addresses(Vec<IpAddr>),
    /// The name exists, without an address of this kind.
    NoAddress,
    /// The name does not exist.
    NoSuchName,
}

/// What a message means to the one who asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Answer(Answer),
    /// The answer did not fit; with the addresses that did.
    Truncated(Vec<IpAddr>),
    /// The server can't or won't answer, or the answer is damaged.
    Fault(String),
    /// Not an answer to this question.
    Unrelated,
}

/// A question for the addresses of a name.
#[derive(Clone, Debug)]
pub(super) struct Question {
    family: Family,
    bytes: Vec<u8>,
}

impl Question {
    /// Asks for one kind of address. `name` is absolute, without the dot at its end. `None` if it can't be a name in DNS.
    pub(super) fn new(id: u16, name: &str, family: Family) -> Option<Self> {
        if name.is_empty() || name.len() > NAME_MAX {
            return None;
        }
        let mut bytes = Vec::with_capacity(HEADER + name.len() + 6);
        // The identifier, the flags, one question and nothing else.
        for word in [id, RECURSION_DESIRED, 1, 0, 0, 0] {
            bytes.extend(word.to_be_bytes());
        }
        for label in name.split('.') {
            if label.is_empty() || label.len() > LABEL_MAX {
                return None;
            }
            bytes.push(u8::try_from(label.len()).ok()?);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend(family.record().to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        Some(Self { family, bytes })
    }

    /// The message to send.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads a message from the server that was asked.
    pub(super) fn reply(&self, message: &[u8]) -> Reply {
        let mut reader = Reader(message);
        let header: Option<Vec<u16>> = (0..HEADER / 2).map(|_| reader.word()).collect();
        let Some([id, flags, questions, answers, ..]) = header.as_deref() else { return Reply::Unrelated };
        let own_id = self.bytes.first_chunk().copied().map(u16::from_be_bytes);
        if Some(*id) != own_id || flags & RESPONSE == 0 || flags & OPCODE != 0 {
            return Reply::Unrelated;
        }
        let rcode = flags & RCODE;
        let own = self.bytes.get(HEADER..).unwrap_or_default();
        match questions {
            1 if reader.take(own.len()).is_some_and(|question| question.eq_ignore_ascii_case(own)) => {}
            // Servers that can't read a question, or refuse it, need not repeat it.
            0 if rcode != 0 => {}
            _ => return Reply::Unrelated,
        }
        match rcode {
            0 => {}
            3 => return Reply::Answer(Answer::NoSuchName),
            _ => return Reply::Fault(fault(rcode)),
        }
        let (addresses, whole) = self.addresses(reader, *answers);
        match addresses {
            found if flags & TRUNCATED != 0 => Reply::Truncated(found),
            _ if !whole => Reply::Fault("a damaged answer".to_owned()),
            none if none.is_empty() => Reply::Answer(Answer::NoAddress),
            found => Reply::Answer(Answer::Addresses(found)),
        }
    }

    /// The addresses in the answers, whatever alias they belong to; and whether all answers could be read.
    fn addresses(&self, mut reader: Reader<'_>, answers: u16) -> (Vec<IpAddr>, bool) {
        let mut addresses = Vec::new();
        for _ in 0..answers {
            let Some((record, class, data)) = reader.record() else { return (addresses, false) };
            if record != self.family.record() || class != CLASS_IN {
                continue;
            }
            let Some(address) = self.family.address(data) else { return (addresses, false) };
            if addresses.len() < ADDRESSES_MAX && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        (addresses, true)
    }
}

/// The text of a response code (RFC 6895 2.3).
fn fault(rcode: u16) -> String {
    match rcode {
        1 => "FORMERR".to_owned(),
        2 => "SERVFAIL".to_owned(),
        4 => "NOTIMP".to_owned(),
        5 => "REFUSED".to_owned(),
        other => format!("response code {other}"),
    }
}

/// The bytes of a message that are not read yet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn word(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn skip_name(&mut self) -> Option<()> {
        loop {
            match usize::from(self.byte()?) {
                0 => return Some(()),
                // A pointer to the rest of the name ends it here.
                0xc0.. => return self.byte().map(drop),
                length @ ..=LABEL_MAX => drop(self.take(length)?),
                _ => return None,
            }
        }
    }

    /// The type, the class and the data of the next record.
    fn record(&mut self) -> Option<(u16, u16, &'a [u8])> {
        self.skip_name()?;
        let (record, class) = (self.word()?, self.word()?);
        let _time_to_live = self.take(4)?;
        let length = self.word()?;
        Some((record, class, self.take(length.into())?))
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
