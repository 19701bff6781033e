//! A simulated agent behind a real SSH connection, a simulated KBS, and the adaptor of a test.
#![allow(missing_docs, unreachable_pub, dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod agent;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use secure_comms_adaptor::address::Address;
use secure_comms_adaptor::kbs::{KbsClient, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_adaptor::{Adaptor, Config};
use secure_comms_keys::{PodKey, WorkerNodePublic};
use secure_comms_protocol::PodId;
use secure_comms_protocol::limits::REKEY_BYTES;
use secure_comms_protocol::tag::parse_list;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

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

    /// The adaptor of a new process with the same store and KBS.
    pub fn restart(self, outbounds: &str) -> Self {
        let (adaptor, events, store) = build(&self.directory, Some(&self.kbs), outbounds);
        Self { adaptor, events, store, ..self }
    }

    pub async fn user_data() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kbs_full = Arc::default();
        let (kbs, published) = kbs_with_disk(Arc::clone(&kbs_full)).await;
        let (adaptor, events, store) = build(&directory, None, "");
        Self { adaptor, events, published, store, kbs_full, directory, kbs }
    }

    pub async fn node_key(&self) -> WorkerNodePublic {
        self.store.worker_node_key().await.unwrap().public().unwrap()
    }

    pub async fn pod_key(&self) -> PodKey {
        self.store.pod_key(&pod()).await.unwrap()
    }

    /// Prepares the pod, and returns the address of its KATAAGENT inbound.
    pub async fn prepare(&self) -> String {
        let endpoints = self.adaptor.prepare(&pod()).await.unwrap();
        endpoints.iter().find(|endpoint| endpoint.name.as_str() == "KATAAGENT").unwrap().local.clone()
    }
}

fn build(
    directory: &tempfile::TempDir,
    kbs: Option<&url::Url>,
    outbounds: &str,
) -> (Adaptor, Lines, Arc<DirectoryStore>) {
    let store = Arc::new(DirectoryStore::open(directory.path().join("store")).unwrap());
    let events = Lines::default();
    let recorded = events.clone();
    let keys = kbs.map_or(KeySource::UserData, |url| {
        let settings = KbsSettings { url: url.clone(), ca: None, admin: None };
        KeySource::Kbs(KbsClient::new(&settings, Duration::from_secs(2)).unwrap())
    });
    let config = Config {
        inbounds: parse_list("KUBERNETES_PHASE:KATAAGENT:0").unwrap(),
        outbounds: parse_list(outbounds).unwrap(),
        rekey_bytes: REKEY_BYTES,
        observer: Arc::new(move |_, event| recorded.push(event.to_string())),
    };
    (Adaptor::new(store.clone(), keys, config), events, store)
}
