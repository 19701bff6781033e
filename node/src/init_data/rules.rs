//! Which init-data each pod's VM is started with, by the pod's namespace and name.
//!
//! ```toml
//! [[rule]]
//! namespace = "prod"
//! pod = "db-*"
//! file = "db.toml"
//!
//! [[rule]]
//! namespace = "*"
//! pod = "*"
//! unbound = true
//! ```
//! The first rule that matches decides.

use std::path::{Path, PathBuf};

use secure_comms_protocol::InitDataDigest;
use serde::Deserialize;

use super::pod_name::PodName;
use super::{InitDataError, digest, fault, read};

/// Rules, in their order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    #[serde(default)]
    rule: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    namespace: String,
    pod: String,
    digest: Option<String>,
    file: Option<PathBuf>,
    #[serde(default)]
    unbound: bool,
}

/// The init-data of a pod by the rules of a file; `None` if its rule says that it is unbound.
///
/// # Errors
/// The file cannot be read or is not a list of rules, no rule matches the pod, or the rule's file is not init-data.
pub fn of_pod(file: &Path, pod: &PodName) -> Result<Option<InitDataDigest>, InitDataError> {
    let rules = Rules::read(file)?;
    let mut found = None;
    // All of them are read: a fault shows at once, and not with the first pod that the rule is for.
    for (number, rule) in (1..).zip(&rules.rule) {
        let in_rule = |error: InitDataError| fault(format!("rule {number}: {error}"));
        let expected = rule.expected().map_err(in_rule)?;
        if found.is_none() && rule.matches(pod) {
            found = Some(expected.digest(file).map_err(in_rule)?);
        }
    }
    found.ok_or_else(|| {
        fault(format!("no rule matches pod {pod}: add one, with unbound = true if its VM has no init-data"))
    })
}

/// Looks for faults in the rules of a file, and in the files that they name.
///
/// # Errors
/// The file cannot be read or is not a list of rules, or a rule's file is not init-data.
pub fn check(file: &Path) -> Result<(), InitDataError> {
    for (number, rule) in (1..).zip(&Rules::read(file)?.rule) {
        let digest = rule.expected().and_then(|expected| expected.digest(file));
        drop(digest.map_err(|error| fault(format!("rule {number}: {error}")))?);
    }
    Ok(())
}

impl Rules {
    fn read(file: &Path) -> Result<Self, InitDataError> {
        let text = String::from_utf8(read_again(file)?).map_err(|_| fault("not UTF-8"))?;
        toml::from_str(&text).map_err(|error| fault(error.to_string().trim().replace('\n', " ")))
    }
}

/// Reads a file that is read for each pod: a pipe would hold pods up, and end with its first reader.
fn read_again(path: &Path) -> Result<Vec<u8>, InitDataError> {
    match path.metadata() {
        Ok(status) if !status.is_file() => Err(fault("not a regular file")),
        _ => read(path),
    }
}

/// What a rule says.
enum Expected<'a> {
    Digest(InitDataDigest),
    File(&'a Path),
    Nothing,
}

impl Expected<'_> {
    /// A relative path begins at the directory of the rules.
    fn digest(&self, rules: &Path) -> Result<Option<InitDataDigest>, InitDataError> {
        match self {
            Self::Digest(digest) => Ok(Some(digest.clone())),
            Self::Nothing => Ok(None),
            Self::File(path) => {
                let path = rules.parent().unwrap_or(Path::new("")).join(path);
                let named = |error| fault(format!("{}: {error}", path.display()));
                read_again(&path).and_then(|text| digest(&text)).map(Some).map_err(named)
            }
        }
    }
}

impl Rule {
    fn expected(&self) -> Result<Expected<'_>, InitDataError> {
        if self.namespace.is_empty() || self.pod.is_empty() {
            return Err(fault("namespace and pod must not be empty: write \"*\" for any"));
        }
        match (&self.digest, &self.file, self.unbound) {
            (Some(digest), None, false) => {
                digest.parse().map(Expected::Digest).map_err(|error| fault(format!("digest: {error}")))
            }
            (None, Some(file), false) => Ok(Expected::File(file)),
            (None, None, true) => Ok(Expected::Nothing),
            _ => Err(fault("expected one of digest, file and unbound = true")),
        }
    }

    fn matches(&self, pod: &PodName) -> bool {
        glob(&self.namespace, pod.namespace()) && glob(&self.pod, pod.name())
    }
}

/// Whether the text fits the pattern, in which each `*` stands for any characters, or none.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(text) = text.strip_prefix(first) else { return false };
    let Some((middle, last)) = rest.rsplit_once('*') else { return text.ends_with(rest) };
    let Some(mut text) = text.strip_suffix(last) else { return false };
    for part in middle.split('*') {
        // The leftmost place leaves most for the parts that follow.
        let Some((_, after)) = text.split_once(part) else { return false };
        text = after;
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(rules: &str, pod: &str) -> Result<Option<InitDataDigest>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("db.toml"), "algorithm = \"sha256\"\n").unwrap();
        let file = dir.path().join("rules.toml");
        std::fs::write(&file, rules).unwrap();
        of_pod(&file, &pod.parse().unwrap()).map_err(|error| error.to_string())
    }

    fn rule(namespace: &str, pod: &str, rest: &str) -> String {
        format!("[[rule]]\nnamespace = \"{namespace}\"\npod = \"{pod}\"\n{rest}\n")
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let digits = "ab".repeat(32);
        let rules = rule("prod", "db-*", "file = \"db.toml\"")
            + &rule("prod", "*", &format!("digest = \"{digits}\""))
            + &rule("prod*", "x", "unbound = true");
        let db = super::super::digest(b"algorithm = \"sha256\"\n").unwrap();
        assert_eq!(of(&rules, "prod/db-1"), Ok(Some(db)));
        assert_eq!(of(&rules, "prod/x").unwrap().unwrap().as_str(), digits);
        assert_eq!(of(&rules, "prod-2/x"), Ok(None));
        let error = of(&rules, "test/x").unwrap_err();
        assert!(error.starts_with("no rule matches pod test/x: add one"), "{error}");
    }

    #[test]
    fn a_rule_that_is_not_clear_is_refused_also_for_other_pods() {
        let good = rule("*", "*", "unbound = true");
        for (bad, expected) in [
            (rule("a", "a", ""), "rule 2: expected one of digest, file and unbound"),
            (rule("a", "a", "unbound = false"), "rule 2: expected one of"),
            (rule("a", "a", "file = \"f\"\nunbound = true"), "rule 2: expected one of"),
            (rule("a", "a", "digest = \"ab\""), "rule 2: digest: not a digest"),
            (rule("", "a", "unbound = true"), "rule 2: namespace and pod must not be empty"),
            (rule("a", "a", "unbound = true\nnode = \"x\""), "unknown field"),
            ("[[rule]]\npod = \"a\"\nunbound = true\n".to_owned(), "missing field"),
            ("[[rules]]\n".to_owned(), "unknown field"),
        ] {
            let error = of(&(good.clone() + &bad), "x/y").unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{bad}: {error}");
        }
        let error = of(&rule("*", "*", "file = \"none.toml\""), "x/y").unwrap_err();
        assert!(error.starts_with("rule 1: ") && error.contains("none.toml: No such file"), "{error}");
        assert!(of("", "x/y").unwrap_err().contains("no rule matches"));
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text) in [
            ("*", ""),
            ("*", "a"),
            ("a*", "a"),
            ("*a", "ba"),
            ("a*b*c", "abc"),
            ("a**c", "abc"),
            ("*a*", "bab"),
        ] {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in
            [("", "a"), ("a", ""), ("a*a", "a"), ("a*b*c", "ac"), ("ab*b*", "ab"), ("*x*", "ab"), ("a", "ab")]
        {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }

    /// The definition, letter by letter.
    fn slow(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|at| slow(rest, &text[at..])),
            Some((first, rest)) => text.split_first().is_some_and(|(c, text)| c == first && slow(rest, text)),
        }
    }

    proptest! {
        #[test]
        fn globs_are_read_by_their_definition(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            prop_assert_eq!(glob(&pattern, &text), slow(pattern.as_bytes(), text.as_bytes()), "{} {}", pattern, text);
        }
    }
}
