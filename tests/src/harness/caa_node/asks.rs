//! Asks `serve`: its API and its metrics.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use secure_comms_tunnel::netns::{self, Namespace};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{CaaNode, METRICS};
use crate::harness::scene::PATIENCE;

impl CaaNode {
    /// Asks the API; returns status and body.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn api(&self, method: &str, path: &str) -> Result<(u16, Value)> {
        let stream =
            UnixStream::connect(self.path("run/adaptor.sock")).await.context("connecting to the API")?;
        let (status, body) = http(stream, method, path).await?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
        Ok((status, body))
    }

    /// The pods that the API lists.
    ///
    /// # Errors
    /// If it lists none because it fails.
    pub async fn pods(&self) -> Result<Vec<Value>> {
        let (status, body) = self.api("GET", "/v1/pods").await?;
        ensure!(status == 200, "GET /v1/pods: {status} {body}");
        let pods = body.get("items").and_then(Value::as_array).cloned();
        pods.with_context(|| format!("GET /v1/pods: no list in {body}"))
    }

    /// The metrics.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn metrics(&self) -> Result<String> {
        let stream = netns::connect(Some(&Namespace::new(self.namespace.name())), METRICS.parse()?).await?;
        let (status, body) = http(stream, "GET", "/metrics").await?;
        ensure!(status == 200, "metrics: status {status}");
        Ok(String::from_utf8(body.into())?)
    }

    /// The sum of all metrics of this name whose labels contain `labels`.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let text = self.metrics().await?;
        let values = text.lines().filter_map(|line| {
            let (metric, value) = line.rsplit_once(' ')?;
            let is = metric.split('{').next() == Some(name) && metric.contains(labels);
            is.then(|| value.parse::<f64>().ok()).flatten()
        });
        Ok(values.sum())
    }
}

async fn http<S>(stream: S, method: &str, path: &str) -> Result<(u16, Bytes)>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let exchange = async {
        let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let answer = requests.send_request(request.body(Full::<Bytes>::default())?).await?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await?.to_bytes();
        connection.abort();
        anyhow::Ok((status, body))
    };
    timeout(PATIENCE, exchange).await.with_context(|| format!("{method} {path} hangs"))?
}
