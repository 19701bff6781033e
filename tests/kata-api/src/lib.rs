//! The parts of the kata agent's API and of the remote hypervisor's that the tests use, over the `ttrpc` crate that kata itself uses.
//!
//! - [`api`]: messages, client and server, generated from `proto/` with the field numbers of the kata agent;
//! - [`client`]: the runtime's side; [`server`]: the kata agent's, which records its requests.

pub mod client;
pub mod server;

/// Generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::unwrap_used)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/api.rs"));
}

pub use {protobuf, ttrpc};

/// The annotation of a container that lists its volumes that are mounted from outside the pod, comma separated.
pub const VOLUMES: &str = "io.confidentialcontainers.org.peerpodvolumes.target_path";

#[cfg(test)]
mod tests {
    use protobuf::{Message, MessageField};

    use crate::api::agent::CreateContainerRequest;
    use crate::api::oci::{Linux, LinuxNamespace, Mount, Spec};

    fn request(spec: Spec) -> CreateContainerRequest {
        CreateContainerRequest { OCI: MessageField::some(spec), ..Default::default() }
    }

    /// Protobuf merges a singular message that occurs twice. This crate, with which the kata agent decodes, replaces the
    /// first by the second: appending a namespace to a request would lose all mounts.
    #[test]
    fn the_kata_agents_decoder_replaces_a_repeated_message() {
        let mounts = Spec { Mounts: vec![Mount::new()], ..Spec::default() };
        let linux = Linux { Namespaces: vec![LinuxNamespace::new()], ..Linux::default() };
        let namespaces = Spec { Linux: MessageField::some(linux), ..Spec::default() };
        let mut bytes = request(mounts).write_to_bytes().unwrap();
        bytes.extend(request(namespaces.clone()).write_to_bytes().unwrap());
        assert_eq!(CreateContainerRequest::parse_from_bytes(&bytes).unwrap(), request(namespaces));
    }
}
