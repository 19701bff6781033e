//! Named byte streams over any link: `client -> Inbound(name) == link ==> Outbound(name) -> server`.
//!
//! In the order data passes through: an [`inbound`] listens and holds its clients until there is a
//! [`link`] to open a stream on; the [`mod@relay`] moves bytes between a [`socket`] and the stream, governed by
//! the [`flow`] control of the connection; an [`outbound`] connects to the server at the other end, and may have
//! them looked at on their way ([`intercept`]). A socket may live in another network namespace ([`netns`]). This crate knows names, phases and bytes, not SSH.

pub mod backoff;
pub mod flow;
pub mod inbound;
pub mod intercept;
pub mod link;
pub mod netns;
pub mod outbound;
mod queue;
pub mod relay;
pub mod socket;

pub use backoff::Backoff;
pub use flow::{Credits, Flow};
pub use inbound::Inbound;
pub use intercept::{FromServer, Interceptor, ToServer};
pub use link::{Event, Incoming, Link, OpenError, Receiver, Sender, Stream};
pub use outbound::Outbounds;
pub use relay::{relay, relay_through};
pub use socket::Socket;
