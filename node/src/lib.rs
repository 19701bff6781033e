//! The worker node's program, `secure-comms-adaptor`: the command line becomes settings, and a command runs with them.

pub mod cli;

pub mod settings;

pub mod commands;

pub mod logging;
