//! The agent and the operating system's services: its log, systemd, and its listening socket.
//!
//! In: log lines and states. Out: syslog, stderr and the socket of systemd, none of which is ever waited for. Knows nothing
//! of the rest of the agent.

mod log_output;

mod log_queue;

pub mod logging;

pub(crate) mod operator_log;

pub(crate) mod log_limits;

pub(crate) mod progress;

pub mod systemd;

pub mod listener;

pub mod capabilities;

pub mod environment;
