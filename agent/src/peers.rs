//! The authenticated peers of each phase, and the streams to them.
//!
//! In: connections that have authenticated. Out: streams, opened for the local clients of inbounds. Only `link` names
//! russh.

pub(crate) mod link;

pub(crate) mod peer;

pub(crate) mod sessions;

pub(crate) mod deadlines;

pub(crate) mod routes;
