//! The KBS, in the steps of a request: its name, TCP, TLS, HTTP, our clock, and the admin's token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::StatusCode;
use hyper::client::conn::http1;
use hyper::header::{DATE, HOST};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use secure_comms_adaptor::kbs::{KbsClient, KbsError, KbsSettings, tls_config};
use secure_comms_adaptor::with_causes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use url::{Host, Url};

use super::clock;
use super::report::Finding;

/// Time limit of each step. A KBS that needs longer delays every start of a pod.
const STEP: Duration = Duration::from_secs(5);
/// A resource that no pod reads. It is written and deleted.
pub const PROBE: &str = "default/secure-comms-doctor/probe";
/// Its content.
const PROBE_CONTENT: &[u8] = b"written by secure-comms-adaptor doctor, and deleted\n";

/// Takes the steps until one fails.
pub(super) async fn check(settings: &KbsSettings) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(finding) = reach(settings, &mut findings).await {
        findings.push(finding);
        return findings;
    }
    findings.push(token(settings).await);
    findings
}

/// As far as an answer of the KBS.
async fn reach(settings: &KbsSettings, findings: &mut Vec<Finding>) -> Result<(), Finding> {
    let addresses = resolve(&settings.url).await?;
    findings.push(Finding::ok(
        "kbs-name",
        format!("{} has an address: {}", host(&settings.url), list(&addresses)),
    ));
    let (stream, address) = connect(&addresses).await?;
    findings.push(Finding::ok("kbs-tcp", format!("{address} accepts connections")));
    let answer = if settings.url.scheme() == "https" {
        let stream = handshake(settings, stream).await?;
        findings.push(Finding::ok("kbs-tls", "its certificate is trusted"));
        ask(&settings.url, stream).await?
    } else {
        findings.push(Finding::warning(
            "kbs-tls",
            "it is reached by HTTPS",
            "it is plain HTTP: who is on the path reads the pods' keys",
            "let the KBS serve HTTPS, and give its https:// URL and CA",
        ));
        ask(&settings.url, stream).await?
    };
    findings.push(answer.healthy);
    findings.push(clock::skew(answer.date.as_deref(), SystemTime::now()));
    Ok(())
}

fn host(url: &Url) -> String {
    format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
}

fn list(addresses: &[SocketAddr]) -> String {
    let texts: Vec<_> = addresses.iter().take(4).map(|address| address.ip().to_string()).collect();
    texts.join(", ") + if addresses.len() > 4 { ", ..." } else { "" }
}

async fn resolve(url: &Url) -> Result<Vec<SocketAddr>, Finding> {
    let title = format!("{} has an address", host(url));
    let fault = |found: String| {
        let fix = "check the KBS's name, and the node's DNS: names of services of the cluster need its DNS \
                   (dnsPolicy: ClusterFirstWithHostNet)";
        Finding::fault("kbs-name", title.clone(), found, fix)
    };
    match timeout(STEP, lookup_host(host(url))).await {
        Ok(Ok(addresses)) => Some(addresses.collect::<Vec<_>>())
            .filter(|all| !all.is_empty())
            .ok_or_else(|| fault("its name has no address".to_owned())),
        Ok(Err(error)) => Err(fault(error.to_string())),
        Err(_) => Err(fault(format!("no answer of the DNS within {} s", STEP.as_secs()))),
    }
}

async fn connect(addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), Finding> {
    let mut errors = Vec::new();
    for address in addresses {
        match timeout(STEP, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((stream, *address)),
            Ok(Err(error)) => errors.push(format!("{address}: {error}")),
            Err(_) => errors.push(format!("{address}: no answer within {} s", STEP.as_secs())),
        }
    }
    let fix =
        "check that the KBS runs, its port, and that network policies and firewalls let this node reach it";
    Err(Finding::fault("kbs-tcp", "it accepts connections", errors.join("; "), fix))
}

async fn handshake(
    settings: &KbsSettings,
    stream: TcpStream,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Finding> {
    const FIX: &str = "give the CA that signed the KBS's certificate, or that certificate, as PEM; the certificate must \
                       name the host of the KBS's URL";
    let fault = |found: String| Finding::fault("kbs-tls", "its certificate is trusted", found, FIX);
    let config = tls_config(settings).map_err(|error| fault(with_causes(&error)))?;
    let name = match settings.url.host() {
        Some(Host::Domain(name)) => {
            ServerName::try_from(name.to_owned()).map_err(|error| fault(error.to_string()))?
        }
        Some(Host::Ipv4(ip)) => ServerName::from(std::net::IpAddr::from(ip)),
        Some(Host::Ipv6(ip)) => ServerName::from(std::net::IpAddr::from(ip)),
        None => return Err(fault("its URL has no host".to_owned())),
    };
    match timeout(STEP, TlsConnector::from(Arc::new(config)).connect(name, stream)).await {
        Ok(stream) => stream.map_err(|error| fault(error.to_string())),
        Err(_) => {
            Err(fault(format!("no TLS within {} s: it may serve plain HTTP at this port", STEP.as_secs())))
        }
    }
}

struct Answer {
    healthy: Finding,
    date: Option<String>,
}

/// Asks for /healthz. A release without it answers 404, which shows that it serves.
async fn ask(
    url: &Url,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Answer, Finding> {
    const TITLE: &str = "it answers GET /healthz";
    let fault = |found: String| {
        Finding::fault("kbs-healthy", TITLE, found, "look at the KBS's log; check that the URL is the KBS's")
    };
    let request = hyper::Request::get("/healthz").header(HOST, host(url)).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| fault(error.to_string()))?;
    let exchange = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let answer = sender.send_request(request);
        tokio::pin!(answer, connection);
        // The connection is what sends and receives; it may end with the answer.
        tokio::select! {
            answer = &mut answer => answer,
            ended = &mut connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(error),
            },
        }
    };
    match timeout(STEP, exchange).await {
        Ok(Ok(answer)) => {
            let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
            Ok(Answer { healthy: healthy(answer.status()), date })
        }
        Ok(Err(error)) => Err(fault(with_causes(&error))),
        Err(_) => Err(fault(format!("no answer within {} s", STEP.as_secs()))),
    }
}

fn healthy(status: StatusCode) -> Finding {
    const CHECK: &str = "kbs-healthy";
    if status.is_success() {
        return Finding::ok(CHECK, "it answers GET /healthz");
    }
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED | StatusCode::METHOD_NOT_ALLOWED) {
        return Finding::ok(CHECK, format!("it answers HTTP ({status} for /healthz, as older releases do)"));
    }
    Finding::fault(CHECK, "it answers GET /healthz", format!("{status}"), "look at the KBS's log")
}

/// Publishes a resource that no pod reads, and deletes it: that the admin's key is the right one shows only so.
async fn token(settings: &KbsSettings) -> Finding {
    const CHECK: &str = "kbs-token";
    let title = if settings.admin.is_some() {
        "our admin token may write and delete resources"
    } else {
        "it lets us write and delete resources without an admin token"
    };
    let fault = |error: &KbsError| {
        let fix = "give the private key of an admin whose public key the KBS has (--kbs-admin-key; kbs.key of Trustee's \
                   secret), and the issuer and role that the KBS expects";
        Finding::fault(CHECK, title, with_causes(error), fix)
    };
    let written = async {
        let client = KbsClient::new(settings, STEP)?;
        client.publish(PROBE, PROBE_CONTENT).await?;
        client.delete(PROBE).await
    };
    match (written.await, &settings.admin) {
        (Err(error), _) => fault(&error),
        (Ok(()), Some(_)) => Finding::ok(CHECK, title),
        (Ok(()), None) => Finding::warning(
            CHECK,
            title,
            "so does everyone who can reach it: they can replace the pods' keys",
            "let the KBS ask for an admin token, and give its key",
        ),
    }
}

#[cfg(test)]
mod tests;
