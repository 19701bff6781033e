//! The adaptor: the worker node's end of Secure Comms, as a library.
//!
//! In the order a pod comes up: the command line ([`cli`]) becomes [`settings`]; the [`keys`] are found or made
//! in the [`store`]; they reach the VM through the KBS ([`kbs`], with a [`token`]) or in its [`user_data`];
//! then the adaptor [`connect`]s. [`address`], [`log`] and [`private_file`] serve all of them.

pub mod address;
pub mod cli;
pub mod connect;
pub mod kbs;
pub mod keys;
pub mod log;
pub mod private_file;
pub mod session;
pub mod settings;
pub mod ssh;
pub mod store;
pub mod token;
pub mod user_data;
