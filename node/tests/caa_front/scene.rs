//! A network namespace with the redirect of cloud-api-adaptor's dials, our port in it, and clients.

use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use secure_comms_node::caa::TlsIdentity;
use secure_comms_node::caa::front::{Front, FrontLimits, Held};
use secure_comms_node::metrics::{Form, Metrics};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};

/// What must happen happens within this time; else the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const NAME: &str = "podvm-nginx-0a1b2c3d";
pub(crate) const VM: &str = "10.9.0.7:15150";
pub(crate) const VM_V6: &str = "[fd09::7]:15150";

/// Runs a test in a network namespace of its own, on a thread that ends with it.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { timeout(10 * PATIENCE, test()).await.expect("in time") });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(words: &str) {
    let mut words = words.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Rules as CAA.md section 4 has them, and a network in which the VMs do not exist.
fn redirect(port: u16) {
    run("ip link set lo up");
    run("ip link add node type veth peer name cloud");
    run("ip addr add 10.9.0.1/24 dev node");
    run("ip -6 addr add fd09::1/64 dev node nodad");
    run("ip link set node up");
    run("ip link set cloud up");
    let rules = format!(
        "table inet front-test {{
           chain to-adaptor {{ type nat hook output priority -100; policy accept;
             ip daddr != 127.0.0.0/8 tcp dport 15150 redirect to :{port}
             ip6 daddr != ::1 tcp dport 15150 redirect to :{port}
           }}
         }}"
    );
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut nft.stdin.take().unwrap(), rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

pub(crate) struct Scene {
    pub(crate) port: u16,
    pub(crate) held: mpsc::Receiver<Held>,
    pub(crate) metrics: Metrics,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) task: JoinHandle<()>,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::with(FrontLimits::default()).await
    }

    pub(crate) async fn with(limits: FrontLimits) -> Self {
        run("ip link set lo up");
        let metrics = Metrics::default();
        let front = Front::bind(0, limits, metrics.clone()).await.unwrap();
        let port = front.port();
        redirect(port);
        let (sender, held) = mpsc::channel(16);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(front.run(sender, stopped));
        Self { port, held, metrics, stop, task }
    }

    pub(crate) async fn held(&mut self) -> Held {
        timeout(PATIENCE, self.held.recv()).await.expect("a connection is held").unwrap()
    }

    pub(crate) fn refused(&self, reason: &str) -> u64 {
        let text = self.metrics.counters(Form::Prometheus).unwrap();
        let line = text.lines().find(|line| line.contains(&format!("{{reason=\"{reason}\"}}")));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// A connection of a client, held after its hello.
    pub(crate) async fn dial(
        &mut self,
        keys: &Keys,
    ) -> (JoinHandle<std::io::Result<TlsStream<TcpStream>>>, Held) {
        let dial = tokio::spawn(keys.client().connect(VM));
        let held = self.held().await;
        (dial, held)
    }
}

/// The keys of a pod, as cloud-api-adaptor makes them.
pub(crate) struct Keys {
    ca: rcgen::Certificate,
    pub(crate) client: (rcgen::Certificate, KeyPair),
    pub(crate) server: TlsIdentity,
}

fn parameters(names: &[&str], organization: &str) -> CertificateParams {
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.distinguished_name.push(DnType::OrganizationName, organization);
    parameters
}

pub(crate) fn client_certificate() -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (parameters(&[], "cloud-api-adaptor").self_signed(&key).unwrap(), key)
}

impl Keys {
    pub(crate) fn new() -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = parameters(&[], "agent-protocol-forwarder");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters(&[NAME], "agent-protocol-forwarder").signed_by(&key, &issuer).unwrap();
        let client = client_certificate();
        let server = TlsIdentity {
            server_name: NAME.to_owned(),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            certificate: certificate.der().clone(),
            client: client.0.der().clone(),
        };
        Self { ca: ca_certificate, client, server }
    }

    pub(crate) fn client(&self) -> Client {
        let (certificate, key) = &self.client;
        Client {
            roots: vec![self.ca.der().clone()],
            certificate: Some((certificate.der().clone(), key.serialize_der())),
            name: Some(NAME),
            version: &TLS13,
            padding: 0,
            segment: usize::MAX,
        }
    }
}

/// A client like cloud-api-adaptor's.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) roots: Vec<rustls_pki_types::CertificateDer<'static>>,
    pub(crate) certificate: Option<(rustls_pki_types::CertificateDer<'static>, Vec<u8>)>,
    /// `None`: no server name is sent.
    pub(crate) name: Option<&'static str>,
    pub(crate) version: &'static SupportedProtocolVersion,
    /// Makes the hello longer, by about as much.
    pub(crate) padding: usize,
    /// The longest segment that is sent.
    pub(crate) segment: usize,
}

impl Client {
    pub(crate) fn tls12(mut self) -> Self {
        self.version = &TLS12;
        self
    }

    fn config(&self) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        for root in &self.roots {
            roots.add(root.clone()).unwrap();
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[self.version])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match self.certificate.clone() {
            Some((certificate, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
                let key = ring::sign::any_supported_type(&key).unwrap();
                // Not checked: a client may hold another key.
                let certified = CertifiedKey::new(vec![certificate], key);
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
            None => builder.with_no_client_auth(),
        };
        config.enable_sni = self.name.is_some();
        config.alpn_protocols = vec![vec![b'x'; 100]; self.padding / 100];
        config
    }

    pub(crate) async fn connect(self, vm: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(vm).await?;
        self.handshake(stream).await
    }

    pub(crate) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
        self,
        stream: S,
    ) -> std::io::Result<TlsStream<S>> {
        let name = ServerName::try_from(self.name.unwrap_or(NAME)).unwrap();
        TlsConnector::from(Arc::new(self.config())).connect(name, stream).await
    }

    pub(crate) async fn connect_in_segments(self, vm: &str) -> std::io::Result<TlsStream<Segments>> {
        let stream = TcpStream::connect(vm).await?;
        stream.set_nodelay(true)?;
        let segment = self.segment;
        self.handshake(Segments { stream, segment }).await
    }
}

/// Sends small segments.
pub(crate) struct Segments {
    stream: TcpStream,
    segment: usize,
}

impl AsyncRead for Segments {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Segments {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let end = buf.len().min(self.segment);
        Pin::new(&mut self.stream).poll_write(cx, &buf[..end])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What the client gets until the connection ends; the error is how it ended, if not in good order.
pub(crate) async fn read_to_end(stream: &mut TcpStream) -> (Vec<u8>, Option<std::io::ErrorKind>) {
    let mut bytes = Vec::new();
    let end = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the connection is ended");
    (bytes, end.err().map(|error| error.kind()))
}
