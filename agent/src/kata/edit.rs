//! The edit of the two requests: bytes in, bytes out. Fields that are not named here stay unchanged, in their order.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::protobuf::{self, Field, Fields, Malformed, put, put_number};

/// The service of the requests.
pub const SERVICE: &[u8] = b"grpc.AgentService";
/// Bytes of the longest field with a name that is compared: key, length and [`SERVICE`].
const NAME_MAX: usize = 2 + SERVICE.len();
/// The annotation that lists the volumes that a container waits for, comma separated.
pub const VOLUMES: &str = "io.confidentialcontainers.org.peerpodvolumes.target_path";

/// Field numbers of the ttrpc request.
mod request {
    pub(super) const SERVICE: u32 = 1;
    pub(super) const METHOD: u32 = 2;
    pub(super) const PAYLOAD: u32 = 3;
    pub(super) const TIMEOUT_NANO: u32 = 4;
}
/// Field numbers of the kata agent's messages, each named by its path.
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

/// The type of the namespaces that are replaced.
const NETWORK: &[u8] = b"network";

/// A request that is edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `CreateContainer`.
    CreateContainer,
    /// `CreateSandbox`.
    CreateSandbox,
}

impl Method {
    /// The method of these names, if its requests are edited.
    pub fn of(service: &[u8], method: &[u8]) -> Option<Self> {
        match method {
            _ if service != SERVICE => None,
            b"CreateContainer" => Some(Self::CreateContainer),
            b"CreateSandbox" => Some(Self::CreateSandbox),
            _ => None,
        }
    }
}

/// How a request is treated, by its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request is not edited.
    Pass,
    /// The whole request is needed: it is edited, or its service and method are not in front, where every encoder has them.
    Assemble,
    /// A longer beginning is needed.
    More,
}

/// Recognises a request that is edited by its beginning. `whole`: there is no more of it, or no more is searched.
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
            // The name is longer than those that are compared, which are complete at this length.
            Some(Err(_)) if is_name(before) && before.len() >= NAME_MAX => return Verdict::Pass,
            Some(Err(Malformed::Truncated)) | None => return Verdict::Assemble,
            // Malformed: the kata agent refuses it.
            Some(Err(Malformed::InvalidField | Malformed::Repeated(_))) => return Verdict::Pass,
        }
    }
}

fn is_name(field: &[u8]) -> bool {
    matches!(protobuf::number(field), Some(request::SERVICE | request::METHOD))
}

/// A request after the edit.
#[derive(Debug, PartialEq, Eq)]
pub struct Edited<'a> {
    /// Bytes of the request.
    pub request: Cow<'a, [u8]>,
    /// Mounts to wait for before the request passes.
    pub mounts: Mounts,
    /// The method, if it is one that is edited.
    pub method: Option<Method>,
    /// Time that the runtime waits for the answer, if that is limited.
    pub timeout: Option<Duration>,
}

/// Bind mounts of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// Sources of the mounts.
    pub sources: Vec<PathBuf>,
    /// The sources on which a volume must be mounted first.
    pub volumes: Vec<PathBuf>,
}

/// Edits a ttrpc request. `namespace` is the path of the network namespace that containers join.
///
/// # Errors
/// The request is one that is edited, and malformed.
pub fn request<'a>(request: &'a [u8], namespace: Option<&str>) -> Result<Edited<'a>, Malformed> {
    let service = protobuf::last(request, request::SERVICE)?;
    let payload = protobuf::last(request, request::PAYLOAD)?;
    let method = Method::of(service, protobuf::last(request, request::METHOD)?);
    let timeout = timeout(request)?;
    let untouched = Edited { request: Cow::Borrowed(request), mounts: Mounts::default(), method, timeout };
    let (payload_after, mounts) = match method {
        None => return Ok(untouched),
        Some(Method::CreateSandbox) => (create_sandbox(payload)?, Mounts::default()),
        Some(Method::CreateContainer) => (create_container(payload, namespace)?, mounts(payload)?),
    };
    if *payload_after == *payload {
        return Ok(Edited { mounts, ..untouched });
    }
    Ok(Edited { request: Cow::Owned(with_payload(request, &payload_after)?), mounts, ..untouched })
}

/// Zero and negative numbers mean that there is no limit, as in ttrpc's own servers.
fn timeout(request: &[u8]) -> Result<Option<Duration>, Malformed> {
    let nanos = protobuf::last_number(request, request::TIMEOUT_NANO)?.unwrap_or_default();
    Ok(i64::try_from(nanos).ok().and(Some(nanos)).filter(|nanos| *nanos > 0).map(Duration::from_nanos))
}

/// The request with a shorter timeout, which never makes it longer.
///
/// # Errors
/// The request is malformed.
pub fn with_timeout(request: &[u8], left: Duration) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(request.len());
    for field in Fields::of(request) {
        let field = field?;
        if field.number != request::TIMEOUT_NANO {
            out.extend_from_slice(field.raw);
        }
    }
    // At least one: zero would mean no limit.
    put_number(request::TIMEOUT_NANO, u64::try_from(left.as_nanos()).unwrap_or(u64::MAX).max(1), &mut out);
    Ok(out)
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
/// The payload is malformed.
pub fn create_sandbox(payload: &[u8]) -> Result<Cow<'_, [u8]>, Malformed> {
    without(payload, &[kata::CREATE_SANDBOX_DNS], &|_| Ok(true))
}

/// A `CreateContainerRequest` whose container joins the network namespace at the path `namespace`, and no other.
///
/// # Errors
/// The payload is malformed, or it is not clear which of several messages the kata agent takes.
pub fn create_container<'a>(payload: &'a [u8], namespace: Option<&str>) -> Result<Cow<'a, [u8]>, Malformed> {
    if let Some(oci) = only_oci(payload)? {
        protobuf::only(oci, kata::OCI_LINUX, "Linux")?;
    }
    let path = [kata::CREATE_CONTAINER_OCI, kata::OCI_LINUX, kata::LINUX_NAMESPACES];
    let is_network = |namespace: &[u8]| Ok(protobuf::last(namespace, kata::NAMESPACE_TYPE)? == NETWORK);
    let Some(namespace) = namespace else {
        // Checked all the same: a malformed request is refused with any configuration.
        without(payload, &path, &|namespace| is_network(namespace).and(Ok(false)))?;
        return Ok(Cow::Borrowed(payload));
    };
    let payload = without(payload, &path, &is_network)?;
    let mut ours = Vec::new();
    put(kata::NAMESPACE_TYPE, NETWORK, &mut ours);
    put(kata::NAMESPACE_PATH, namespace.as_bytes(), &mut ours);
    Ok(Cow::Owned(with(&payload, &path, &ours)?))
}

fn only_oci(payload: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    protobuf::only(payload, kata::CREATE_CONTAINER_OCI, "OCI")
}

/// `message` with one more field at the end of `path`; missing messages are added. Each step has one message at most. Does not
/// append a second message instead: protobuf would merge the two, but in the kata agent's decoder (the crate `protobuf` 3) the
/// second replaces the first.
fn with(message: &[u8], path: &[u32], content: &[u8]) -> Result<Vec<u8>, Malformed> {
    let Some((wanted, deeper)) = path.split_first() else { return Ok(content.to_vec()) };
    let fields = Fields::of(message).collect::<Result<Vec<_>, _>>()?;
    let is_next = |field: &Field<'_>| field.number == *wanted && field.content.is_some();
    // The last step is a repeated field: one more is added.
    let last = if deeper.is_empty() { None } else { fields.iter().rposition(is_next) };
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

/// `message` without the fields at the end of `path` whose content `drops` accepts.
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
    // Fields are only removed, so equal length means unchanged.
    Ok(if out.len() == message.len() { Cow::Borrowed(message) } else { Cow::Owned(out) })
}

/// The bind mounts of a `CreateContainerRequest`.
///
/// # Errors
/// The payload is malformed, or has several OCI messages.
pub fn mounts(payload: &[u8]) -> Result<Mounts, Malformed> {
    let mut found = Mounts::default();
    let mut listed: &[u8] = &[];
    if let Some(oci) = only_oci(payload)? {
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
    // The kata agent resolves relative ones.
    found.sources.retain(|source| source.is_absolute());
    let listed: Vec<_> = listed.split(|byte| *byte == b',').map(|one| path(one.trim_ascii())).collect();
    found.volumes = found.sources.iter().filter(|source| listed.contains(source)).cloned().collect();
    Ok(found)
}

/// A path without trailing slashes, so that paths can be compared.
fn path(bytes: &[u8]) -> PathBuf {
    let end = bytes.iter().rposition(|byte| *byte != b'/').map_or(bytes.len().min(1), |last| last + 1);
    PathBuf::from(OsStr::from_bytes(bytes.get(..end).unwrap_or_default()))
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
