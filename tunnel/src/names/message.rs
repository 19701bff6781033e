//! DNS messages (RFC 1035 4): a question for addresses, and what a name server answers. The crate `domain` writes and reads
//! them; this file decides what an answer means.

use std::net::IpAddr;

use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::{Message, MessageBuilder, Name, Question as Query};
use domain::rdata::{A, Aaaa};
use secure_comms_protocol::limits::ADDRESSES_MAX;

/// A kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
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
    id: u16,
    query: Query<Name<Vec<u8>>>,
    bytes: Vec<u8>,
}

impl Question {
    /// Asks for one kind of address. `name` is absolute, without the dot at its end. `None` if it can't be a name in DNS.
    pub(super) fn new(id: u16, name: &str, family: Family) -> Option<Self> {
        let name = Name::vec_from_str(name).ok().filter(|name| !name.is_root())?;
        let record = match family {
            Family::V4 => Rtype::A,
            Family::V6 => Rtype::AAAA,
        };
        let query = Query::new(name, record, Class::IN);
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(id);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push(&query).ok()?;
        Some(Self { family, id, query, bytes: builder.finish() })
    }

    /// The message to send.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads a message from the server that was asked.
    pub(super) fn reply(&self, message: &[u8]) -> Reply {
        let Ok(message) = Message::from_slice(message) else { return Reply::Unrelated };
        let (header, rcode) = (message.header(), message.header().rcode());
        if header.id() != self.id || !header.qr() || header.opcode() != Opcode::QUERY {
            return Reply::Unrelated;
        }
        match (message.header_counts().qdcount(), message.sole_question()) {
            (1, Ok(question)) if question == self.query => {}
            // Servers that can't read a question, or refuse it, need not repeat it.
            (0, _) if rcode != Rcode::NOERROR => {}
            _ => return Reply::Unrelated,
        }
        match rcode {
            Rcode::NOERROR => {}
            Rcode::NXDOMAIN => return Reply::Answer(Answer::NoSuchName),
            other => return Reply::Fault(other.to_string()),
        }
        let (addresses, whole) = self.addresses(message);
        match addresses {
            found if header.tc() => Reply::Truncated(found),
            _ if !whole => Reply::Fault("a damaged answer".to_owned()),
            none if none.is_empty() => Reply::Answer(Answer::NoAddress),
            found => Reply::Answer(Answer::Addresses(found)),
        }
    }

    /// The addresses in the answers, whatever alias they belong to; and whether all answers could be read.
    fn addresses(&self, message: &Message<[u8]>) -> (Vec<IpAddr>, bool) {
        let mut addresses = Vec::new();
        let Ok(answers) = message.answer() else { return (addresses, false) };
        let mut keep = |address: IpAddr| {
            if addresses.len() < ADDRESSES_MAX && !addresses.contains(&address) {
                addresses.push(address);
            }
        };
        let whole = match self.family {
            Family::V4 => answers
                .limit_to_in::<A>()
                .try_for_each(|record| record.map(|record| keep(record.data().addr().into()))),
            Family::V6 => answers
                .limit_to_in::<Aaaa>()
                .try_for_each(|record| record.map(|record| keep(record.data().addr().into()))),
        };
        (addresses, whole.is_ok())
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
