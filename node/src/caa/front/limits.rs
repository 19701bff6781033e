//! What a client of the port may take.

use std::time::Duration;

/// Limits of the port.
#[derive(Clone, Copy, Debug)]
pub struct FrontLimits {
    /// How many connections may be without a complete hello. One more makes the oldest of them lose its place.
    pub hellos: usize,
    /// How long a hello may take, from the accept on.
    pub hello_time: Duration,
    /// How many connections may be held. One more is refused, unless an unrecognised one can be closed for it.
    pub held: usize,
    /// How many connections may be held for one server name, in the strict variant for one VM. One more makes the oldest of
    /// them but the first lose its place: cloud-api-adaptor waits in the first, and any process of the node can add others.
    pub held_per_name: usize,
    /// How long the rest of a handshake may take.
    pub finish_time: Duration,
}

impl Default for FrontLimits {
    fn default() -> Self {
        Self {
            hellos: 256,
            hello_time: Duration::from_secs(5),
            held: 1024,
            held_per_name: 4,
            finish_time: Duration::from_secs(10),
        }
    }
}
