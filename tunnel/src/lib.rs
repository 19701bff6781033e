//! Named byte streams over any link: `client -> Inbound(name) == link ==> Outbound(name) -> server`.
//!
//! The modules are in the order in which bytes pass through them. An [`inbound`] listens, and holds its clients until
//! there is a [`link`] on which a stream can be opened. An [`outbound`] connects to the server at the other end: it
//! [`dial`]s the addresses of its host name ([`names`]) in a [`mod@race`]. The [`mod@relay`] moves bytes between a
//! [`Socket`] and the stream, within the [`flow`] control of the connection, the peer's [`account`] and the task's [`budget`], and may pass them through an interceptor
//! ([`intercept`]). In a [`session`] a stream outlives the connection that carries it. A socket may live in another network namespace ([`netns`]).
//!
//! This crate knows names, phases and bytes; it does not know SSH. All of it runs in a tokio runtime of any flavour,
//! with time and I/O enabled.

pub mod inbound;

pub mod link;

pub mod outbound;

pub mod dial;

pub mod names;

pub mod race;

pub mod relay;

pub mod intercept;

mod queue;

pub mod budget;

pub mod account;

pub mod flow;

pub mod session;

mod socket;

pub mod netns;

mod backoff;

mod reminder;

pub use account::{Account, MemoryBudget};
pub use backoff::Backoff;
pub use flow::{Credits, Flow};
pub use inbound::Inbound;
pub use intercept::{FromServer, Interceptor, ToServer};
pub use link::{Event, Incoming, Link, OpenError, Receiver, Sender, Stream};
pub use names::Resolver;
pub use outbound::Outbounds;
pub use relay::{relay, relay_through};
pub use reminder::Reminder;
pub use session::Session;
pub use socket::Socket;
