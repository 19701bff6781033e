//! What the service has counted, as its `/metrics` has it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Time limit for reading the counters.
const LIMIT: Duration = Duration::from_secs(3);
/// Most bytes that are read.
const SIZE_MAX: usize = 4 << 20;

/// The dials that the service has refused, by reason.
pub(super) type Refused = BTreeMap<String, u64>;

/// Reads the service's counters.
///
/// # Errors
/// In one line: they cannot be read.
pub(super) async fn refused_dials(listen: SocketAddr) -> Result<Refused, String> {
    let text =
        timeout(LIMIT, get(listen)).await.map_err(|_| format!("no answer of http://{listen}/metrics"))??;
    Ok(parse(&text))
}

async fn get(listen: SocketAddr) -> Result<String, String> {
    let failed = |error: &dyn std::fmt::Display| format!("http://{listen}/metrics: {error}");
    let stream = TcpStream::connect(listen).await.map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    let request =
        hyper::Request::get("/metrics").header(HOST, listen.to_string()).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| failed(&error))?;
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let body = Limited::new(answer.into_body(), SIZE_MAX).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| failed(&error))
    };
    let drive = async {
        // Its end is seen by the request, too.
        drop(connection.await);
        std::future::pending::<()>().await;
    };
    let body = tokio::select! {
        body = answer => body?,
        () = drive => Bytes::new(),
    };
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// Lines as `secure_comms_refused_dials_total{reason="not_tls"} 3`.
fn parse(text: &str) -> Refused {
    let line = |line: &str| {
        let rest = line.strip_prefix("secure_comms_refused_dials_total{")?;
        let (labels, value) = rest.rsplit_once("} ")?;
        let (_, reason) = labels.split_once("reason=\"")?;
        let (reason, _) = reason.split_once('"')?;
        Some((reason.to_owned(), value.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_dials_are_read_as_the_service_writes_them() {
        let metrics = crate::metrics::Metrics::default();
        metrics.dial_refused("not_tls");
        metrics.dial_refused("not_tls");
        metrics.dial_refused("unknown_pod");
        let refused = parse(&metrics.counters(crate::metrics::Form::Prometheus).unwrap());
        assert_eq!(refused, Refused::from([("not_tls".to_owned(), 2), ("unknown_pod".to_owned(), 1)]));
        assert!(parse("secure_comms_refused_dials_total{x} y\n{").is_empty());
    }

    #[tokio::test]
    async fn counters_that_cannot_be_read_say_why() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = closed.local_addr().unwrap();
        drop(closed);
        assert!(refused_dials(listen).await.unwrap_err().contains("refused"));
    }
}
