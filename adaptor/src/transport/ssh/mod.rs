//! The SSH client. With the keys, the only room of the adaptor that names russh.

mod error;

mod client;

mod handler;

pub(crate) use self::client::*;
pub(crate) use self::error::ConnectError;
pub(crate) use self::handler::TransportEnd;
