//! The API of an adaptor over a temporary store and a simulated KBS, on a real unix socket.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    unreachable_pub,
    reason = "each test uses a part"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_adaptor::kbs::{KbsClient, KbsSettings};
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::Observer;
use secure_comms_adaptor::store::DirectoryStore;
use secure_comms_adaptor::{Adaptor, Config};
use secure_comms_node::api::client::Client;
use secure_comms_node::api::types::Problem;
use secure_comms_node::api::{self, ApiError, ApiSettings, VmTunnels};
use secure_comms_node::health::Health;
use secure_comms_node::metrics::Metrics;
use secure_comms_node::pods::{Events, Pods};
use secure_comms_protocol::PodId;
use secure_comms_protocol::tag::parse_list;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn id(text: &str) -> PodId {
    text.parse().unwrap()
}

/// A node whose API listens.
pub struct Node {
    pub socket: PathBuf,
    pub client: Client,
    pub pods: Pods,
    pub health: Health,
    pub store: Arc<DirectoryStore>,
    pub observer: Observer,
    stop: watch::Sender<bool>,
    served: Option<JoinHandle<Result<(), ApiError>>>,
    directory: TempDir,
}

/// With this KBS; `None`: without Trustee.
pub async fn node(kbs: Option<&url::Url>) -> Node {
    node_for(kbs, &[]).await
}

/// For further users.
pub async fn node_for(kbs: Option<&url::Url>, allowed_uids: &[u32]) -> Node {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(DirectoryStore::open(directory.path().join("store")).unwrap());
    let keys = kbs.map_or(KeySource::UserData, |url| {
        let settings = KbsSettings { url: url.clone(), ca: None, admin: None };
        KeySource::Kbs(KbsClient::new(&settings, Duration::from_secs(60)).unwrap())
    });
    let events = Events::default();
    let observer = events.observer();
    let run = directory.path().join("run");
    let inbound = format!("KUBERNETES_PHASE:KATAAGENT:{}/{{pod}}/a.sock", run.display());
    let config = Config { inbounds: parse_list(&inbound).unwrap(), ..Config::new(observer.clone()) };
    let pods = Pods::new(Adaptor::new(store.clone(), keys, config), events);
    let socket = directory.path().join("api/adaptor.sock");
    let vm_tunnels = kbs.is_none().then(|| VmTunnels {
        store: store.clone(),
        inbounds: parse_list("KUBERNETES_PHASE:LOG:7000").unwrap(),
        outbounds: Vec::new(),
    });
    let (stop, _) = watch::channel(false);
    let health = Health::default();
    let client = Client::new(&socket);
    let mut node = Node { socket, client, pods, health, store, observer, stop, served: None, directory };
    let settings =
        ApiSettings { socket: node.socket.clone(), allowed_uids: allowed_uids.to_vec(), vm_tunnels };
    node.serve(settings).await;
    node
}

impl Node {
    async fn serve(&mut self, settings: ApiSettings) {
        let mut health = self.health.subscribe();
        self.served = Some(tokio::spawn(api::run(
            settings,
            self.pods.clone(),
            self.health.clone(),
            Metrics::default(),
            self.stop.subscribe(),
        )));
        health.wait_for(|parts| parts.contains_key("api")).await.unwrap();
    }

    /// Another process would call it so.
    pub async fn serve_again(&self) -> Result<(), ApiError> {
        let settings = ApiSettings { socket: self.socket.clone(), ..ApiSettings::default() };
        let (pods, health) = (self.pods.clone(), Health::default());
        timeout(PATIENCE, api::run(settings, pods, health, Metrics::default(), self.stop.subscribe()))
            .await
            .expect("it serves")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Asks for the end, and returns when the API has ended.
    pub async fn end(&mut self) {
        self.begin_end();
        let served = self.served.take().unwrap();
        timeout(PATIENCE, served).await.expect("the API ends").unwrap().unwrap();
    }

    pub fn begin_end(&self) {
        self.stop.send_replace(true);
    }

    /// Sends bytes, and reads until the service closes the connection.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        // The service may close before it has read all.
        drop(stream.write_all(bytes).await);
        let mut back = Vec::new();
        drop(timeout(PATIENCE, stream.read_to_end(&mut back)).await.expect("the service closes"));
        String::from_utf8_lossy(&back).into_owned()
    }

    /// A request with a JSON body; its status, its head and its body.
    pub async fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        Answer::read(&self.raw(request.as_bytes()).await)
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no answer: {text:?}"));
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// The problem; checks its form.
    pub fn problem(&self) -> Problem {
        assert!(self.head.contains("content-type: application/problem+json"), "{}", self.head);
        let problem: Problem = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem.status, self.status, "{}", self.body);
        problem
    }
}
