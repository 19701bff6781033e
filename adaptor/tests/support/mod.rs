//! A simulated agent behind a real SSH connection, a simulated KBS, and the adaptor of a test.
#![allow(missing_docs, unreachable_pub, dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod agent;
mod own_port;
pub mod talk;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::kbs::{KbsClient, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::{PodEvent, PodState};
use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_adaptor::{Adaptor, Config, Deadline, PodSpec};
use secure_comms_keys::{PodKey, WorkerNodePublic};
use secure_comms_protocol::PodId;
use secure_comms_protocol::tag::parse_list;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

pub use own_port::own_port;

/// The longest that a test waits for one event.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn pod() -> PodId {
    "pod-1".parse().unwrap()
}

pub fn addresses(sockets: &[std::net::SocketAddr]) -> Vec<Address> {
    sockets.iter().map(|socket| socket.to_string().parse().unwrap()).collect()
}

/// A growing list that a test can wait for.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<(Mutex<Vec<String>>, Notify)>);

impl Lines {
    pub fn push(&self, line: impl Into<String>) {
        self.0.0.lock().unwrap().push(line.into());
        self.0.1.notify_waiters();
    }

    pub fn all(&self) -> Vec<String> {
        self.0.0.lock().unwrap().clone()
    }

    pub fn count(&self, part: &str) -> usize {
        self.all().iter().filter(|line| line.contains(part)).count()
    }

    /// Waits until `count` lines contain this.
    pub async fn wait(&self, part: &str, count: usize) {
        let waited = timeout(PATIENCE, async {
            loop {
                let more = self.0.1.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if self.count(part) >= count {
                    return;
                }
                more.await;
            }
        });
        assert!(waited.await.is_ok(), "no '{part}' ({count} times) in {:#?}", self.all());
    }
}

/// A KBS that accepts every request and records it.
pub async fn kbs() -> (url::Url, Lines) {
    kbs_with_disk(Arc::default()).await
}

/// A KBS that records every request and accepts it, unless its disk is full: then it answers as Trustee does.
pub async fn kbs_with_disk(full: Arc<AtomicBool>) -> (url::Url, Lines) {
    let lines = Lines::default();
    let requests = lines.clone();
    let app = axum::Router::new().fallback(move |request: axum::extract::Request| {
        requests.push(format!("{} {}", request.method(), request.uri().path()));
        let kind = "https://github.com/confidential-containers/kbs/errors/PluginInternalError";
        let error = format!(r#"{{"type":"{kind}","detail":"Plugin internal error"}}"#);
        let full = full.load(Ordering::Relaxed);
        async move { if full { (StatusCode::UNAUTHORIZED, error) } else { (StatusCode::OK, String::new()) } }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, lines)
}

/// How a simulated KBS treats the requests that it records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KbsMode {
    Accepts,
    /// Answers a request for a resource whose path contains this only in another mode.
    Hangs(&'static str),
    /// Answers 500.
    Fails,
    /// Answers 403.
    Refuses,
}

/// A KBS that can change how it behaves.
pub async fn kbs_in(mode: KbsMode) -> (url::Url, Lines, Arc<Mutex<KbsMode>>) {
    let (lines, mode) = (Lines::default(), Arc::new(Mutex::new(mode)));
    let (requests, now) = (lines.clone(), mode.clone());
    let app = axum::Router::new().fallback(move |request: axum::extract::Request| {
        let request = format!("{} {}", request.method(), request.uri().path());
        let now = now.clone();
        requests.push(request.clone());
        async move {
            let hangs = |mode: KbsMode| matches!(mode, KbsMode::Hangs(path) if request.contains(path));
            while hangs(*now.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let mode = *now.lock().unwrap();
            match mode {
                KbsMode::Fails => StatusCode::INTERNAL_SERVER_ERROR,
                KbsMode::Refuses => StatusCode::FORBIDDEN,
                KbsMode::Hangs(_) | KbsMode::Accepts => StatusCode::OK,
            }
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, lines, mode)
}

/// An URL where nothing listens.
pub fn refused() -> url::Url {
    format!("http://127.0.0.1:{}", own_port()).parse().unwrap()
}

/// An echo server.
pub async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                drop(tokio::io::copy(&mut read, &mut write).await);
            });
        }
    });
    address
}

/// Sends a word through a tunnel to the echo server, and checks that it returns.
pub async fn echoes(address: &str) {
    let echoed = timeout(PATIENCE, async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"hello").await.unwrap();
        socket.shutdown().await.unwrap();
        let mut back = Vec::new();
        socket.read_to_end(&mut back).await.map(|_| back)
    });
    assert_eq!(echoed.await.unwrap().unwrap(), b"hello");
}

/// An adaptor, its store and its KBS.
pub struct World {
    pub adaptor: Adaptor,
    pub events: Lines,
    pub published: Lines,
    pub store: Arc<DirectoryStore>,
    /// Whether the KBS's disk is full.
    pub kbs_full: Arc<AtomicBool>,
    directory: tempfile::TempDir,
    kbs: url::Url,
}

impl World {
    pub async fn new(outbounds: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kbs_full = Arc::default();
        let (kbs, published) = kbs_with_disk(Arc::clone(&kbs_full)).await;
        let (adaptor, events, store) = build(&directory, Some(&kbs), outbounds);
        Self { adaptor, events, published, store, kbs_full, directory, kbs }
    }

    /// With another KBS, which is not recorded, and other inbounds.
    pub async fn custom(kbs: url::Url, inbounds: &str) -> Self {
        let world = Self::new("").await;
        let (adaptor, events, store) = build_with(&world.directory, Some(&kbs), "", inbounds, None);
        Self { adaptor, events, store, kbs, ..world }
    }

    /// With another KBS and configuration.
    pub async fn configured(kbs: url::Url, change: impl FnOnce(&mut Config)) -> Self {
        let world = Self::new("").await;
        let (adaptor, events, store) =
            build_changed(&world.directory, Some(&kbs), "", KATAAGENT, None, change);
        Self { adaptor, events, store, kbs, ..world }
    }

    /// The directory of the store.
    pub fn store_path(&self) -> std::path::PathBuf {
        self.directory.path().join("store")
    }

    /// With an observer that panics at an event that contains this.
    pub async fn panicking(at: &'static str) -> Self {
        let world = Self::new("").await;
        let (adaptor, events, store) =
            build_with(&world.directory, Some(&world.kbs), "", KATAAGENT, Some(at));
        Self { adaptor, events, store, ..world }
    }

    /// One more adaptor with the same store and KBS.
    pub fn second(&self) -> Adaptor {
        build(&self.directory, Some(&self.kbs), "").0
    }

    /// The adaptor of a new process with the same store and KBS.
    pub fn restart(self, outbounds: &str) -> Self {
        let (adaptor, events, store) = build(&self.directory, Some(&self.kbs), outbounds);
        Self { adaptor, events, store, ..self }
    }

    /// As [`restart`](Self::restart), with another configuration.
    pub fn restart_configured(self, change: impl FnOnce(&mut Config)) -> Self {
        let (adaptor, events, store) =
            build_changed(&self.directory, Some(&self.kbs), "", KATAAGENT, None, change);
        Self { adaptor, events, store, ..self }
    }

    pub async fn user_data() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kbs_full = Arc::default();
        let (kbs, published) = kbs_with_disk(Arc::clone(&kbs_full)).await;
        let (adaptor, events, store) = build(&directory, None, "");
        // As the command `user-data` does.
        store.pod_key(&pod()).await.unwrap();
        Self { adaptor, events, published, store, kbs_full, directory, kbs }
    }

    pub async fn node_key(&self) -> WorkerNodePublic {
        self.store.worker_node_key().await.unwrap().public().unwrap()
    }

    pub async fn pod_key(&self) -> PodKey {
        self.store.pod_key(&pod()).await.unwrap()
    }

    pub fn state(&self) -> PodState {
        self.adaptor.snapshot(&pod()).unwrap().state
    }

    /// The events without those that say what a caller waits for: these come only where a call takes longer than a second.
    pub fn happened(&self) -> Vec<String> {
        self.events.all().into_iter().filter(|line| !line.starts_with("waiting for ")).collect()
    }

    /// How many of them contain this.
    pub fn times(&self, part: &str) -> usize {
        self.happened().iter().filter(|line| line.contains(part)).count()
    }

    /// Prepares the pod, and returns the address of its KATAAGENT inbound.
    pub async fn prepare(&self) -> String {
        let endpoints =
            self.adaptor.prepare(&pod(), PodSpec::default(), Deadline::after(PATIENCE)).await.unwrap();
        endpoints.iter().find(|endpoint| endpoint.name.as_str() == "KATAAGENT").unwrap().local.clone()
    }
}

/// The inbounds of a pod, if a test wants no others.
pub const KATAAGENT: &str = "KUBERNETES_PHASE:KATAAGENT:0";

fn build(
    directory: &tempfile::TempDir,
    kbs: Option<&url::Url>,
    outbounds: &str,
) -> (Adaptor, Lines, Arc<DirectoryStore>) {
    build_with(directory, kbs, outbounds, KATAAGENT, None)
}

fn build_with(
    directory: &tempfile::TempDir,
    kbs: Option<&url::Url>,
    outbounds: &str,
    inbounds: &str,
    panics: Option<&'static str>,
) -> (Adaptor, Lines, Arc<DirectoryStore>) {
    build_changed(directory, kbs, outbounds, inbounds, panics, |_| {})
}

fn build_changed(
    directory: &tempfile::TempDir,
    kbs: Option<&url::Url>,
    outbounds: &str,
    inbounds: &str,
    panics: Option<&'static str>,
    change: impl FnOnce(&mut Config),
) -> (Adaptor, Lines, Arc<DirectoryStore>) {
    let store = Arc::new(DirectoryStore::open(directory.path().join("store")).unwrap());
    let events = Lines::default();
    let recorded = events.clone();
    let keys = kbs.map_or(KeySource::UserData, |url| {
        let settings = KbsSettings { url: url.clone(), ca: None, admin: None };
        KeySource::Kbs(KbsClient::new(&settings, Duration::from_secs(60)).unwrap())
    });
    let observer = Arc::new(move |_: &PodId, event: &PodEvent| {
        let event = event.to_string();
        recorded.push(event.clone());
        assert!(!panics.is_some_and(|part| event.contains(part)), "the observer panics, as the test asks");
    });
    let mut config = Config {
        inbounds: parse_list(&inbounds.replace("KATAAGENT:0", &format!("KATAAGENT:{}", own_port()))).unwrap(),
        outbounds: parse_list(outbounds).unwrap(),
        ..Config::new(observer)
    };
    change(&mut config);
    (Adaptor::new(store.clone(), keys, config), events, store)
}
