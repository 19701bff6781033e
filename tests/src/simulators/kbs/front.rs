//! HTTPS in front of a KBS that speaks plain HTTP, as a reverse proxy in its cluster has it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use secure_comms_simulators::accept::Serving;
use secure_comms_simulators::http;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::tls::ServerIdentity;
use super::{Kbs, bind};

/// The listener; closed when dropped. The faults of the KBS apply to its requests, not to its connections.
#[derive(Debug)]
pub struct HttpsFront {
    ca_pem: String,
    _serving: Serving,
}

impl HttpsFront {
    /// PEM of the CA to pin.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}

impl Kbs {
    /// Serves HTTPS as well, on this port of 127.0.0.1, with a certificate for `name`.
    ///
    /// # Errors
    /// If the certificate can't be made, or the port can't be bound.
    pub async fn https_front(&self, name: &str, port: u16) -> Result<HttpsFront> {
        let identity = ServerIdentity::generate(&[name])?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let socket = bind(listen, self.shared.options.namespace.as_ref()).await?;
        let listener = socket.listen(128).context("KBS: listening")?;
        let acceptor = TlsAcceptor::from(identity.config());
        let shared = Arc::clone(&self.shared);
        let serving = Serving::start(listener, move |stream| {
            let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
            async move {
                let limit = shared.options.head_limit;
                // After a failed or slow handshake the connection is closed, and the client reports why.
                if let Ok(Ok(stream)) = timeout(limit, acceptor.accept(stream)).await {
                    http::serve(stream, limit, |request| Arc::clone(&shared).handle(request)).await;
                }
            }
        });
        Ok(HttpsFront { ca_pem: identity.ca_pem().to_owned(), _serving: serving })
    }
}
