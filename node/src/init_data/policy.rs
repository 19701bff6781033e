//! Which init-data the VMs of a node are started with.

use std::path::PathBuf;

use secure_comms_protocol::InitDataDigest;

use super::pod_name::PodName;
use super::rules::of_pod;
use super::{InitDataError, fault};

/// Which init-data the VMs of a node are started with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum InitDataPolicy {
    /// None is expected of any VM.
    #[default]
    Unbound,
    /// All VMs have init-data of this digest.
    Digest(InitDataDigest),
    /// The rules of this file, which is read for each pod: [`super::rules`].
    Rules(PathBuf),
}

impl InitDataPolicy {
    /// The digest that the VM of this pod is expected to have; `None`: none is expected. Reads the files of the rules.
    ///
    /// # Errors
    /// There are rules, and the pod's name is not known, no rule matches it, or a file cannot be read.
    pub fn of(&self, pod: Option<&PodName>) -> Result<Option<InitDataDigest>, InitDataError> {
        match (self, pod) {
            (Self::Unbound, _) => Ok(None),
            (Self::Digest(digest), _) => Ok(Some(digest.clone())),
            (Self::Rules(file), Some(pod)) => {
                of_pod(file, pod).map_err(|error| fault(format!("{}: {error}", file.display())))
            }
            (Self::Rules(file), None) => Err(fault(format!(
                "{}: the rules need the pod's namespace and name, and its launcher has not given them",
                file.display()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_need_a_name_and_nothing_else_does() {
        let digest: InitDataDigest = "ab".repeat(32).parse().unwrap();
        let pod: PodName = "n/x".parse().unwrap();
        assert_eq!(InitDataPolicy::Unbound.of(None), Ok(None));
        assert_eq!(InitDataPolicy::Digest(digest.clone()).of(None), Ok(Some(digest)));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules");
        std::fs::write(&file, "[[rule]]\nnamespace = \"n\"\npod = \"*\"\nunbound = true\n").unwrap();
        let rules = InitDataPolicy::Rules(file.clone());
        assert_eq!(rules.of(Some(&pod)), Ok(None));
        assert!(rules.of(None).unwrap_err().to_string().contains("namespace and name"));
        std::fs::remove_file(&file).unwrap();
        assert!(rules.of(Some(&pod)).unwrap_err().to_string().contains("No such file"));
    }
}
