//! The layout of CAA's pods directory, and the keys of `apf.json`.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use zeroize::Zeroizing;

use crate::doctor::report::Finding;

/// Directories that are looked at, of those whose pods live.
const LOOKED_AT: usize = 16;
/// The largest file that is read, in bytes.
const SIZE_MAX: u64 = 1 << 20;
/// The names of the file, as the service reads them: the first that is there; CAA up to v0.14 wrote `daemon.json`.
const NAMES: [&str; 2] = ["apf.json", "daemon.json"];
/// The flag of a listening socket, in /proc/net/unix.
const LISTENS: &str = "00010000";

/// What is needed of `apf.json`. Only which keys are there is read: the values are secret.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Keys {
    pod_name: Option<IgnoredAny>,
    pod_namespace: Option<IgnoredAny>,
    tls_server_key: Option<IgnoredAny>,
    tls_server_cert: Option<IgnoredAny>,
    tls_client_ca: Option<IgnoredAny>,
}

impl Keys {
    fn missing(&self, strict: bool) -> Vec<&'static str> {
        let of_all = [("pod-name", &self.pod_name), ("pod-namespace", &self.pod_namespace)];
        let of_tls = [
            ("tls-server-key", &self.tls_server_key),
            ("tls-server-cert", &self.tls_server_cert),
            ("tls-client-ca", &self.tls_client_ca),
        ];
        let tls = of_tls.into_iter().filter(|_| !strict);
        of_all.into_iter().chain(tls).filter(|(_, value)| value.is_none()).map(|(key, _)| key).collect()
    }
}

/// Looks at the pods directory, and at the newest of the pods that live. `unix` is /proc/net/unix.
pub(in crate::doctor) fn check(directory: &Path, strict: bool, unix: &Path) -> Finding {
    const CHECK: &str = "caa-directory";
    const FIX: &str =
        "check CAA's -pods-dir and pods-directory, and that this release of CAA is a supported one";
    let title = format!("CAA's pods directory {} is of the layout that we know", directory.display());
    let sandboxes = match sandboxes(directory) {
        Ok(sandboxes) => sandboxes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let why = "it does not exist: CAA makes it with its first pod. If there was one, check CAA's -pods-dir and \
                       pods-directory";
            return Finding::not_checked(CHECK, title, why);
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Finding::not_checked(CHECK, title, format!("{error}: run doctor as root"));
        }
        Err(error) => return Finding::fault(CHECK, title, error.to_string(), FIX),
    };
    let all = sandboxes.len();
    let listening = match listening(unix) {
        Ok(listening) => listening,
        Err(error) => return Finding::not_checked(CHECK, title, format!("{}: {error}", unix.display())),
    };
    let living: Vec<PathBuf> = sandboxes.into_iter().filter(|path| lives(path, &listening)).collect();
    let faults: Vec<String> =
        living.iter().take(LOOKED_AT).filter_map(|path| fault(path, strict).err()).collect();
    let title = format!("{title}: {} pods live, {} are gone", living.len(), all - living.len());
    match faults.first() {
        None => Finding::ok(CHECK, title),
        Some(first) => {
            let looked_at = living.len().min(LOOKED_AT);
            let found = format!("{} of the {looked_at} newest differ; the first: {first}", faults.len());
            Finding::fault(CHECK, title, found, FIX)
        }
    }
}

/// The directories of the sandboxes, the newest first.
fn sandboxes(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // One that is removed while we look counts as never there.
        let Ok(about) = entry.metadata() else { continue };
        if about.is_dir() {
            all.push((about.modified()?, entry.path()));
        }
    }
    all.sort_by(|a, b| b.cmp(a));
    Ok(all.into_iter().map(|(_, path)| path).collect())
}

/// The paths of all unix sockets that listen.
fn listening(unix: &Path) -> io::Result<HashSet<PathBuf>> {
    let mut paths = HashSet::new();
    for line in BufReader::new(fs::File::open(unix)?).lines().skip(1) {
        let line = line?;
        let mut words = line.split_whitespace();
        let (flags, path) = (words.nth(3), words.nth(3));
        paths.extend(path.filter(|_| flags == Some(LISTENS)).map(PathBuf::from));
    }
    Ok(paths)
}

/// A socket is listed by the path that CAA bound, which may lead to ours by symbolic links.
fn lives(sandbox: &Path, listening: &HashSet<PathBuf>) -> bool {
    let listens = |path: &Path| listening.contains(&path.join("agent.ttrpc"));
    listens(sandbox) || sandbox.canonicalize().is_ok_and(|path| listens(&path))
}

fn fault(sandbox: &Path, strict: bool) -> Result<(), String> {
    let paths = NAMES.map(|name| sandbox.join(name));
    let path = paths.iter().find(|path| path.exists()).unwrap_or(&paths[0]);
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut text = Zeroizing::new(Vec::new());
    match fs::File::open(path) {
        Ok(file) => file.take(SIZE_MAX + 1).read_to_end(&mut text).map_err(|error| failed(&error))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(failed(&"it is not there")),
        Err(error) => return Err(failed(&error)),
    };
    if text.len() as u64 > SIZE_MAX {
        return Err(failed(&format!("it is larger than {SIZE_MAX} bytes")));
    }
    // The parser's message quotes values of the file.
    let keys: Keys = serde_json::from_slice(&text).map_err(|error| {
        failed(&format!("no JSON object, line {} column {}", error.line(), error.column()))
    })?;
    match &*keys.missing(strict) {
        [] => Ok(()),
        missing => Err(failed(&format!("without {}", missing.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    const GOOD: &str = r#"{"pod-name": "a", "pod-namespace": "b", "tls-server-key": "SECRET", "tls-server-cert": "c",
        "tls-client-ca": "d", "pod-network": {}}"#;

    struct Node {
        dir: tempfile::TempDir,
        unix: String,
    }

    impl Node {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), unix: "Num RefCount ...\n".to_owned() }
        }

        fn sandbox(&mut self, id: &str, apf: Option<&str>, lives: bool) {
            let sandbox = self.dir.path().join("pods").join(id);
            fs::create_dir_all(&sandbox).unwrap();
            if let Some(apf) = apf {
                fs::write(sandbox.join("apf.json"), apf).unwrap();
            }
            let flags = if lives { LISTENS } else { "00000000" };
            let path = sandbox.join("agent.ttrpc");
            let path = path.display();
            self.unix += &format!("ffff: 00000002 00000000 {flags} 0001 01 4711 {path}\n");
        }

        fn check(&self, strict: bool) -> Finding {
            let unix = self.dir.path().join("unix");
            fs::write(&unix, &self.unix).unwrap();
            check(&self.dir.path().join("pods"), strict, &unix)
        }
    }

    #[track_caller]
    fn fault_of(finding: &Finding) -> &str {
        let Outcome::Fault { found, .. } = &finding.outcome else { panic!("{finding:?}") };
        found
    }

    #[test]
    fn a_known_layout_is_good_and_what_is_gone_does_not_count() {
        let mut node = Node::new();
        node.sandbox("one", Some(GOOD), true);
        node.sandbox("gone", Some("{}"), false);
        let finding = node.check(false);
        assert_eq!(finding.outcome, Outcome::Ok);
        assert!(finding.title.ends_with("1 pods live, 1 are gone"), "{}", finding.title);
    }

    #[test]
    fn before_the_first_pod_there_is_nothing_to_check() {
        let finding = Node::new().check(false);
        assert!(matches!(finding.outcome, Outcome::NotChecked { .. }), "{finding:?}");
    }

    #[test]
    fn a_pods_directory_may_be_a_link() {
        let mut node = Node::new();
        node.sandbox("one", Some(GOOD), true);
        node.check(false);
        let link = node.dir.path().join("link");
        std::os::unix::fs::symlink(node.dir.path().join("pods"), &link).unwrap();
        let title = check(&link, false, &node.dir.path().join("unix")).title;
        assert!(title.ends_with("1 pods live, 0 are gone"), "{title}");
    }

    #[test]
    fn missing_keys_and_files_are_faults() {
        for (apf, word) in [
            (Some("{\"pod-name\": \"a\"}"), "without pod-namespace, tls-server-key"),
            (Some("{\"tls-server-key\": SECRET"), "line 1 column 20"),
            (Some("[]"), "no JSON object"),
            (None, "is not there"),
        ] {
            let mut node = Node::new();
            node.sandbox("one", apf, true);
            let finding = node.check(false);
            let found = fault_of(&finding);
            assert!(found.contains(word) && !found.contains("SECRET"), "{found}");
        }
    }

    #[test]
    fn the_strict_variant_needs_no_keys_of_tls() {
        let mut node = Node::new();
        node.sandbox("one", Some(r#"{"pod-name": "a", "pod-namespace": "b"}"#), true);
        assert_eq!(node.check(true).outcome, Outcome::Ok);
        assert!(fault_of(&node.check(false)).contains("tls-server-key"));
    }

    #[test]
    fn the_older_file_name_is_looked_at_if_alone() {
        let mut node = Node::new();
        node.sandbox("one", None, true);
        let older = node.dir.path().join("pods/one/daemon.json");
        fs::write(&older, "{}").unwrap();
        assert!(fault_of(&node.check(false)).contains("daemon.json: without pod-name"));
        fs::write(&older, GOOD).unwrap();
        assert_eq!(node.check(false).outcome, Outcome::Ok);
        fs::write(older.with_file_name("apf.json"), "{}").unwrap();
        assert!(fault_of(&node.check(false)).contains("apf.json: without pod-name"));
    }
}
