//! AA and CDH: each fetch is a full attestation, through what listens at the KBS address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, SET_COOKIE};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use secure_comms_tunnel::netns::{self, Namespace};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::DEFAULT_EVIDENCE;

/// Options of the guest.
#[derive(Clone, Debug)]
pub struct CdhOptions {
    /// `http://127.0.0.1:<port>` or `https://..`, where the port is the agent's KBS inbound.
    pub kbs: String,
    /// For HTTPS: PEM of the CA to pin; no other is trusted.
    pub ca_pem: Option<String>,
    /// Evidence to attest with.
    pub evidence: String,
    /// Attempts of one fetch, each with an attestation of its own.
    pub attempts: u32,
    /// Pause between attempts: the real guest gives up on a closed port after about 4 s, so its pause is about 1.3 s;
    /// shorter here, to keep tests quick.
    pub retry: Duration,
    /// Timeout of one answer. The fetch then fails without another attempt.
    pub answer_limit: Duration,
    /// The network namespace of the VM; none: that of this process.
    pub namespace: Option<Namespace>,
    /// Keep each connection open, unused, until the other side closes it, as connection pools of HTTP clients do.
    pub pooled: bool,
}

impl CdhOptions {
    /// The defaults for a KBS at this URL.
    #[must_use]
    pub fn new(kbs: impl Into<String>) -> Self {
        Self {
            kbs: kbs.into(),
            ca_pem: None,
            evidence: DEFAULT_EVIDENCE.to_owned(),
            attempts: 4,
            retry: Duration::from_millis(50),
            answer_limit: Duration::from_secs(50),
            namespace: None,
            pooled: false,
        }
    }
}

/// AA and CDH.
pub struct Cdh {
    options: CdhOptions,
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    fetches: AtomicU64,
    under_way: AtomicU64,
    most_at_once: AtomicU64,
}

impl std::fmt::Debug for Cdh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cdh").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Why an attempt failed: decides whether there is another one.
enum Failure {
    Retry(anyhow::Error),
    Final(anyhow::Error),
}

/// One connection to the KBS.
struct Connection {
    requests: SendRequest<Full<Bytes>>,
    task: tokio::task::JoinHandle<()>,
}

impl Cdh {
    /// Checks the options, and does not connect yet.
    ///
    /// # Errors
    /// If the URL or the CA is wrong; names it.
    pub fn new(options: CdhOptions) -> Result<Self> {
        let uri: Uri = options.kbs.parse().with_context(|| format!("guest: KBS URL {:?}", options.kbs))?;
        let host = uri.host().with_context(|| format!("guest: KBS URL {uri}: no host"))?.to_owned();
        let (https, default_port) = match uri.scheme_str() {
            Some("http") => (false, 80),
            Some("https") => (true, 443),
            _ => bail!("guest: KBS URL {uri}: expected http:// or https://"),
        };
        let tls = if https { Some(connector(&options, &host)?) } else { None };
        Ok(Self {
            port: uri.port_u16().unwrap_or(default_port),
            host,
            tls,
            options,
            fetches: AtomicU64::new(0),
            under_way: AtomicU64::new(0),
            most_at_once: AtomicU64::new(0),
        })
    }

    /// Fetches `<repo>/<type>/<tag>`: attests on one connection, then gets the resource on another.
    ///
    /// # Errors
    /// After all attempts, with the cause of the last one.
    pub async fn fetch(&self, path: &str) -> Result<Bytes> {
        let _under_way = UnderWay::start(self);
        let mut tries = 0;
        loop {
            tries += 1;
            match self.fetch_once(path).await {
                Ok(bytes) => return Ok(bytes),
                Err(Failure::Retry(_)) if tries < self.options.attempts => {
                    tokio::time::sleep(self.options.retry).await;
                }
                Err(Failure::Retry(error) | Failure::Final(error)) => {
                    return Err(error.context(format!("guest: fetching {path}, try {tries}")));
                }
            }
        }
    }

    /// Fetches begun so far.
    #[must_use]
    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::Relaxed)
    }

    /// Most concurrent fetches so far: the agent must keep it at 1.
    #[must_use]
    pub fn most_at_once(&self) -> u64 {
        self.most_at_once.load(Ordering::Relaxed)
    }

    async fn fetch_once(&self, path: &str) -> Result<Bytes, Failure> {
        let token = self.attest().await?;
        let mut connection = self.connect().await?;
        let request = self.request(Method::GET, &format!("/kbs/v0/resource/{path}"));
        let request = request.header(AUTHORIZATION, format!("Bearer {token}")).body(Full::default());
        let (status, body) =
            self.send(&mut connection, request).await.map(|r| (r.status(), r.into_body()))?;
        self.finish(connection);
        if status == StatusCode::OK {
            return Ok(body);
        }
        Err(Failure::Retry(anyhow!("the KBS answered {status}: {}", String::from_utf8_lossy(&body))))
    }

    async fn attest(&self) -> Result<String, Failure> {
        let mut connection = self.connect().await?;
        let hello = json!({"version": "0.4.0", "tee": "sample", "extra-params": ""});
        let auth = self.request(Method::POST, "/kbs/v0/auth").header(CONTENT_TYPE, "application/json");
        let challenge = self.send(&mut connection, auth.body(hello.to_string().into())).await?;
        let cookie = challenge.headers().get(SET_COOKIE).and_then(|cookie| cookie.to_str().ok());
        let cookie = cookie.and_then(|cookie| cookie.split(';').next()).unwrap_or_default().to_owned();
        let nonce = json_field(&challenge, "nonce")?;

        let evidence = json!({"nonce": nonce, "evidence": self.options.evidence});
        let attest = self.request(Method::POST, "/kbs/v0/attest").header(CONTENT_TYPE, "application/json");
        let attest = attest.header(COOKIE, cookie).body(evidence.to_string().into());
        let token = json_field(&self.send(&mut connection, attest).await?, "token")?;
        self.finish(connection);
        Ok(token)
    }

    fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        Request::builder().method(method).uri(path).header(HOST, format!("{}:{}", self.host, self.port))
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let limit = self.options.answer_limit;
        let connect = async {
            let tcp = self.dial().await.context("connecting to the KBS")?;
            match &self.tls {
                None => Connection::over(tcp).await,
                Some((tls, name)) => {
                    Connection::over(tls.connect(name.clone(), tcp).await.context("TLS to the KBS")?).await
                }
            }
        };
        tokio::time::timeout(limit, connect)
            .await
            .map_err(|_| Failure::Final(anyhow!("no connection to the KBS within {limit:?}")))?
            .map_err(Failure::Retry)
    }

    async fn dial(&self) -> Result<TcpStream> {
        let host = self.host.as_str();
        let Some(namespace) = &self.options.namespace else {
            return Ok(TcpStream::connect((host, self.port)).await?);
        };
        let address = host.parse().with_context(|| format!("in a namespace, {host} must be an address"))?;
        Ok(netns::connect(Some(namespace), SocketAddr::new(address, self.port)).await?)
    }

    async fn send(
        &self,
        connection: &mut Connection,
        request: hyper::http::Result<Request<Full<Bytes>>>,
    ) -> Result<Response<Bytes>, Failure> {
        let request = request.map_err(|error| Failure::Final(error.into()))?;
        let limit = self.options.answer_limit;
        let answer = async {
            let (head, body) = connection.requests.send_request(request).await?.into_parts();
            Ok::<_, hyper::Error>(Response::from_parts(head, body.collect().await?.to_bytes()))
        };
        tokio::time::timeout(limit, answer)
            .await
            .map_err(|_| Failure::Final(anyhow!("no answer from the KBS within {limit:?}")))?
            .map_err(|error| Failure::Retry(anyhow!(error).context("asking the KBS")))
    }

    /// Closes the connection, or leaves that to the other side.
    fn finish(&self, connection: Connection) {
        if self.options.pooled {
            tokio::spawn(async move {
                let Connection { requests, task } = connection;
                // The task ends, with or without an error.
                let _ = task.await;
                drop(requests);
            });
        }
    }
}

impl Connection {
    async fn over<S>(stream: S) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("HTTP to the KBS")?;
        let task = tokio::spawn(async move {
            // The request reports the error.
            let _ = connection.await;
        });
        Ok(Self { requests, task })
    }
}

/// Counts a fetch as long as it runs.
struct UnderWay<'a>(&'a Cdh);

impl<'a> UnderWay<'a> {
    fn start(cdh: &'a Cdh) -> Self {
        cdh.fetches.fetch_add(1, Ordering::Relaxed);
        let now = cdh.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        cdh.most_at_once.fetch_max(now, Ordering::Relaxed);
        Self(cdh)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

fn json_field(answer: &Response<Bytes>, name: &str) -> Result<String, Failure> {
    let body: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    let field = body.get(name).and_then(Value::as_str).map(str::to_owned);
    field.filter(|_| answer.status() == StatusCode::OK).ok_or_else(|| {
        let text = String::from_utf8_lossy(answer.body());
        Failure::Retry(anyhow!("attestation: the KBS answered {}: {text}", answer.status()))
    })
}

fn connector(options: &CdhOptions, host: &str) -> Result<(TlsConnector, ServerName<'static>)> {
    let pem = options.ca_pem.as_deref().context("guest: an https KBS URL needs a CA to pin")?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.context("guest: CA file: not PEM")?).context("guest: CA file: not a CA")?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("guest: TLS versions")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).with_context(|| format!("guest: KBS host {host:?}"))?;
    Ok((TlsConnector::from(Arc::new(config)), name))
}
