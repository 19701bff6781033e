//! Simulates Trustee's KBS: the resource API of `/kbs/v0`, as the adaptor (admin) and the guest (attested) see it.
//!
//! It differs from the real one in one thing: `GET` returns the raw bytes, not a JWE for the TEE's key. In a real VM
//! the CDH decrypts the JWE; the simulated CDH of [`guest`](crate::simulators::guest) does without. The programs under
//! test can't see the difference.

mod admin;
mod front;
mod routes;
mod tls;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use secure_comms_simulators::accept::Serving;
use secure_comms_simulators::http;
use secure_comms_tunnel::netns::Namespace;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use admin::AdminKey;
use tls::ServerIdentity;

pub use front::HttpsFront;

/// The evidence that the KBS expects by default.
pub use secure_comms_simulators::guest::DEFAULT_EVIDENCE;

/// Fault of the KBS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    #[default]
    None,
    /// Accepts a connection and closes it at once; a request on an older connection closes that one.
    Refuse,
    /// Accepts and never answers.
    Silent,
    /// Answers each resource `GET` of an attested guest or of anyone else with 200 and these bytes.
    Garbage(Vec<u8>),
    /// Answers every request with this status and an empty body.
    Status(u16),
    /// Answers correctly, each request after this time.
    Slow(Duration),
    /// Stores a published resource this time after it was sent, also if its sender has gone, and answers then. Everything
    /// else is done at once.
    LatePost(Duration),
    /// Its storage is read-only or full: `POST` and `DELETE` of an admin fail, and resources stay as they are.
    ReadOnly,
}

/// Options of a KBS.
#[derive(Clone, Debug)]
pub struct KbsOptions {
    /// HTTPS, with a certificate for 127.0.0.1 and localhost from its own CA ([`Kbs::ca_pem`]).
    pub https: bool,
    /// A Trustee before v0.20: `DELETE` answers 405, and there is no `/healthz`.
    pub old: bool,
    /// The evidence a guest must show to attest.
    pub evidence: String,
    /// Time without a request head after which a connection, new or idle, is closed (Trustee: 5 s).
    pub head_limit: Duration,
    /// Port to listen on; 0: any that is free. After [`Kbs::kill`] only a port below the range from which the kernel
    ///  hands out others is certain to be free.
    pub port: u16,
    /// The network namespace whose 127.0.0.1 it listens on; none: that of this process.
    pub namespace: Option<Namespace>,
}

impl Default for KbsOptions {
    fn default() -> Self {
        Self {
            https: false,
            old: false,
            evidence: DEFAULT_EVIDENCE.to_owned(),
            head_limit: Duration::from_secs(5),
            port: 0,
            namespace: None,
        }
    }
}

/// A request as it arrived, before it was answered.
#[derive(Clone, Debug)]
pub struct LoggedRequest {
    /// Such as `GET`.
    pub method: String,
    /// Such as `/kbs/v0/auth`.
    pub path: String,
    /// Time at which its head was read.
    pub at: Instant,
}

/// A running KBS; stops when dropped.
#[derive(Debug)]
pub struct Kbs {
    shared: Arc<Shared>,
    addr: SocketAddr,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Up(Serving),
    /// Bound but not listening: clients are refused, and no other socket can take the port.
    Down(TcpSocket),
    /// Between the two, or after a failure in between.
    Changing,
}

/// State shared by the connections.
struct Shared {
    options: KbsOptions,
    admin: AdminKey,
    identity: Option<ServerIdentity>,
    fault: Mutex<Fault>,
    resources: Mutex<BTreeMap<String, Bytes>>,
    denied: Mutex<HashSet<String>>,
    /// A resource policy, and the claims of the VM that attests.
    policy: Mutex<Option<(String, Value)>>,
    /// By session cookie; lost when the KBS is killed, as in Trustee.
    sessions: Mutex<HashMap<String, Session>>,
    log: watch::Sender<Vec<LoggedRequest>>,
    connections: AtomicU64,
    open: watch::Sender<u64>,
    attestations: AtomicU64,
    /// Late publications that are not stored yet.
    late: watch::Sender<u64>,
    /// Seconds that its clock is ahead of ours.
    ahead: AtomicI64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

struct Session {
    nonce: String,
    /// Issued by `attest`; a session without a token gives access to nothing.
    token: Option<String>,
}

impl Kbs {
    /// Starts a KBS on 127.0.0.1.
    ///
    /// # Errors
    /// If keys can't be made, or the port can't be bound.
    pub async fn start(options: KbsOptions) -> Result<Self> {
        // What the guest dials is the agent's inbound, on 127.0.0.1: that name must be in the certificate.
        let names = ["127.0.0.1", "localhost"];
        let identity = if options.https { Some(ServerIdentity::generate(&names)?) } else { None };
        let shared = Arc::new(Shared {
            options,
            admin: AdminKey::generate()?,
            identity,
            fault: Mutex::default(),
            resources: Mutex::default(),
            denied: Mutex::default(),
            policy: Mutex::default(),
            sessions: Mutex::default(),
            log: watch::Sender::new(Vec::new()),
            connections: AtomicU64::new(0),
            open: watch::Sender::new(0),
            attestations: AtomicU64::new(0),
            late: watch::Sender::new(0),
            ahead: AtomicI64::new(0),
        });
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, shared.options.port));
        let socket = bind(listen, shared.options.namespace.as_ref()).await?;
        let addr = socket.local_addr().context("KBS: reading the bound address")?;
        let state = Mutex::new(State::Up(Shared::serve(&shared, socket)?));
        Ok(Self { shared, addr, state })
    }

    /// Address it listens on; the same after a restart.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Base URL without a path: `http://127.0.0.1:<port>` or `https://..`.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.shared.options.https { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// Whether it is a Trustee that cannot delete.
    #[must_use]
    pub fn is_old(&self) -> bool {
        self.shared.options.old
    }

    /// PEM of the CA to pin, if this KBS speaks HTTPS.
    #[must_use]
    pub fn ca_pem(&self) -> Option<&str> {
        self.shared.identity.as_ref().map(ServerIdentity::ca_pem)
    }

    /// The admin's private key: Ed25519, PKCS#8 PEM.
    #[must_use]
    pub fn admin_key_pem(&self) -> &str {
        self.shared.admin.pem()
    }

    /// A valid admin token; it expires after a minute.
    ///
    /// # Errors
    /// If the clock is set before 1970.
    pub fn admin_token(&self) -> Result<String> {
        let now = admin::now()?;
        let claims = json!({"iss": "secure-comms-tests", "role": "admin", "sub": "tests", "iat": now, "exp": now + 60});
        Ok(self.sign_claims(&claims))
    }

    /// A token with any claims, signed with the admin's key.
    #[must_use]
    pub fn sign_claims(&self, claims: &Value) -> String {
        self.shared.admin.sign(claims)
    }

    /// Sets the fault, from the next connection and the next request on.
    pub fn set_fault(&self, fault: Fault) {
        *lock(&self.shared.fault) = fault;
    }

    /// Sets how many seconds its clock is ahead of ours (negative: behind), for the times in tokens.
    pub fn set_clock_ahead(&self, seconds: i64) {
        self.shared.ahead.store(seconds, Ordering::Relaxed);
    }

    /// Makes the resource policy deny `path` (`<repo>/<type>/<tag>`) to guests.
    pub fn deny(&self, path: &str) {
        lock(&self.shared.denied).insert(path.to_owned());
    }

    /// Makes the resource policy allow `path` again.
    pub fn allow(&self, path: &str) {
        lock(&self.shared.denied).remove(path);
    }

    /// From now on a Rego policy decides which resources guests may read, as in Trustee; `claims` are those of the token of the
    /// VM that attests.
    pub fn enforce(&self, policy: &str, claims: Value) {
        *lock(&self.shared.policy) = Some((policy.to_owned(), claims));
    }

    /// The resource at `<repo>/<type>/<tag>`.
    #[must_use]
    pub fn resource(&self, path: &str) -> Option<Vec<u8>> {
        lock(&self.shared.resources).get(path).map(|bytes| bytes.to_vec())
    }

    /// Stores a resource without the API.
    ///
    /// # Errors
    /// If `path` is not `<repo>/<type>/<tag>`.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<()> {
        if !routes::is_resource_path(path) {
            bail!("KBS: {path:?} is not a resource path: expected <repo>/<type>/<tag>");
        }
        lock(&self.shared.resources).insert(path.to_owned(), bytes.into());
        Ok(())
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.log.borrow().clone()
    }

    /// Waits for a request, past or coming, that satisfies `wanted`.
    ///
    /// # Errors
    /// After `deadline`, with the requests so far.
    pub async fn wait_for_request(
        &self,
        wanted: impl Fn(&LoggedRequest) -> bool,
        deadline: Duration,
    ) -> Result<LoggedRequest> {
        let mut log = self.shared.log.subscribe();
        let seen = tokio::time::timeout(deadline, log.wait_for(|log| log.iter().any(&wanted))).await;
        let found = match seen {
            Ok(Ok(log)) => log.iter().find(|request| wanted(request)).cloned(),
            _ => None,
        };
        found.ok_or_else(|| anyhow!("KBS: no such request within {deadline:?}; saw {:?}", self.requests()))
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        *self.shared.open.borrow()
    }

    /// Waits until no connection is open.
    pub async fn wait_until_idle(&self) {
        // The sender lives as long as this KBS, so waiting can't fail.
        let _ = self.shared.open.subscribe().wait_for(|open| *open == 0).await;
    }

    /// Waits until every late publication is stored ([`Fault::LatePost`]).
    pub async fn wait_until_stored(&self) {
        // The sender lives as long as this KBS, so waiting can't fail.
        let _ = self.shared.late.subscribe().wait_for(|late| *late == 0).await;
    }

    /// Successful attestations so far.
    #[must_use]
    pub fn attestations(&self) -> u64 {
        self.shared.attestations.load(Ordering::Relaxed)
    }

    /// Goes down: closes every connection, refuses new ones, forgets the sessions and keeps the resources.
    ///
    /// # Errors
    /// If it is not up.
    pub async fn kill(&self) -> Result<()> {
        let serving = {
            let mut state = lock(&self.state);
            match std::mem::replace(&mut *state, State::Changing) {
                State::Up(serving) => serving,
                other => {
                    *state = other;
                    bail!("KBS: kill: it is not up");
                }
            }
        };
        serving.stop().await;
        lock(&self.shared.sessions).clear();
        let held = self.bind_again().await?;
        *lock(&self.state) = State::Down(held);
        Ok(())
    }

    /// Binds the port that was just released.
    async fn bind_again(&self) -> Result<TcpSocket> {
        /// A process that is being forked holds a copy of the listener until it calls exec.
        const PAUSE: Duration = Duration::from_millis(5);
        const TRIES: usize = 1000;
        for _ in 0..TRIES {
            match bind(self.addr, self.shared.options.namespace.as_ref()).await {
                Err(error) if is_taken(&error) => tokio::time::sleep(PAUSE).await,
                bound => return bound,
            }
        }
        bail!("KBS: {} stays taken", self.addr)
    }

    /// Listens again, on the same port.
    ///
    /// # Errors
    /// If it is not down.
    pub async fn restart(&self) -> Result<()> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Changing) {
            State::Down(socket) => {
                *state = State::Up(Shared::serve(&self.shared, socket)?);
                Ok(())
            }
            other => {
                *state = other;
                bail!("KBS: restart: it is not down")
            }
        }
    }
}

impl Shared {
    fn serve(self: &Arc<Self>, socket: TcpSocket) -> Result<Serving> {
        let listener = socket.listen(128).context("KBS: listening")?;
        let shared = Arc::clone(self);
        Ok(Serving::start(listener, move |stream| {
            let open = Open::new(&shared);
            let shared = Arc::clone(&shared);
            async move {
                let _open = open;
                shared.connection(stream).await;
            }
        }))
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        match self.fault() {
            Fault::Refuse => return,
            Fault::Silent => return swallow(stream).await,
            Fault::None
            | Fault::Garbage(_)
            | Fault::Status(_)
            | Fault::Slow(_)
            | Fault::LatePost(_)
            | Fault::ReadOnly => {}
        }
        let head_limit = self.options.head_limit;
        let handle = |request| Arc::clone(&self).handle(request);
        match &self.identity {
            None => http::serve(stream, head_limit, handle).await,
            Some(identity) => {
                let acceptor = TlsAcceptor::from(identity.config());
                // After a failed or slow handshake the connection is closed, and the client reports why.
                if let Ok(Ok(stream)) = tokio::time::timeout(head_limit, acceptor.accept(stream)).await {
                    http::serve(stream, head_limit, handle).await;
                }
            }
        }
    }

    fn fault(&self) -> Fault {
        lock(&self.fault).clone()
    }
}

/// Counts a connection as open while it exists, also if its task is aborted.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.connections.fetch_add(1, Ordering::Relaxed);
        shared.open.send_modify(|open| *open += 1);
        Self(Arc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open = open.saturating_sub(1));
    }
}

/// Reads until the client closes the connection.
async fn swallow(mut stream: TcpStream) {
    let mut buffer = vec![0; 4096];
    while matches!(stream.read(&mut buffer).await, Ok(1..)) {}
}

async fn bind(addr: SocketAddr, namespace: Option<&Namespace>) -> Result<TcpSocket> {
    let socket = match namespace {
        Some(namespace) => namespace.run(TcpSocket::new_v4).await.context("KBS: making a socket")?,
        None => TcpSocket::new_v4().context("KBS: making a socket")?,
    };
    // Earlier connections of the port may still linger.
    socket.set_reuseaddr(true).context("KBS: setting SO_REUSEADDR")?;
    socket.bind(addr).with_context(|| format!("KBS: binding {addr}"))?;
    Ok(socket)
}

fn is_taken(error: &anyhow::Error) -> bool {
    let taken = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
    error.downcast_ref().is_some_and(taken)
}

/// A poisoned lock is no error here: the data are plain values, and the panic is reported where it occurred.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
