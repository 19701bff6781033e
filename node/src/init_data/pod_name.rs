//! The name by which Kubernetes knows a pod.

use std::fmt;
use std::str::FromStr;

/// A pod, as Kubernetes names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    namespace: String,
    name: String,
}

impl FromStr for PodName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected NAMESPACE/NAME, as kubectl get pods -A lists them";
        let is_name = |part: &str| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
            !part.is_empty() && part.len() <= 253 && part.chars().all(allowed)
        };
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(EXPECTED),
        }
    }
}

impl PodName {
    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name in it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_a_namespace_and_a_name() {
        assert_eq!("kube-system/a.b-1".parse::<PodName>().unwrap().to_string(), "kube-system/a.b-1");
        for bad in ["", "a", "/", "a/", "/a", "a/b/c", "A/b", "a/*", "a/b\n", "a /b"] {
            assert!(bad.parse::<PodName>().is_err(), "{bad:?}");
        }
    }
}
