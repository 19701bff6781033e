//! Who may come in: the decision for every connection, and the limits on how many there are.
//!
//! In: the keys of the pod, the key that a client proves. Out: an [`Admission`](policy::Admission), or a place in a
//! [`ConnectionLimiter`](limiter::ConnectionLimiter), which knows the [`sources`]. The latch is the only I/O here; nothing here speaks SSH.

pub(crate) mod policy;

pub(crate) mod latch;

pub(crate) mod limiter;

pub(crate) mod sources;
