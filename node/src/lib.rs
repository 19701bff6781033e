//! The worker node's program, `secure-comms-adaptor`. `main.rs` parses and runs; the library is for its tests.
//!
//! The blocks are in the order of a run: [`cli`] parses the flags, [`settings`] validates them with the environment
//! and reads the [`init_data`],
//! [`logging`] starts the log, and one of the [`commands`] runs until it is done or one of the [`signals`] ends it.
//!
//! `serve` runs the node's service: the [`pods`], which [`caa`] and the [`api`] launch, its [`health`] and [`metrics`], and
//! the word to [`systemd`]. [`doctor`] looks for faults.

pub mod cli;

pub mod settings;

pub mod init_data;

pub mod logging;

pub mod signals;

pub mod pods;

pub mod health;

pub mod caa;

pub mod api;

pub mod metrics;

pub mod doctor;

pub mod systemd;

pub mod commands;
