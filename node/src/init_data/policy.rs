//! Which init-data the service expects of the VMs of its pods.

use std::path::PathBuf;

use secure_comms_protocol::InitDataDigest;

use super::rules::{PodName, of_pod};
use super::{InitDataError, fault};

/// Which init-data the service expects of the VMs of its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum InitDataPolicy {
    /// Nothing is set: no pod is bound, as with [`InitDataPolicy::Unbound`], but without a decision of the operator.
    #[default]
    None,
    /// The operator has decided that no pod is bound.
    Unbound,
    /// All pods have init-data of this digest.
    Digest(InitDataDigest),
    /// By the namespace and name of each pod, in a file of rules.
    Rules(PathBuf),
}

impl InitDataPolicy {
    /// The digest that is expected of the VM of the pod of this name; `None`: the pod is unbound. A file of rules is read
    /// by each call, so that a change of it needs no restart. May block for the file system.
    ///
    /// # Errors
    /// There are rules, and they cannot be read, match no rule to the pod, or the pod's name is not known.
    pub fn expected(&self, name: Option<&PodName>) -> Result<Option<InitDataDigest>, InitDataError> {
        match self {
            Self::None | Self::Unbound => Ok(None),
            Self::Digest(digest) => Ok(Some(digest.clone())),
            Self::Rules(file) => {
                let name = name.ok_or_else(|| {
                    fault("the pod has no namespace and name that rules could match: check pod-namespace and pod-name in its apf.json")
                })?;
                of_pod(file, name).map_err(|error| fault(format!("{}: {error}", file.display())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_again_after_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.toml");
        let policy = InitDataPolicy::Rules(file.clone());
        let name: PodName = "prod/db-1".parse().unwrap();
        let error = policy.expected(Some(&name)).unwrap_err().to_string();
        assert!(error.contains("rules.toml: No such file"), "{error}");
        let digits = "ab".repeat(32);
        let rule = |rest: &str| format!("[[rule]]\nnamespace = \"prod\"\npod = \"*\"\n{rest}\n");
        std::fs::write(&file, rule("unbound = true")).unwrap();
        assert_eq!(policy.expected(Some(&name)), Ok(None));
        std::fs::write(&file, rule(&format!("digest = \"{digits}\""))).unwrap();
        assert_eq!(policy.expected(Some(&name)).unwrap().unwrap().as_str(), digits);
    }

    #[test]
    fn a_pod_that_no_rule_can_match_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.toml");
        std::fs::write(&file, "[[rule]]\nnamespace = \"*\"\npod = \"*\"\nunbound = true\n").unwrap();
        let error = InitDataPolicy::Rules(file).expected(None).unwrap_err().to_string();
        assert!(error.contains("no namespace and name"), "{error}");
    }

    #[test]
    fn without_rules_all_pods_are_alike() {
        let digest: InitDataDigest = "cd".repeat(32).parse().unwrap();
        assert_eq!(InitDataPolicy::None.expected(None), Ok(None));
        assert_eq!(InitDataPolicy::Unbound.expected(None), Ok(None));
        assert_eq!(InitDataPolicy::Digest(digest.clone()).expected(None), Ok(Some(digest)));
    }
}
