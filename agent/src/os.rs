//! What the agent says to the operating system's services.

pub mod logging;
pub mod systemd;
