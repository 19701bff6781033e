//! The lives of the sandboxes: what begins, readies and ends a pod of cloud-api-adaptor.

mod actor;
mod claims;
mod machine;
mod parking;
mod router;
mod world;
