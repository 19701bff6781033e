//! The edit of the requests: bytes in, bytes out. Fields that are not named here stay unchanged, in their order.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secure_comms_protocol::volumes::Request as VolumesRequest;

use super::cloud_volumes::{self, CLOUD_VOLUMES, CloudVolume, InvalidVolumes};
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
    pub(super) const MOUNT_DESTINATION: u32 = 1;
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
/// The type of the mounts whose sources are directories of the VM.
const BIND: &[u8] = b"bind";

/// A request that is edited or held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `CreateContainer`.
    CreateContainer,
    /// `CreateSandbox`.
    CreateSandbox,
    /// `DestroySandbox`.
    DestroySandbox,
}

impl Method {
    /// The method of these names, if its requests are edited or held.
    pub fn of(service: &[u8], method: &[u8]) -> Option<Self> {
        match method {
            _ if service != SERVICE => None,
            b"CreateContainer" => Some(Self::CreateContainer),
            b"CreateSandbox" => Some(Self::CreateSandbox),
            b"DestroySandbox" => Some(Self::DestroySandbox),
            _ => None,
        }
    }
}

/// How a request is treated, by its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request is not edited.
    Pass,
    /// The whole request is needed: it is edited or held, or its service and method are not in front, where every encoder has
    /// them.
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
    /// What `podvm-volumes` must have done before the request passes.
    pub volumes: Option<VolumesRequest>,
    /// Mounts to wait for before the request passes.
    pub mounts: Mounts,
    /// The method, if it is one that is edited or held.
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

/// Why a request is not edited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The request is malformed.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The annotation of a container's cloud volumes can't be right.
    #[error(transparent)]
    Volumes(#[from] InvalidVolumes),
}

/// Edits a ttrpc request. `namespace` is the path of the network namespace that containers join.
///
/// # Errors
/// The request is one that is edited, and malformed.
pub fn request<'a>(request: &'a [u8], namespace: Option<&str>) -> Result<Edited<'a>, EditError> {
    let service = protobuf::last(request, request::SERVICE)?;
    let payload = protobuf::last(request, request::PAYLOAD)?;
    let method = Method::of(service, protobuf::last(request, request::METHOD)?);
    let timeout = timeout(request)?;
    let mut edited =
        Edited { request: Cow::Borrowed(request), volumes: None, mounts: Mounts::default(), method, timeout };
    let payload_after = match method {
        None => return Ok(edited),
        Some(Method::DestroySandbox) => {
            edited.volumes = Some(VolumesRequest::UnmountAll);
            return Ok(edited);
        }
        Some(Method::CreateSandbox) => create_sandbox(payload)?,
        Some(Method::CreateContainer) => {
            let in_network = create_container(payload, namespace)?;
            let volumes = volumes(payload)?;
            let after = with_volumes(in_network, &volumes)?;
            edited.mounts = mounts(&after)?;
            // They are mounted once `podvm-volumes` says so. If one is not, a directory in its place would take its data.
            edited.mounts.sources.retain(|source| !volumes.iter().any(|volume| volume.path() == *source));
            edited.mounts.volumes.retain(|source| !volumes.iter().any(|volume| volume.path() == *source));
            if !volumes.is_empty() {
                let volumes = volumes.into_iter().map(|volume| volume.volume).collect();
                edited.volumes = Some(VolumesRequest::Mount(volumes));
            }
            after
        }
    };
    if *payload_after != *payload {
        edited.request = Cow::Owned(with_payload(request, &payload_after)?);
    }
    Ok(edited)
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
    changed(message, path, &|content| Ok(if drops(content)? { Change::Drop } else { Change::Keep }))
}

/// What becomes of a field.
enum Change {
    Keep,
    Drop,
    Replace(Vec<u8>),
}

/// `message` whose fields at the end of `path` have become what `change` makes of their content.
fn changed<'a>(
    message: &'a [u8],
    path: &[u32],
    change: &dyn Fn(&[u8]) -> Result<Change, Malformed>,
) -> Result<Cow<'a, [u8]>, Malformed> {
    let Some((wanted, deeper)) = path.split_first() else { return Ok(Cow::Borrowed(message)) };
    let mut out = Vec::with_capacity(message.len());
    let mut is_changed = false;
    for field in Fields::of(message) {
        let field = field?;
        let becomes = match field.content.filter(|_| field.number == *wanted) {
            None => Change::Keep,
            Some(content) if deeper.is_empty() => change(content)?,
            Some(content) => match changed(content, deeper, change)? {
                Cow::Borrowed(_) => Change::Keep,
                Cow::Owned(content) => Change::Replace(content),
            },
        };
        is_changed |= !matches!(becomes, Change::Keep);
        match becomes {
            Change::Keep => out.extend_from_slice(field.raw),
            Change::Drop => {}
            Change::Replace(content) => put(field.number, &content, &mut out),
        }
    }
    Ok(if is_changed { Cow::Owned(out) } else { Cow::Borrowed(message) })
}

/// The cloud volumes of a `CreateContainerRequest`, in the order of their names.
fn volumes(payload: &[u8]) -> Result<Vec<CloudVolume>, EditError> {
    match only_oci(payload)? {
        Some(oci) => Ok(cloud_volumes::parse(annotation(oci, CLOUD_VOLUMES)?)?),
        None => Ok(Vec::new()),
    }
}

/// The `CreateContainerRequest` in which the mounts for these volumes are bind mounts of the directories where the volumes are
/// mounted: those with the volume's destination, and others of the same source, which are the same volume. All else of a mount
/// stays, its options too.
fn with_volumes<'a>(payload: Cow<'a, [u8]>, volumes: &[CloudVolume]) -> Result<Cow<'a, [u8]>, Malformed> {
    if volumes.is_empty() {
        return Ok(payload);
    }
    let mounts = match only_oci(&payload)? {
        Some(oci) => protobuf::contents(oci, kata::OCI_MOUNTS)?,
        None => Vec::new(),
    };
    let mut sources = Vec::new();
    for volume in volumes {
        let mut is_missing = true;
        for mount in &mounts {
            if destination(mount)? == volume.mount_point {
                is_missing = false;
                let source = path(protobuf::last(mount, kata::MOUNT_SOURCE)?);
                if source.is_absolute() && protobuf::last(mount, kata::MOUNT_TYPE)? == BIND {
                    sources.push((source, volume));
                }
            }
        }
        if is_missing {
            log::warn!(
                "tunnel KATAAGENT: the container has no mount at {}, where its cloud volume {} is to be; the volume is \
                 mounted in the VM only",
                volume.mount_point.display(),
                volume.volume.name
            );
        }
    }
    let place = |mount: &[u8]| {
        let destination = destination(mount)?;
        let source = path(protobuf::last(mount, kata::MOUNT_SOURCE)?);
        let is_bind = protobuf::last(mount, kata::MOUNT_TYPE)? == BIND;
        let of_mount_point = volumes.iter().find(|volume| volume.mount_point == destination);
        let of_source =
            || sources.iter().find(|(taken, _)| is_bind && *taken == source).map(|(_, volume)| *volume);
        let Some(volume) = of_mount_point.or_else(of_source) else { return Ok(Change::Keep) };
        bind_of(mount, &volume.path()).map(Change::Replace)
    };
    let edited = changed(&payload, &[kata::CREATE_CONTAINER_OCI, kata::OCI_MOUNTS], &place)?;
    Ok(match edited {
        Cow::Borrowed(_) => payload,
        Cow::Owned(edited) => Cow::Owned(edited),
    })
}

fn destination(mount: &[u8]) -> Result<&Path, Malformed> {
    Ok(Path::new(OsStr::from_bytes(protobuf::last(mount, kata::MOUNT_DESTINATION)?)))
}

/// The mount as a bind mount of this directory.
fn bind_of(mount: &[u8], source: &Path) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(mount.len() + source.as_os_str().len() + 16);
    for field in Fields::of(mount) {
        let field = field?;
        if field.content.is_none() || !matches!(field.number, kata::MOUNT_SOURCE | kata::MOUNT_TYPE) {
            out.extend_from_slice(field.raw);
        }
    }
    put(kata::MOUNT_SOURCE, source.as_os_str().as_bytes(), &mut out);
    put(kata::MOUNT_TYPE, BIND, &mut out);
    Ok(out)
}

/// The value of an annotation; empty if there is none. Of several with one key the last counts.
fn annotation<'a>(oci: &'a [u8], key: &str) -> Result<&'a [u8], Malformed> {
    let mut found: &[u8] = &[];
    for entry in protobuf::contents(oci, kata::OCI_ANNOTATIONS)? {
        if protobuf::last(entry, kata::ENTRY_KEY)? == key.as_bytes() {
            found = protobuf::last(entry, kata::ENTRY_VALUE)?;
        }
    }
    Ok(found)
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
            if protobuf::last(mount, kata::MOUNT_TYPE)? == BIND {
                found.sources.push(path(protobuf::last(mount, kata::MOUNT_SOURCE)?));
            }
        }
        listed = annotation(oci, VOLUMES)?;
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
