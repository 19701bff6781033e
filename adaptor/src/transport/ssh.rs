//! The SSH client: one connection, from TCP to authentication. The only room of the adaptor that names
//! russh.

mod phase;

mod admission;

mod auth_hold;

mod error;

mod handler;

mod client;

mod greeting;

pub(crate) use self::admission::Admission;
pub(crate) use self::auth_hold::{AuthHold, AuthLock};
pub(crate) use self::client::{Dial, Flag, SshConnection, connect_attestation, connect_kubernetes};
pub(crate) use self::error::ConnectError;
pub use self::greeting::{Greeting, GreetingError, greeting};
pub(crate) use self::handler::{AgentLink, TransportEnd};

pub(crate) use self::phase::ClientPhase;

/// A session with an agent.
pub(crate) type AgentSession = secure_comms_tunnel::Session<AgentLink<secure_comms_protocol::Kubernetes>>;
