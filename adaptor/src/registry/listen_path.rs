//! Where an inbound of one pod listens: `{pod}` in a unix path stands for the pod's id, and the directories that are
//! named after the pod are the adaptor's to make and to remove.

use std::path::{Path, PathBuf};

use secure_comms_keys::private_directory::{PrivateDirectory, own_directory};
use secure_comms_keys::{FileError, PrivacyFault};
use secure_comms_protocol::tag::UNIX_PATH_MAX;
use secure_comms_protocol::{Bind, InboundTag, PodId};

use crate::text::with_causes;

/// Stands for the pod's id in the unix path of an inbound.
const POD: &str = "{pod}";

/// An inbound's unix path cannot be used for a pod.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The path has another placeholder.
    #[error(
        "inbound {0}: expected no '{{' or '}}' in the path but in {{pod}}, which stands for the pod's id"
    )]
    Placeholder(String),
    /// With the pod's id the path is longer than Linux allows.
    #[error(
        "inbound {tag}: with the pod's id its path has {length} bytes, and a socket's may have {UNIX_PATH_MAX}: choose a \
         shorter one (--run-dir for the built-in KATAAGENT)"
    )]
    TooLong {
        /// The inbound.
        tag: String,
        /// Length of the path, in bytes.
        length: usize,
    },
    /// The pod's directory cannot be made, or others may access it.
    #[error("inbound {tag}: {}; or choose another directory (--run-dir for the built-in KATAAGENT)", with_cause(.cause))]
    Directory {
        /// The inbound.
        tag: String,
        /// Why. It is part of the text.
        cause: FileError,
    },
}

/// No key is in the directory: none has to be made again if others could access it.
fn with_cause(error: &FileError) -> String {
    match error {
        FileError::NotPrivate { path, fault: fault @ PrivacyFault::Mode { wanted, .. } } => {
            format!("{}: {fault}: run chmod {wanted:04o} on it", path.display())
        }
        other => with_causes(other),
    }
}

/// The directories of one inbound that are named after the pod. Dropping it removes them, unless something is in them.
#[derive(Debug)]
pub(super) struct PodDirectories(Vec<PathBuf>);

impl Drop for PodDirectories {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_dir(path) {
                tracing::debug!("removing {}: {error}", path.display());
            }
        }
    }
}

/// The tag for one pod.
///
/// # Errors
/// The path has another placeholder, or is too long with the pod's id.
pub(super) fn for_pod(tag: &InboundTag, pod: &PodId) -> Result<InboundTag, PathError> {
    let Bind::Unix(template) = &tag.bind else { return Ok(tag.clone()) };
    if template.replace(POD, "").contains(['{', '}']) {
        return Err(PathError::Placeholder(tag.to_string()));
    }
    let path = template.replace(POD, pod.as_str());
    if path.len() > UNIX_PATH_MAX {
        return Err(PathError::TooLong { tag: tag.to_string(), length: path.len() });
    }
    Ok(InboundTag { bind: Bind::Unix(path), ..tag.clone() })
}

/// Makes the directories that are named after the pod: 0700, so that no other user can reach the sockets in them. A
/// directory that is there already must be ours and closed to others, and no other user may replace it.
///
/// # Errors
/// A directory can't be made, is not ours, or is open to others.
pub(super) fn make_directories(tag: &InboundTag, pod: &PodId) -> Result<PodDirectories, PathError> {
    let failed = |cause| PathError::Directory { tag: tag.to_string(), cause };
    let Bind::Unix(template) = &tag.bind else { return Ok(PodDirectories(Vec::new())) };
    // Innermost first: each can be removed once the one in it is gone.
    let named = Path::new(template).ancestors().skip(1);
    let named = named.take_while(|directory| directory.to_string_lossy().contains(POD));
    let named: Vec<PathBuf> = named
        .map(|directory| PathBuf::from(directory.to_string_lossy().replace(POD, pod.as_str())))
        .collect();
    if let Some(above) = named.last().and_then(|outermost| outermost.parent()) {
        own_directory(above).map_err(failed)?;
    }
    for directory in named.iter().rev() {
        PrivateDirectory::make(directory).map_err(failed)?;
    }
    Ok(PodDirectories(named))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use secure_comms_protocol::tag::Tag;

    use super::*;

    fn tag(path: &str) -> InboundTag {
        InboundTag::parse(&format!("KUBERNETES_PHASE:KATAAGENT:{path}")).unwrap()
    }

    fn pod() -> PodId {
        "p1".parse().unwrap()
    }

    #[test]
    fn the_placeholder_becomes_the_pods_id() {
        let path = |text| match for_pod(&tag(text), &pod()).unwrap().bind {
            Bind::Unix(path) => path,
            Bind::Tcp { port, .. } => port.to_string(),
        };
        assert_eq!(path("/run/a/{pod}/x{pod}.sock"), "/run/a/p1/xp1.sock");
        assert_eq!(path("/run/a.sock"), "/run/a.sock");
        assert_eq!(path("7000"), "7000");
    }

    #[test]
    fn another_placeholder_is_refused() {
        for path in ["/run/{id}/x", "/run/{pod/x", "/run/{{pod}}/x", "/run/pod}/x", "/run/{POD}"] {
            let text = for_pod(&tag(path), &pod()).unwrap_err().to_string();
            assert!(text.contains("but in {pod}, which stands for the pod's id"), "{text}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_with_the_id_is_refused() {
        let long: PodId = "a".repeat(128).parse().unwrap();
        let text = for_pod(&tag("/run/{pod}/x"), &long).unwrap_err().to_string();
        assert!(text.contains("its path has 135 bytes, and a socket's may have 107"), "{text}");
        let fits: PodId = "a".repeat(100).parse().unwrap();
        assert!(for_pod(&tag("/run/{pod}/x"), &fits).is_ok());
    }

    #[test]
    fn the_pods_directories_are_private_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let tag = tag(&format!("{}/pods/{{pod}}/sub/agent.ttrpc", run.display()));
        let made = make_directories(&tag, &pod()).unwrap();
        for path in ["", "pods", "pods/p1", "pods/p1/sub"] {
            assert_eq!(fs::metadata(run.join(path)).unwrap().mode() & 0o7777, 0o700, "{path}");
        }
        drop(made);
        assert!(run.join("pods").exists() && !run.join("pods/p1").exists());
        // A directory without {pod} is the operator's: neither made nor checked.
        let plain = InboundTag { bind: Bind::Unix("/nowhere/x-{pod}".into()), ..tag };
        assert!(make_directories(&plain, &pod()).unwrap().0.is_empty());
    }

    #[test]
    fn a_directory_that_others_can_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tag = tag(&format!("{}/pods/{{pod}}/agent.ttrpc", dir.path().display()));
        let refused = || make_directories(&tag, &pod()).unwrap_err().to_string();
        drop(make_directories(&tag, &pod()).unwrap());
        let pods = dir.path().join("pods");
        fs::create_dir(pods.join("p1")).unwrap();
        fs::set_permissions(pods.join("p1"), Permissions::from_mode(0o755)).unwrap();
        assert!(refused().contains("(mode 0755): run chmod 0700 on it"), "{}", refused());
        fs::remove_dir(pods.join("p1")).unwrap();
        std::os::unix::fs::symlink("/tmp", pods.join("p1")).unwrap();
        assert!(refused().contains("symbolic link"), "{}", refused());
        fs::remove_file(pods.join("p1")).unwrap();
        fs::set_permissions(&pods, Permissions::from_mode(0o777)).unwrap();
        assert!(refused().contains("run chmod 0700 on it"), "{}", refused());
        assert!(refused().ends_with("(--run-dir for the built-in KATAAGENT)"));
    }
}
