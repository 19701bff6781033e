//! The adaptor: the worker node's end of Secure Comms, as a library.
//!
//! In the order a pod comes up: the command line ([`cli`]) becomes [`settings`]; the keys are found or made
//! in the [`store`]; they reach the VM through the KBS ([`kbs`], with a [`token`]) or in its [`user_data`];
//! then the [`adaptor`] drives each [`pod`]'s channel: [`ssh`] connects to one of its addresses, a [`session`] talks to
//! its agent, and local clients are routed to it. [`connect`] does that for one pod in the foreground. [`address`] and [`log`] serve all of them.

pub mod adaptor;
pub mod address;
pub mod cli;
pub mod connect;
pub mod kbs;
pub mod log;
pub mod pod;
mod race;
mod routes;
pub mod session;
pub mod settings;
pub mod ssh;
pub mod store;
pub mod token;
pub mod user_data;
