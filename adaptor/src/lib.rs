//! The adaptor: the worker node's end of Secure Comms, as a library.

pub mod address;

pub mod keys;
pub mod private_file;
pub mod store;

pub mod kbs;
pub mod token;
pub mod user_data;

pub mod adaptor;
pub mod pod;

mod race;
mod routes;
pub mod session;
pub mod ssh;

pub mod text;
