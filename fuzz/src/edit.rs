//! Properties of the edit of any request: the request before and after is read by another decoder, and
//! compared.

use agent_protocol_forwarder::kata::cloud_volumes::{self, CLOUD_VOLUMES, CloudVolume, MOUNT_BASE};
use agent_protocol_forwarder::kata::edit::{
    self, EditError, Edited, Method, Mounts, SERVICE, VOLUMES, Verdict, recognise,
};
use agent_protocol_forwarder::kata::protobuf::{Malformed, put};
use prost::Message;
use secure_comms_protocol::volumes::{Request as VolumesRequest, VOLUMES_MAX};
use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATH: &str = "/run/netns/podns";

#[derive(Clone, PartialEq, Message)]
struct Sandbox {
    #[prost(bytes = "vec", tag = "1")]
    hostname: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    dns: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "5")]
    sandbox_id: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(bytes = "vec", tag = "1")]
    container_id: Vec<u8>,
    #[prost(message, optional, tag = "6")]
    oci: Option<Oci>,
}

/// The messages of a container, not merged.
#[derive(Clone, PartialEq, Message)]
struct Parts {
    #[prost(bytes = "vec", repeated, tag = "6")]
    ocis: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct OciParts {
    #[prost(bytes = "vec", repeated, tag = "8")]
    linuxes: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Oci {
    #[prost(bytes = "vec", tag = "4")]
    hostname: Vec<u8>,
    #[prost(message, repeated, tag = "5")]
    mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "7")]
    annotations: Vec<Entry>,
    #[prost(message, optional, tag = "8")]
    linux: Option<Linux>,
}

#[derive(Clone, PartialEq, Message)]
struct Mount {
    #[prost(bytes = "vec", tag = "1")]
    destination: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    source: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    kind: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Linux {
    #[prost(message, repeated, tag = "6")]
    namespaces: Vec<Namespace>,
    #[prost(bytes = "vec", tag = "7")]
    cgroup: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Namespace {
    #[prost(bytes = "vec", tag = "1")]
    kind: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    path: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(bytes = "vec", tag = "1")]
    service: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    method: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    timeout_nano: i64,
}

/// The first byte selects the request, and whether there is a namespace to join; the rest is its payload, or all of it.
pub(crate) fn exercise(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    let namespace = Some(PATH).filter(|_| what & 4 == 0);
    match what & 3 {
        0 => container(data, namespace),
        1 => sandbox(data, namespace),
        2 => raw(data, namespace),
        _ => {
            let other = request(b"WriteStdin", data);
            assert_eq!(edited(&other, namespace), untouched(&other, None));
            assert_eq!(recognise(&other, true), Verdict::Pass);
        }
    }
}

fn request(method: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    put(1, SERVICE, &mut request);
    put(2, method, &mut request);
    put(3, payload, &mut request);
    request
}

fn untouched(request: &[u8], timeout: Option<Duration>) -> Edited<'_> {
    Edited {
        request: Cow::Borrowed(request),
        volumes: None,
        mounts: Mounts::default(),
        method: None,
        timeout,
    }
}

fn edited<'a>(request: &'a [u8], namespace: Option<&str>) -> Edited<'a> {
    edit::request(request, namespace).expect("somebody else's decoder takes it")
}

fn container(payload: &[u8], namespace: Option<&str>) {
    let before = Container::decode(payload);
    let request = request(b"CreateContainer", payload);
    assert!((0..64).all(|seen| recognise(&request[..seen.min(request.len())], false) != Verdict::Pass));
    let Ok(before) = before else { return drop(edit::request(&request, namespace)) };
    if let Some(name) = repeated(payload) {
        assert_eq!(edit::request(&request, namespace), Err(Malformed::Repeated(name).into()));
        return;
    }
    let volumes = match cloud_volumes::parse(annotation(&before, CLOUD_VOLUMES)) {
        Ok(volumes) => volumes,
        Err(invalid) => {
            assert_eq!(edit::request(&request, namespace), Err(EditError::Volumes(invalid)));
            return;
        }
    };
    let mut expected = before;
    place(&mut expected, &volumes);
    let mut wanted = wanted(&expected);
    wanted.sources.retain(|source| !volumes.iter().any(|volume| volume.path() == *source));
    wanted.volumes.retain(|source| wanted.sources.contains(source));
    let Edited { request: after, mounts, volumes: asked, .. } = edited(&request, namespace);
    assert_eq!(mounts, wanted);
    let names: Vec<_> = volumes.into_iter().map(|volume| volume.volume).collect();
    assert_eq!(
        asked,
        Some(VolumesRequest::Mount(names)).filter(|asked| *asked != VolumesRequest::Mount(vec![]))
    );
    let Some(path) = namespace else {
        let payload = Request::decode(&*after).expect("it is still a request").payload;
        return assert_eq!(Container::decode(&*payload).expect("it is still one"), expected);
    };
    let linux = expected.oci.get_or_insert_default().linux.get_or_insert_default();
    linux.namespaces.retain(|namespace| namespace.kind != b"network");
    linux.namespaces.push(Namespace { kind: b"network".into(), path: path.into() });
    let payload = Request::decode(&*after).expect("it is still a request").payload;
    assert_eq!(Container::decode(&*payload).expect("it is still one"), expected);
    assert_eq!(edited(&after, namespace).request, after, "there is nothing left to edit");
}

/// The message of a container that comes more than once: protobuf merges them, the kata agent does not.
fn repeated(payload: &[u8]) -> Option<&'static str> {
    let Parts { ocis } = Parts::decode(payload).expect("it is a container");
    match &*ocis {
        [] => None,
        [oci] => {
            let OciParts { linuxes } = OciParts::decode(&**oci).expect("it is an OCI");
            (linuxes.len() > 1).then_some("Linux")
        }
        _ => Some("OCI"),
    }
}

/// The volumes at their mounts, each in a directory of its own.
fn place(container: &mut Container, volumes: &[CloudVolume]) {
    assert!(volumes.len() <= VOLUMES_MAX);
    assert!(volumes.iter().all(|volume| volume.path().parent() == Some(Path::new(MOUNT_BASE))));
    let Some(oci) = &mut container.oci else { return assert!(volumes.is_empty()) };
    let is_at = |mount: &Mount, volume: &CloudVolume| {
        Path::new(OsStr::from_bytes(&mount.destination)) == volume.mount_point
    };
    let is_bind = |mount: &&Mount| mount.kind == b"bind" && mount.source.starts_with(b"/");
    let before = oci.mounts.clone();
    let of_source = |mount: &Mount| {
        let same =
            |other: &&Mount| is_bind(&mount) && is_bind(other) && path(&other.source) == path(&mount.source);
        volumes.iter().find(|volume| before.iter().filter(same).any(|other| is_at(other, volume)))
    };
    for mount in &mut oci.mounts {
        let at = volumes.iter().find(|volume| is_at(mount, volume));
        if let Some(volume) = at.or_else(|| of_source(mount)) {
            mount.source = volume.path().as_os_str().as_bytes().into();
            mount.kind = b"bind".into();
        }
    }
}

/// Of several entries with one key the last one applies.
fn annotation<'a>(container: &'a Container, key: &str) -> &'a [u8] {
    let mut entries = container.oci.iter().flat_map(|oci| &oci.annotations);
    entries.rfind(|entry| entry.key == key.as_bytes()).map(|entry| &*entry.value).unwrap_or_default()
}

/// Sources of bind mounts, and the ones that are annotated as volumes.
fn wanted(container: &Container) -> Mounts {
    let Some(oci) = &container.oci else { return Mounts::default() };
    let listed = annotation(container, VOLUMES);
    let volumes: Vec<PathBuf> =
        listed.split(|byte| *byte == b',').map(|one| path(one.trim_ascii())).collect();
    let binds = oci.mounts.iter().filter(|mount| mount.kind == b"bind" && mount.source.starts_with(b"/"));
    let sources: Vec<PathBuf> = binds.map(|mount| path(&mount.source)).collect();
    let volumes = sources.iter().filter(|source| volumes.contains(source)).cloned().collect();
    Mounts { sources, volumes }
}

fn path(mut bytes: &[u8]) -> PathBuf {
    while let [shorter @ .., b'/'] = bytes
        && !shorter.is_empty()
    {
        bytes = shorter;
    }
    OsStr::from_bytes(bytes).into()
}

fn sandbox(payload: &[u8], namespace: Option<&str>) {
    let request = request(b"CreateSandbox", payload);
    let Ok(before) = Sandbox::decode(payload) else { return drop(edit::request(&request, namespace)) };
    let Edited { request: after, mounts, .. } = edited(&request, namespace);
    assert_eq!(mounts, Mounts::default());
    let payload = Request::decode(&*after).expect("it is still a request").payload;
    assert_eq!(Sandbox::decode(&*payload).expect("it is still one"), Sandbox { dns: Vec::new(), ..before });
}

/// The fuzzer provides the whole request here, not only the payload.
fn raw(request: &[u8], namespace: Option<&str>) {
    let after = edit::request(request, namespace);
    let Ok(before) = Request::decode(request) else { return };
    let timeout = u64::try_from(before.timeout_nano).ok().filter(|nanos| *nanos > 0);
    let untouched = untouched(request, timeout.map(Duration::from_nanos));
    match &*before.method {
        _ if before.service != SERVICE => return assert_eq!(after, Ok(untouched)),
        b"CreateContainer" | b"CreateSandbox" => {}
        b"DestroySandbox" => {
            let (volumes, method) = (Some(VolumesRequest::UnmountAll), Some(Method::DestroySandbox));
            return assert_eq!(after, Ok(Edited { volumes, method, ..untouched }));
        }
        _ => return assert_eq!(after, Ok(untouched)),
    }
    let Ok(Edited { request: after, .. }) = after else { return };
    let after = Request::decode(&*after).expect("it is still a request");
    assert_eq!(Request { payload: Vec::new(), ..after }, Request { payload: Vec::new(), ..before });
}
