//! A plain HTTP client for the tests of the simulators.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{HOST, SET_COOKIE};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use secure_comms_tests::simulators::kbs::{DEFAULT_EVIDENCE, Kbs};
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// A complete answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as JSON, or null.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The variant in Trustee's error shape.
    pub(crate) fn variant(&self) -> String {
        let json = self.json();
        assert!(json["detail"].is_string(), "no detail in {json}");
        let prefix = "https://github.com/confidential-containers/kbs/errors/";
        json["type"].as_str().unwrap().strip_prefix(prefix).unwrap().to_owned()
    }

    /// The cookie to send back.
    pub(crate) fn cookie(&self) -> String {
        self.headers[SET_COOKIE].to_str().unwrap().split(';').next().unwrap().to_owned()
    }
}

/// One request on a connection of its own.
pub(crate) async fn call(
    addr: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer> {
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (mut requests, connection) = hyper::client::conn::http1::handshake(stream).await?;
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header(HOST, addr.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (head, body) =
        requests.send_request(request.body(Full::new(Bytes::copy_from_slice(body)))?).await?.into_parts();
    Ok(Answer { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
}

/// Attests; returns the cookie and the token.
pub(crate) async fn attest(kbs: &Kbs) -> (String, String) {
    let auth = call(kbs.addr(), Method::POST, "/kbs/v0/auth", &[], b"{}").await.unwrap();
    let (cookie, nonce) = (auth.cookie(), auth.json()["nonce"].clone());
    let body = json!({"nonce": nonce, "evidence": DEFAULT_EVIDENCE}).to_string();
    let headers = [("cookie", cookie.as_str())];
    let attest = call(kbs.addr(), Method::POST, "/kbs/v0/attest", &headers, body.as_bytes()).await.unwrap();
    (cookie, attest.json()["token"].as_str().unwrap().to_owned())
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
