//! No error shows a cause twice: in its own text, and again as its source.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::kbs::{AdminSettings, KbsClient, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_adaptor::{Adaptor, Config, Deadline, PodSpec};
use secure_comms_protocol::tag::parse_list;

/// The text of the error and of its sources. No text may contain that of its source.
fn chain(error: &dyn Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(source) = next {
        let text = source.to_string();
        let above = texts.last().unwrap();
        assert!(!above.contains(&text), "'{above}' shows its source '{text}'");
        texts.push(text);
        next = source.source();
    }
    texts.join(": ")
}

async fn prepare(store: &Path, inbounds: &str) -> Box<dyn Error> {
    let config = Config { inbounds: parse_list(inbounds).unwrap(), ..Config::new(Arc::new(|_, _| {})) };
    let store = Arc::new(DirectoryStore::open(store).unwrap());
    let adaptor = Adaptor::new(store, KeySource::UserData, config);
    let pod = "p1".parse().unwrap();
    Box::new(
        adaptor
            .prepare(&pod, PodSpec::default(), Deadline::after(Duration::from_secs(60)))
            .await
            .unwrap_err(),
    )
}

#[tokio::test]
async fn an_inbound_that_cannot_listen_names_the_cause_once_and_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    DirectoryStore::open(&store).unwrap().pod_key(&"p1".parse().unwrap()).await.unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let dir = dir.path().display();
    let cases = [
        (format!("KUBERNETES_PHASE:X:{port}"), "Address already in use", "choose another one, or 0 for any"),
        (format!("KUBERNETES_PHASE:X:{}", file.display()), "Address already in use", "choose another path"),
        (format!("KUBERNETES_PHASE:X:{dir}/none/x"), "No such file or directory", "make its directory"),
    ];
    for (tag, cause, advice) in cases {
        let text = chain(&*prepare(&store, &tag).await);
        assert_eq!(text.matches(cause).count(), 1, "{text}");
        assert!(text.starts_with(&format!("inbound {tag}: listening: {cause}")), "{text}");
        assert!(text.contains(advice), "{text}");
    }
}

#[tokio::test]
async fn files_that_cannot_be_read_name_the_cause_once() {
    let dir = tempfile::tempdir().unwrap();
    let garbage = dir.path().join("garbage");
    std::fs::write(&garbage, "garbage").unwrap();
    let missing = dir.path().join("missing");
    for file in [&garbage, &missing, &dir.path().to_path_buf()] {
        let settings = |ca: Option<PathBuf>, admin: Option<PathBuf>| KbsSettings {
            url: "https://127.0.0.1:1".parse().unwrap(),
            ca,
            admin: admin.map(|key_file| AdminSettings { key_file, issuer: "i".into(), role: "r".into() }),
        };
        for settings in [settings(Some(file.clone()), None), settings(None, Some(file.clone()))] {
            let text = chain(&KbsClient::new(&settings, Duration::from_secs(1)).unwrap_err());
            assert!(text.matches(&*file.display().to_string()).count() == 1, "{text}");
        }
    }
    chain(&DirectoryStore::open(garbage.join("x")).unwrap_err());
    let store = DirectoryStore::open(dir.path().join("store")).unwrap();
    store.worker_node_key().await.unwrap();
    let key = dir.path().join("store/worker-node.key");
    std::fs::write(&key, "garbage").unwrap();
    let text = chain(&store.worker_node_key().await.unwrap_err());
    assert!(text.contains("no usable key"), "{text}");
}

/// The sources of the worker node's side, and of what it prints of the lower rooms.
fn sources(path: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.extend(path.extension().is_some_and(|end| end == "rs").then_some(path)),
        }
    }
}

#[test]
fn no_error_type_shows_its_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    for folder in ["adaptor/src", "keys/src", "node/src", "tunnel/src"] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 40, "{} files", files.len());
    let mut checked = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for part in text.split("#[error(").skip(1) {
            // From the format string to the end of the variant, which the next attribute of an error ends at the latest.
            let (format, variant) = part.split_once(")]").unwrap();
            let variant = variant.split("#[error(").next().unwrap();
            let variant = variant.split("\n    },").next().unwrap().split("\n}").next().unwrap();
            checked += 1;
            let named = ["{source", ".source"].iter().any(|name| format.contains(name));
            let first_line = variant.lines().nth(1).unwrap_or_default();
            let unnamed = format.contains("{0")
                && ["#[source]", "#[from]"].iter().any(|mark| first_line.contains(mark));
            assert!(!named && !unnamed, "{}: {format}{variant}", file.display());
        }
    }
    assert!(checked > 40, "{checked} errors");
}
