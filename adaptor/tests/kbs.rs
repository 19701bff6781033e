//! The KBS client against a simulated KBS that responds as Trustee does, and as it should not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use base64ct::{Base64UrlUnpadded, Encoding};
use ed25519_dalek::pkcs8::EncodePrivateKey;
use ed25519_dalek::{Signature, SigningKey, Verifier, VerifyingKey};
use secure_comms_adaptor::kbs::{AdminSettings, KbsClient, KbsError, KbsSettings, RESOURCE_MAX};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const PATH: &str = "default/pp-p1/privateKey";

/// The requests that the server received, and its next responses. Without a script it responds as Trustee does.
#[derive(Default)]
struct Seen {
    requests: Vec<(Method, String, Vec<u8>)>,
    script: Vec<(StatusCode, &'static str)>,
    admin: Option<VerifyingKey>,
}

type Kbs = Arc<Mutex<Seen>>;

fn verify(admin: &VerifyingKey, headers: &HeaderMap) -> Option<()> {
    let token = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
    let (signed, signature) = token.rsplit_once('.')?;
    let (head, claims) = signed.split_once('.')?;
    let decode = |part| Base64UrlUnpadded::decode_vec(part).ok();
    admin.verify(signed.as_bytes(), &Signature::from_slice(&decode(signature)?).ok()?).ok()?;
    assert_eq!(decode(head)?, br#"{"alg":"EdDSA","typ":"JWT"}"#);
    let claims: serde_json::Value = serde_json::from_slice(&decode(claims)?).ok()?;
    let now = std::time::UNIX_EPOCH.elapsed().ok()?.as_secs();
    let good = claims["iss"] == "me" && claims["role"] == "admin" && claims.get("aud").is_none();
    (good && claims["iat"].as_u64()? <= now && claims["exp"].as_u64()? > now).then_some(())
}

fn refusal(variant: &str) -> String {
    format!(
        r#"{{"type":"https://github.com/confidential-containers/kbs/errors/{variant}","detail":"no\nway"}}"#
    )
}

async fn answer(
    State(kbs): State<Kbs>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut kbs = kbs.lock().unwrap();
    kbs.requests.push((method.clone(), uri.to_string(), body.to_vec()));
    if kbs.admin.is_some_and(|admin| verify(&admin, &headers).is_none()) {
        return (StatusCode::UNAUTHORIZED, refusal("AdminAuthInitialization")).into_response();
    }
    if kbs.script.is_empty() {
        return StatusCode::OK.into_response();
    }
    let (status, body) = kbs.script.remove(0);
    let body = body.strip_prefix('!').map_or_else(|| body.to_owned(), refusal);
    (status, [(header::LOCATION, "http://127.0.0.1:1/")], body).into_response()
}

async fn serve(script: &[(StatusCode, &'static str)]) -> (Kbs, SocketAddr) {
    let kbs = Kbs::default();
    kbs.lock().unwrap().script = script.to_vec();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().fallback(answer).with_state(kbs.clone());
    let app = app.layer(axum::extract::DefaultBodyLimit::max(3 << 20));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (kbs, address)
}

fn settings(url: &str) -> KbsSettings {
    KbsSettings { url: url.parse().unwrap(), ca: None, admin: None }
}

fn client(url: &str) -> KbsClient {
    KbsClient::new(&settings(url), Duration::from_secs(10)).unwrap()
}

fn admin_key(dir: &Path, seed: u8) -> (SigningKey, AdminSettings) {
    let key = SigningKey::from_bytes(&[seed; 32]);
    let key_file = dir.join("admin.pem");
    std::fs::write(&key_file, key.to_pkcs8_pem(Default::default()).unwrap()).unwrap();
    (key, AdminSettings { key_file, issuer: "me".into(), role: "admin".into() })
}

#[tokio::test]
async fn a_resource_is_published_raw_with_an_admin_token() {
    let dir = tempfile::tempdir().unwrap();
    let (key, admin) = admin_key(dir.path(), 1);
    let (kbs, address) = serve(&[]).await;
    kbs.lock().unwrap().admin = Some(key.verifying_key());
    let settings = KbsSettings { admin: Some(admin), ..settings(&format!("http://{address}")) };
    let client = KbsClient::new(&settings, Duration::from_secs(10)).unwrap();
    client.publish(PATH, b"\x00secret\xff").await.unwrap();
    client.delete(PATH).await.unwrap();
    let target = format!("/kbs/v0/resource/{PATH}");
    let expected =
        [(Method::POST, target.clone(), b"\x00secret\xff".to_vec()), (Method::DELETE, target, vec![])];
    assert_eq!(kbs.lock().unwrap().requests, expected);
    assert!(!format!("{client:?}").contains("secret"));
}

#[tokio::test]
async fn a_wrong_admin_key_is_refused_at_once_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let (_, admin) = admin_key(dir.path(), 2);
    let (kbs, address) = serve(&[]).await;
    kbs.lock().unwrap().admin = Some(SigningKey::from_bytes(&[1; 32]).verifying_key());
    let settings = KbsSettings { admin: Some(admin), ..settings(&format!("http://{address}")) };
    let client = KbsClient::new(&settings, Duration::from_secs(10)).unwrap();
    let error = client.publish(PATH, b"secret").await.unwrap_err().to_string();
    assert_eq!(
        error,
        "KBS resource default/pp-p1/privateKey: POST refused with 401 AdminAuthInitialization no\\nway; the KBS \
         rejects the admin token: check that --kbs-admin-key is the private half of a key it trusts, that --kbs-admin-issuer \
         and --kbs-admin-role are what it expects, and both clocks"
    );
    assert_eq!(kbs.lock().unwrap().requests.len(), 1);
}

#[tokio::test]
async fn a_refusal_has_its_status_and_advice() {
    let cases = [
        (StatusCode::PAYLOAD_TOO_LARGE, "", "413; the resource is larger than the KBS accepts"),
        (StatusCode::NOT_FOUND, "<html>", "404 <html>; check that --kbs-url is a Trustee KBS"),
        (StatusCode::FOUND, "", "302; redirects are not followed: give its final address with --kbs-url"),
        (
            StatusCode::UNAUTHORIZED,
            "!PolicyDeny",
            "401 PolicyDeny no\\nway; the KBS's policy forbids it: check its policy for admins",
        ),
        (StatusCode::BAD_REQUEST, "{\"type\":7}", "400 {\\\"type\\\":7}"),
    ];
    for (status, body, expected) in cases {
        let (_, address) = serve(&[(status, body)]).await;
        let error = client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap_err().to_string();
        assert_eq!(error, format!("KBS resource {PATH}: POST refused with {expected}"));
    }
}

#[tokio::test]
async fn deleting_a_missing_resource_succeeds() {
    let (kbs, address) = serve(&[(StatusCode::UNAUTHORIZED, "!PluginInternalError")]).await;
    client(&format!("http://{address}")).delete(PATH).await.unwrap();
    assert_eq!(kbs.lock().unwrap().requests.len(), 1);
}

#[tokio::test]
async fn a_kbs_that_cannot_delete_has_the_resource_emptied() {
    let (kbs, address) = serve(&[(StatusCode::METHOD_NOT_ALLOWED, "")]).await;
    client(&format!("http://{address}")).delete(PATH).await.unwrap();
    let requests = kbs.lock().unwrap().requests.clone();
    assert_eq!(requests.iter().map(|(method, ..)| method.as_str()).collect::<Vec<_>>(), ["DELETE", "POST"]);
    assert!(requests[1].2.is_empty());
}

#[tokio::test]
async fn a_kbs_that_fails_for_a_while_is_retried() {
    let (kbs, address) =
        serve(&[(StatusCode::SERVICE_UNAVAILABLE, ""), (StatusCode::REQUEST_TIMEOUT, "")]).await;
    client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap();
    assert_eq!(kbs.lock().unwrap().requests.len(), 3);
}

#[tokio::test]
async fn an_unreachable_kbs_fails_at_the_deadline() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let start = Instant::now();
    let client = KbsClient::new(&settings(&url), Duration::from_millis(700)).unwrap();
    let error = client.publish(PATH, b"x").await.unwrap_err();
    assert!(matches!(error, KbsError::Unreachable { tries: 2.., .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("KBS at {url}: gave up after ")) && text.contains("Connection refused"),
        "{text}"
    );
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_silent_kbs_fails_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let client = KbsClient::new(&settings(&url), Duration::from_millis(600)).unwrap();
    let start = Instant::now();
    let text = client.publish(PATH, b"x").await.unwrap_err().to_string();
    assert!(text.contains("no answer in time"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_response_without_end_is_truncated() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let _ = socket.read(&mut [0; 4096]).await;
        let _ = socket.write_all(b"HTTP/1.1 400 Bad\r\n\r\n").await;
        while socket.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    let text = client(&url).publish(PATH, b"x").await.unwrap_err().to_string();
    assert!(text.len() < 400 && text.contains("400 xxx"), "{text}");
}

#[tokio::test]
async fn a_resource_too_large_for_the_kbs_is_not_sent() {
    let (kbs, address) = serve(&[]).await;
    let client = client(&format!("http://{address}"));
    let error = client.publish(PATH, &vec![0; RESOURCE_MAX + 1]).await.unwrap_err().to_string();
    assert_eq!(error, format!("KBS resource {PATH}: 2097153 bytes; at most 2097152 can be published"));
    assert!(kbs.lock().unwrap().requests.is_empty());
    client.publish(PATH, &vec![0; RESOURCE_MAX]).await.unwrap();
}

/// An HTTPS server for 127.0.0.1 that answers every request with 200, and its certificate.
async fn serve_tls() -> (String, String) {
    use tokio_rustls::rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer};
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(socket).await else { continue };
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            let _ = stream.shutdown().await;
        }
    });
    (url, made.cert.pem())
}

#[tokio::test]
async fn an_https_kbs_is_trusted_through_the_given_ca_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (url, certificate) = serve_tls().await;
    let with_ca = |pem: &str| {
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, pem).unwrap();
        KbsClient::new(&KbsSettings { ca: Some(ca), ..settings(&url) }, Duration::from_secs(10))
    };
    with_ca(&certificate).unwrap().publish(PATH, b"x").await.unwrap();
    let (_, stranger) = serve_tls().await;
    let start = Instant::now();
    for client in [with_ca(&stranger).unwrap(), client(&url)] {
        let error = client.publish(PATH, b"x").await.unwrap_err();
        assert!(matches!(error, KbsError::Certificate { .. }), "{error:?}");
        assert!(error.to_string().contains("give the CA that signed it with --kbs-ca"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(5), "a bad certificate was tried again");
    let error = with_ca("no certificate").unwrap_err().to_string();
    let ca = dir.path().join("ca.pem");
    assert_eq!(
        error,
        format!(
            "KBS client: the CA {} (--kbs-ca): no certificate in it; name a PEM file with the CA's certificate",
            ca.display()
        )
    );
}
