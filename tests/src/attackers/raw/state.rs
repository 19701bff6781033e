//! The states of a connection in which an attack can send a message.

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The identifications were exchanged.
    Identified,
    /// Both KEXINITs were exchanged.
    Begun,
    /// The other end has sent its last packet of the key exchange, or received ours.
    Agreed,
    /// Encrypted; no service was requested.
    Secured,
    /// Authentication was requested.
    Asked,
    /// The client is authenticated.
    In,
}

/// Every state, in the order of a connection.
pub const STATES: [State; 6] =
    [State::Identified, State::Begun, State::Agreed, State::Secured, State::Asked, State::In];
