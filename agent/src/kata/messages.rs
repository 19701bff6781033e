//! The messages for tests, decoded by prost, with fields that the interceptor does not know.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use prost::Message;
use std::collections::BTreeMap;

use super::frame::{HEADER, Header, REQUEST};

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Request {
    #[prost(string, tag = "1")]
    pub(crate) service: String,
    #[prost(string, tag = "2")]
    pub(crate) method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    pub(crate) timeout_nano: i64,
    #[prost(message, repeated, tag = "5")]
    pub(crate) metadata: Vec<KeyValue>,
    #[prost(fixed64, tag = "99")]
    pub(crate) later: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct KeyValue {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Response {
    #[prost(message, optional, tag = "1")]
    pub(crate) status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Status {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct CreateSandbox {
    #[prost(string, tag = "1")]
    pub(crate) hostname: String,
    #[prost(string, repeated, tag = "2")]
    pub(crate) dns: Vec<String>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) storages: Vec<KeyValue>,
    #[prost(bool, tag = "4")]
    pub(crate) sandbox_pidns: bool,
    #[prost(string, tag = "5")]
    pub(crate) sandbox_id: String,
    #[prost(sint64, tag = "60")]
    pub(crate) later: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct CreateContainer {
    #[prost(string, tag = "1")]
    pub(crate) container_id: String,
    #[prost(message, optional, tag = "6")]
    pub(crate) oci: Option<Oci>,
    #[prost(fixed32, tag = "77")]
    pub(crate) later: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Oci {
    #[prost(string, tag = "1")]
    pub(crate) version: String,
    #[prost(message, repeated, tag = "5")]
    pub(crate) mounts: Vec<Mount>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub(crate) annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub(crate) linux: Option<Linux>,
    #[prost(bytes = "vec", tag = "500")]
    pub(crate) later: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Mount {
    #[prost(string, tag = "1")]
    pub(crate) destination: String,
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    #[prost(string, tag = "3")]
    pub(crate) kind: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Linux {
    #[prost(message, repeated, tag = "6")]
    pub(crate) namespaces: Vec<LinuxNamespace>,
    #[prost(uint64, repeated, tag = "40")]
    pub(crate) later: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LinuxNamespace {
    #[prost(string, tag = "1")]
    pub(crate) kind: String,
    #[prost(string, tag = "2")]
    pub(crate) path: String,
    #[prost(string, tag = "10")]
    pub(crate) later: String,
}

impl CreateContainer {
    /// A container with these bind mounts, and these volumes to wait for.
    pub(crate) fn with_mounts(sources: &[&str], volumes: &str) -> Self {
        let mount = |source: &&str| Mount {
            destination: "/data".into(),
            source: (*source).into(),
            kind: "bind".into(),
            options: vec!["rbind".into()],
        };
        let mut annotations = BTreeMap::new();
        if !volumes.is_empty() {
            annotations.insert(super::edit::VOLUMES.into(), volumes.into());
        }
        let mounts = sources.iter().map(mount).collect();
        let oci = Oci { mounts, annotations, ..Oci::default() };
        Self { container_id: "c1".into(), oci: Some(oci), later: 7 }
    }

    pub(crate) fn namespaces(&self) -> Vec<LinuxNamespace> {
        let linux = self.oci.as_ref().and_then(|oci| oci.linux.as_ref());
        linux.map(|linux| linux.namespaces.clone()).unwrap_or_default()
    }
}

/// A frame.
pub(crate) fn frame(kind: u8, stream: u32, data: &[u8]) -> Vec<u8> {
    let header = Header { length: data.len(), stream, kind, flags: 3 };
    [&header.to_bytes(), data].concat()
}

/// The frame of a request of the kata agent.
pub(crate) fn request(stream: u32, method: &str, payload: &[u8]) -> Vec<u8> {
    let request = Request {
        service: "grpc.AgentService".into(),
        method: method.into(),
        payload: payload.to_vec(),
        timeout_nano: 1_000_000_007,
        metadata: vec![KeyValue { key: "trace".into(), value: "on".into() }],
        later: 3,
    };
    frame(REQUEST, stream, &request.encode_to_vec())
}

/// The request in a frame.
pub(crate) fn decode(frame: &[u8]) -> Request {
    Request::decode(&frame[HEADER..]).unwrap()
}

fn text() -> impl Strategy<Value = String> {
    "[a-z/, é]{0,12}"
}

prop_compose! {
    pub(crate) fn create_sandbox()(
        hostname in text(), dns in vec(text(), 0..4), names in vec(text(), 0..3),
        sandbox_pidns: bool, sandbox_id in text(), later: i64,
    ) -> CreateSandbox {
        let storages = names.into_iter().map(|key| KeyValue { key, value: String::new() }).collect();
        CreateSandbox { hostname, dns, storages, sandbox_pidns, sandbox_id, later }
    }
}

prop_compose! {
    fn namespace()(
        kind in prop_oneof![Just("network"), Just("mount"), Just("")], path in text(), later in text(),
    ) -> LinuxNamespace {
        LinuxNamespace { kind: kind.into(), path, later }
    }
}

prop_compose! {
    fn linux()(namespaces in vec(namespace(), 0..4), later in vec(any::<u64>(), 0..3)) -> Linux {
        Linux { namespaces, later }
    }
}

prop_compose! {
    fn mount()(
        destination in text(), source in "/?[a-c]{0,2}/{0,2}",
        kind in prop_oneof![Just("bind"), Just("tmpfs")], options in vec(text(), 0..3),
    ) -> Mount {
        Mount { destination, source, kind: kind.into(), options }
    }
}

prop_compose! {
    fn oci()(
        version in text(), mounts in vec(mount(), 0..4), annotations in btree_map(text(), text(), 0..3),
        linux in option::of(linux()), later in vec(any::<u8>(), 0..9),
    ) -> Oci {
        Oci { version, mounts, annotations, linux, later }
    }
}

prop_compose! {
    pub(crate) fn create_container()(
        container_id in text(), oci in option::of(oci()), later: u32,
    ) -> CreateContainer {
        CreateContainer { container_id, oci, later }
    }
}
