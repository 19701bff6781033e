//! The kata agent's API, as far as the tests speak it, over the `ttrpc` crate that kata uses itself.
//!
//! - [`api`]: messages, client and server, generated from `proto/` with the field numbers of the kata agent;
//! - [`client`]: the runtime's side; [`server`]: the kata agent's, which remembers what arrived.

pub mod client;
pub mod server;

/// Generated: see `proto/`.
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

    /// Protobuf says that a singular message which occurs twice is merged. The kata agent decodes with this crate, and this
    /// crate replaces the first by the second: who appends a namespace to a request loses all mounts.
    #[test]
    fn the_kata_agents_decoder_replaces_a_message_that_occurs_twice() {
        let mounts = Spec { Mounts: vec![Mount::new()], ..Spec::default() };
        let linux = Linux { Namespaces: vec![LinuxNamespace::new()], ..Linux::default() };
        let namespaces = Spec { Linux: MessageField::some(linux), ..Spec::default() };
        let mut bytes = request(mounts).write_to_bytes().unwrap();
        bytes.extend(request(namespaces.clone()).write_to_bytes().unwrap());
        assert_eq!(CreateContainerRequest::parse_from_bytes(&bytes).unwrap(), request(namespaces));
    }
}
