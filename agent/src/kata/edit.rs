//! What is changed in the two requests: bytes in, bytes out. Fields that are not named here stay as they came, in order.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::protobuf::{self, Field, Fields, Malformed, put};

/// The service of the requests.
pub const SERVICE: &[u8] = b"grpc.AgentService";
/// What the field of the longer of its names takes up: key, length and [`SERVICE`].
const NAME_MAX: usize = 2 + SERVICE.len();
/// The annotation that lists the volumes that a container waits for, comma separated.
pub const VOLUMES: &str = "io.confidentialcontainers.org.peerpodvolumes.target_path";

/// Field numbers of the ttrpc request.
mod request {
    pub(super) const SERVICE: u32 = 1;
    pub(super) const METHOD: u32 = 2;
    pub(super) const PAYLOAD: u32 = 3;
}
/// Field numbers of the kata agent's messages, each named by the way to it.
mod kata {
    pub(super) const CREATE_CONTAINER_OCI: u32 = 6;
    pub(super) const CREATE_SANDBOX_DNS: u32 = 2;
    pub(super) const OCI_MOUNTS: u32 = 5;
    pub(super) const OCI_ANNOTATIONS: u32 = 7;
    pub(super) const OCI_LINUX: u32 = 8;
    pub(super) const MOUNT_SOURCE: u32 = 2;
    pub(super) const MOUNT_TYPE: u32 = 3;
    pub(super) const ENTRY_KEY: u32 = 1;
    pub(super) const ENTRY_VALUE: u32 = 2;
    pub(super) const LINUX_NAMESPACES: u32 = 6;
    pub(super) const NAMESPACE_TYPE: u32 = 1;
    pub(super) const NAMESPACE_PATH: u32 = 2;
}

/// The type of a namespace that we replace.
const NETWORK: &[u8] = b"network";

/// A request that is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `CreateContainer`.
    CreateContainer,
    /// `CreateSandbox`.
    CreateSandbox,
}

impl Method {
    /// The request that is called so, if it is touched.
    pub fn of(service: &[u8], method: &[u8]) -> Option<Self> {
        match method {
            _ if service != SERVICE => None,
            b"CreateContainer" => Some(Self::CreateContainer),
            b"CreateSandbox" => Some(Self::CreateSandbox),
            _ => None,
        }
    }
}

/// What the beginning of a request says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is not touched.
    Pass,
    /// All of it must be seen: it is touched, or its service and method are not in front, as every encoder has them.
    Assemble,
    /// More of it must be seen.
    More,
}

/// Tells from the beginning of a request whether it is touched. `whole`: this is all, or all that is looked at.
pub fn recognise(beginning: &[u8], whole: bool) -> Verdict {
    let (mut service, mut method) = (None, None);
    let mut fields = Fields::of(beginning);
    loop {
        if let (Some(service), Some(method)) = (service, method) {
            return if Method::of(service, method).is_some() { Verdict::Assemble } else { Verdict::Pass };
        }
        let before = fields.rest();
        match fields.next() {
            Some(Ok(field)) if field.number == request::SERVICE => service = field.content,
            Some(Ok(field)) if field.number == request::METHOD => method = field.content,
            Some(Ok(_)) => {}
            Some(Err(Malformed::Truncated)) if !whole => return Verdict::More,
            None if !whole => return Verdict::More,
            // A name that is longer than ours: of those is all there.
            Some(Err(_)) if is_name(before) && before.len() >= NAME_MAX => return Verdict::Pass,
            Some(Err(Malformed::Truncated)) | None => return Verdict::Assemble,
            // The kata agent will say so.
            Some(Err(Malformed::InvalidField)) => return Verdict::Pass,
        }
    }
}

fn is_name(field: &[u8]) -> bool {
    matches!(protobuf::number(field), Some(request::SERVICE | request::METHOD))
}

/// A request after the edit.
#[derive(Debug, PartialEq, Eq)]
pub struct Edited<'a> {
    /// Its bytes.
    pub request: Cow<'a, [u8]>,
    /// What must be there before it goes on.
    pub mounts: Mounts,
}

/// Bind mounts of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// Their sources.
    pub sources: Vec<PathBuf>,
    /// The sources on which something must be mounted first.
    pub volumes: Vec<PathBuf>,
}

/// Edits a ttrpc request; `namespace` is the path that its network namespace gets.
///
/// # Errors
/// It is a request that is touched, and malformed.
pub fn request<'a>(request: &'a [u8], namespace: Option<&str>) -> Result<Edited<'a>, Malformed> {
    let untouched = Edited { request: Cow::Borrowed(request), mounts: Mounts::default() };
    let service = protobuf::last(request, request::SERVICE)?;
    let payload = protobuf::last(request, request::PAYLOAD)?;
    let (payload_after, mounts) = match Method::of(service, protobuf::last(request, request::METHOD)?) {
        None => return Ok(untouched),
        Some(Method::CreateSandbox) => (create_sandbox(payload)?, Mounts::default()),
        Some(Method::CreateContainer) => (create_container(payload, namespace)?, mounts(payload)?),
    };
    if *payload_after == *payload {
        return Ok(Edited { mounts, ..untouched });
    }
    Ok(Edited { request: Cow::Owned(with_payload(request, &payload_after)?), mounts })
}

/// The request with another payload, at the place of its last one: the one that counts.
fn with_payload(request: &[u8], payload: &[u8]) -> Result<Vec<u8>, Malformed> {
    let fields = Fields::of(request).collect::<Result<Vec<_>, _>>()?;
    let is_payload = |field: &Field<'_>| field.number == request::PAYLOAD && field.content.is_some();
    let last = fields.iter().rposition(is_payload);
    let mut out = Vec::with_capacity(request.len() + payload.len());
    for (at, field) in fields.iter().enumerate() {
        if Some(at) == last {
            put(request::PAYLOAD, payload, &mut out);
        } else if !is_payload(field) {
            out.extend_from_slice(field.raw);
        }
    }
    if last.is_none() {
        put(request::PAYLOAD, payload, &mut out);
    }
    Ok(out)
}

/// A `CreateSandboxRequest` without DNS servers, so that the VM's own resolv.conf is left alone.
///
/// # Errors
/// It is none.
pub fn create_sandbox(payload: &[u8]) -> Result<Cow<'_, [u8]>, Malformed> {
    without(payload, &[kata::CREATE_SANDBOX_DNS], &|_| Ok(true))
}

/// A `CreateContainerRequest` whose container joins the network namespace at the path `namespace`, and no other.
///
/// # Errors
/// It is none.
pub fn create_container<'a>(payload: &'a [u8], namespace: Option<&str>) -> Result<Cow<'a, [u8]>, Malformed> {
    let path = [kata::CREATE_CONTAINER_OCI, kata::OCI_LINUX, kata::LINUX_NAMESPACES];
    let is_network = |namespace: &[u8]| Ok(protobuf::last(namespace, kata::NAMESPACE_TYPE)? == NETWORK);
    let Some(namespace) = namespace else {
        // As if it were edited: what is malformed is so whatever the configuration.
        without(payload, &path, &|namespace| is_network(namespace).and(Ok(false)))?;
        return Ok(Cow::Borrowed(payload));
    };
    let payload = without(payload, &path, &is_network)?;
    let mut ours = Vec::new();
    put(kata::NAMESPACE_TYPE, NETWORK, &mut ours);
    put(kata::NAMESPACE_PATH, namespace.as_bytes(), &mut ours);
    Ok(Cow::Owned(with(&payload, &path, &ours)?))
}

/// `message` with one more field at the end of `path`, in the last of the messages on the way; those that are missing are
/// made. Not by appending a message of its own: protobuf would merge the two, but the kata agent's decoder (the crate
/// `protobuf` 3) lets the second take the place of the first.
fn with(message: &[u8], path: &[u32], content: &[u8]) -> Result<Vec<u8>, Malformed> {
    let Some((wanted, deeper)) = path.split_first() else { return Ok(content.to_vec()) };
    let fields = Fields::of(message).collect::<Result<Vec<_>, _>>()?;
    let is_on_the_way = |field: &Field<'_>| field.number == *wanted && field.content.is_some();
    // At the end of the path there may be several: it is one more.
    let last = if deeper.is_empty() { None } else { fields.iter().rposition(is_on_the_way) };
    let mut out = Vec::with_capacity(message.len() + content.len() + 64);
    for (at, field) in fields.iter().enumerate() {
        match field.content.filter(|_| Some(at) == last) {
            Some(inner) => put(*wanted, &with(inner, deeper, content)?, &mut out),
            None => out.extend_from_slice(field.raw),
        }
    }
    if last.is_none() {
        put(*wanted, &with(&[], deeper, content)?, &mut out);
    }
    Ok(out)
}

/// `message` without those of the fields at the end of `path` that `drops` picks by their content.
fn without<'a>(
    message: &'a [u8],
    path: &[u32],
    drops: &dyn Fn(&[u8]) -> Result<bool, Malformed>,
) -> Result<Cow<'a, [u8]>, Malformed> {
    let Some((wanted, deeper)) = path.split_first() else { return Ok(Cow::Borrowed(message)) };
    let mut out = Vec::with_capacity(message.len());
    for field in Fields::of(message) {
        let field = field?;
        let Some(content) = field.content.filter(|_| field.number == *wanted) else {
            out.extend_from_slice(field.raw);
            continue;
        };
        if deeper.is_empty() {
            if !drops(content)? {
                out.extend_from_slice(field.raw);
            }
            continue;
        }
        match without(content, deeper, drops)? {
            Cow::Borrowed(_) => out.extend_from_slice(field.raw),
            Cow::Owned(content) => put(field.number, &content, &mut out),
        }
    }
    // A message loses fields or keeps them all.
    Ok(if out.len() == message.len() { Cow::Borrowed(message) } else { Cow::Owned(out) })
}

/// The bind mounts of a `CreateContainerRequest`.
///
/// # Errors
/// It is none.
pub fn mounts(payload: &[u8]) -> Result<Mounts, Malformed> {
    let mut found = Mounts::default();
    let mut listed: &[u8] = &[];
    for oci in protobuf::contents(payload, kata::CREATE_CONTAINER_OCI)? {
        for mount in protobuf::contents(oci, kata::OCI_MOUNTS)? {
            if protobuf::last(mount, kata::MOUNT_TYPE)? == b"bind" {
                found.sources.push(path(protobuf::last(mount, kata::MOUNT_SOURCE)?));
            }
        }
        for entry in protobuf::contents(oci, kata::OCI_ANNOTATIONS)? {
            if protobuf::last(entry, kata::ENTRY_KEY)? == VOLUMES.as_bytes() {
                listed = protobuf::last(entry, kata::ENTRY_VALUE)?;
            }
        }
    }
    // Relative ones are the kata agent's to resolve.
    found.sources.retain(|source| source.is_absolute());
    let listed: Vec<_> = listed.split(|byte| *byte == b',').map(|one| path(one.trim_ascii())).collect();
    found.volumes = found.sources.iter().filter(|source| listed.contains(source)).cloned().collect();
    Ok(found)
}

/// A path as it is compared: without slashes at its end.
fn path(bytes: &[u8]) -> PathBuf {
    let end = bytes.iter().rposition(|byte| *byte != b'/').map_or(bytes.len().min(1), |last| last + 1);
    PathBuf::from(OsStr::from_bytes(bytes.get(..end).unwrap_or_default()))
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
