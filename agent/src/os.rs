//! The agent and the operating system's services: its log, and systemd.
//!
//! In: log lines and states. Out: syslog, stderr and the socket of systemd. Knows nothing of the rest of the agent.

pub mod logging;

pub(crate) mod operator_log;

pub(crate) mod log_limits;

pub mod systemd;
