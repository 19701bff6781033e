//! The forwarder in a VM without Secure Comms, as far as a TLS connection with CAA goes: it ends TLS with the keys of
//! `apf.json`, and lets only CAA in.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use secure_comms_simulators::accept::Serving;
use serde_json::Value;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// A running forwarder; stops when dropped.
#[derive(Debug)]
pub struct Forwarder {
    holds: watch::Sender<bool>,
    serving: Serving,
}

impl Forwarder {
    /// Serves `kata` at this address, with the keys of an `apf.json`, and TLS of these versions.
    ///
    /// # Errors
    /// If the keys or the port can't be used.
    pub async fn start(
        address: SocketAddr,
        apf_json: &Value,
        kata: &Path,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Result<Self> {
        let listener = TcpListener::bind(address).await.context("forwarder: binding")?;
        let (config, client) = config(apf_json, versions)?;
        let (acceptor, kata) = (TlsAcceptor::from(Arc::new(config)), kata.to_owned());
        let holds = watch::Sender::new(false);
        let held = holds.clone();
        let serving = Serving::start(listener, move |stream| {
            let (acceptor, kata, client) = (acceptor.clone(), kata.clone(), client.clone());
            let mut held = held.subscribe();
            async move {
                // The sender lives as long as the connections.
                let _ = held.wait_for(|held| !held).await;
                // The client sees the connection end.
                let _ = serve(&acceptor, stream, &client, kata).await;
            }
        });
        Ok(Self { holds, serving })
    }

    /// Resets its connections, and returns once its port is free.
    pub async fn stop(self) {
        self.serving.stop().await;
    }

    /// Holds handshakes from the next connection on, or finishes those that are held.
    pub fn hold(&self, hold: bool) {
        self.holds.send_replace(hold);
    }
}

async fn serve(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    client: &CertificateDer<'static>,
    kata: PathBuf,
) -> Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let presented = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    ensure!(presented == Some(client), "forwarder: another client");
    let mut kata = UnixStream::connect(kata).await?;
    copy_bidirectional(&mut stream, &mut kata).await?;
    Ok(())
}

fn config(
    apf_json: &Value,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<(ServerConfig, CertificateDer<'static>)> {
    let pem = |name: &str| {
        let text = apf_json.get(name).and_then(Value::as_str);
        text.map(str::as_bytes).with_context(|| format!("forwarder: no {name}"))
    };
    let key = PrivateKeyDer::from_pem_slice(pem("tls-server-key")?).context("forwarder: tls-server-key")?;
    let certificate =
        CertificateDer::from_pem_slice(pem("tls-server-cert")?).context("forwarder: tls-server-cert")?;
    let client = CertificateDer::from_pem_slice(pem("tls-client-ca")?).context("forwarder: tls-client-ca")?;
    let mut roots = RootCertStore::empty();
    roots.add(client.clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)?;
    Ok((config, client))
}
