//! The KBS client against a simulated KBS that responds as Trustee does, and as it should not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::io::{BufRead as _, BufReader, Read as _};
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
use tokio::task::JoinSet;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

const PATH: &str = "default/pp-p1/privateKey";
/// The time limit of a client that gets no success: enough for several attempts, also on a machine under load.
const SHORT: Duration = Duration::from_secs(3);

/// The requests that the server received, and its next responses. Without a script it responds as Trustee does.
#[derive(Default)]
struct Seen {
    requests: Vec<(Method, String, Vec<u8>)>,
    script: Vec<(StatusCode, &'static str)>,
    admin: Option<VerifyingKey>,
    /// Status and `Retry-After` of the next response.
    busy: Option<(u16, String)>,
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

/// Trustee's error: its name, and after a colon its detail.
fn refusal(text: &str) -> String {
    let (variant, detail) = text.split_once(':').unwrap_or((text, "no\\nway"));
    format!(
        r#"{{"type":"https://github.com/confidential-containers/kbs/errors/{variant}","detail":"{detail}"}}"#
    )
}

fn methods(kbs: &Kbs) -> Vec<String> {
    kbs.lock().unwrap().requests.iter().map(|(method, ..)| method.to_string()).collect()
}

/// A server that gives this answer to every connection, and its URL.
async fn answer_raw(answer: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = socket.read(&mut [0; 4096]).await;
            let _ = socket.write_all(answer.as_bytes()).await;
            let _ = socket.shutdown().await;
        }
    });
    url
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
    if let Some((status, wait)) = kbs.busy.take() {
        return (StatusCode::from_u16(status).unwrap(), [(header::RETRY_AFTER, wait)]).into_response();
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
         and --kbs-admin-role are what it expects, that it asks for no audience"
    );
    assert_eq!(kbs.lock().unwrap().requests.len(), 1);
}

#[tokio::test]
async fn a_refusal_has_its_status_and_advice() {
    let cases = [
        (
            StatusCode::PAYLOAD_TOO_LARGE,
            "",
            "413; the resource is larger than the KBS, or a proxy in front of it, accepts",
        ),
        (StatusCode::NOT_FOUND, "<html>", "404 (a web page); check that --kbs-url is a Trustee KBS"),
        (StatusCode::FOUND, "", "302; redirects are not followed: give its final address with --kbs-url"),
        (
            StatusCode::UNAUTHORIZED,
            "!PolicyDeny",
            "401 PolicyDeny no\\nway; the KBS's policy forbids it: check its policy for admins",
        ),
        (StatusCode::BAD_REQUEST, "{\"type\":7}", "400 {\"type\":7}"),
    ];
    for (status, body, expected) in cases {
        let (_, address) = serve(&[(status, body)]).await;
        let error = client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap_err().to_string();
        assert_eq!(error, format!("KBS resource {PATH}: POST refused with {expected}"));
    }
}

#[tokio::test]
async fn deleting_a_missing_resource_succeeds() {
    let (kbs, address) =
        serve(&[(StatusCode::UNAUTHORIZED, "!PluginInternalError:resource not found: x")]).await;
    client(&format!("http://{address}")).delete(PATH).await.unwrap();
    assert_eq!(methods(&kbs), ["DELETE"]);
}

/// Trustee answers the same to a missing resource and to a storage that fails.
#[tokio::test]
async fn a_delete_that_fails_counts_once_the_resource_is_emptied() {
    let failed = (StatusCode::UNAUTHORIZED, "!PluginInternalError:Plugin internal error");
    for (script, expected) in [
        (vec![failed], vec!["DELETE", "POST", "DELETE"]),
        // It stores again after a while, and never deletes.
        (vec![failed, failed, (StatusCode::OK, ""), failed], vec!["DELETE", "POST", "POST", "DELETE"]),
        (
            vec![failed, (StatusCode::OK, ""), (StatusCode::METHOD_NOT_ALLOWED, "")],
            vec!["DELETE", "POST", "DELETE"],
        ),
    ] {
        let (kbs, address) = serve(&script).await;
        client(&format!("http://{address}")).delete(PATH).await.unwrap();
        assert_eq!(methods(&kbs), expected);
        let requests = kbs.lock().unwrap().requests.clone();
        assert!(requests.iter().all(|(.., body)| body.is_empty()), "the resource must be emptied");
    }
}

#[tokio::test]
async fn a_delete_is_an_error_while_the_storage_fails() {
    let details = [
        "!PluginInternalError:Plugin internal error",
        "!PluginInternalError:failed to delete key `x`: Read-only file system (os error 30)",
        "!PluginInternalError:No space left on device (os error 28)",
        "!PluginInternalError:",
    ];
    let mut deletions = JoinSet::new();
    for detail in details {
        deletions.spawn(async move {
            let (kbs, address) = serve(&[(StatusCode::UNAUTHORIZED, detail); 50]).await;
            let client = KbsClient::new(&settings(&format!("http://{address}")), SHORT).unwrap();
            let error = client.delete(PATH).await.unwrap_err().to_string();
            assert!(error.contains("the KBS cannot use its storage: read the KBS's log"), "{error}");
            assert!(methods(&kbs).len() >= 3, "{:?}", methods(&kbs));
        });
    }
    deletions.join_all().await;
}

#[tokio::test]
async fn a_kbs_that_cannot_store_is_retried_with_advice() {
    let failed = (StatusCode::UNAUTHORIZED, "!PluginInternalError:Plugin internal error");
    let (kbs, address) = serve(&[failed, failed]).await;
    client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap();
    assert_eq!(methods(&kbs), ["POST"; 3]);
    let (_, address) = serve(&[failed; 50]).await;
    let url = format!("http://{address}");
    let client = KbsClient::new(&settings(&url), SHORT).unwrap();
    let error = client.publish(PATH, b"x").await.unwrap_err();
    assert!(matches!(error, KbsError::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("401 PluginInternalError Plugin internal error; the KBS cannot use its storage"),
        "{text}"
    );
    assert!(!text.contains("--kbs-admin-key"), "{text}");
}

#[tokio::test]
async fn a_kbs_that_wants_a_token_and_got_none_asks_for_the_key() {
    let cases = [
        "!AdminAuthInitialization:Admin auth error: Failed to parse HTTP Auth Bearer header",
        "!AdminAuth:Admin auth error: Failed to parse HTTP Auth Bearer header",
        "!AdminAuthAccess:admin access denied for endpoint /kbs/v0/resource/x",
        "",
        "<html><title>401 Authorization Required</title></html>",
    ];
    for body in cases {
        let (_, address) = serve(&[(StatusCode::UNAUTHORIZED, body)]).await;
        let error = client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap_err().to_string();
        let advice = "; the KBS wants an admin token and none was sent: give --kbs-admin-key";
        assert!(error.ends_with(advice), "{error}");
    }
}

#[tokio::test]
async fn a_refused_token_gets_the_advice_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let (_, admin) = admin_key(dir.path(), 2);
    let date = |ahead: i64| {
        let now = std::time::SystemTime::now();
        let time = if ahead < 0 {
            now - Duration::from_secs(ahead.unsigned_abs())
        } else {
            now + Duration::from_secs(ahead.unsigned_abs())
        };
        format!("Date: {}\r\n", httpdate::fmt_http_date(time))
    };
    let refused = |detail: &str| {
        let kind = "https://github.com/confidential-containers/kbs/errors/AdminAuthInitialization";
        format!(r#"{{"type":"{kind}","detail":"{detail}"}}"#)
    };
    let verified = refused("Admin auth error: Admin Token could not be verified for any admin persona");
    let cases = [
        (date(0), verified.clone(), "the private half of a key it trusts"),
        (String::new(), verified.clone(), "and both clocks"),
        (date(600), verified.clone(), "s ahead of this node's: check both clocks"),
        (date(-600), verified, "s behind this node's: check both clocks"),
        (date(0), refused("Admin endpoints disabled."), "configure one in its [admin] section"),
        (date(0), refused("Failed to parse HTTP Auth Bearer header"), "removes the header Authorization"),
        (date(0), "<html>login</html>".to_owned(), "this is not Trustee's answer"),
    ];
    for (headers, body, expected) in cases {
        let url = answer_raw(format!(
            "HTTP/1.1 401 No\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ))
        .await;
        let settings = KbsSettings { admin: Some(admin.clone()), ..settings(&url) };
        let client = KbsClient::new(&settings, Duration::from_secs(10)).unwrap();
        let error = client.publish(PATH, b"x").await.unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected}: {error}");
    }
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    for (status, wait) in [(429, "1"), (503, "date"), (425, "0"), (503, "soon")] {
        let (kbs, address) = serve(&[]).await;
        let start = Instant::now();
        let header = match wait {
            "date" => httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(2)),
            other => other.to_owned(),
        };
        kbs.lock().unwrap().busy = Some((status, header));
        client(&format!("http://{address}")).publish(PATH, b"x").await.unwrap();
        assert_eq!(methods(&kbs), ["POST"; 2]);
        // The others are retried after the usual pause: that this succeeds within the client's time is all that they show.
        let waited = start.elapsed() >= Duration::from_millis(990);
        assert!(waited || matches!(wait, "0" | "soon"), "{status} {wait}: {:?}", start.elapsed());
    }
}

#[tokio::test]
async fn retry_after_does_not_outlast_the_deadline() {
    let (kbs, address) = serve(&[]).await;
    kbs.lock().unwrap().busy = Some((429, "3600".to_owned()));
    let client = KbsClient::new(&settings(&format!("http://{address}")), Duration::from_secs(2)).unwrap();
    let start = Instant::now();
    // The last pause is shortened, and the last attempt succeeds.
    client.publish(PATH, b"x").await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn a_web_page_with_200_is_no_success() {
    let page = "<!doctype html><title>Sign in</title>";
    let url = answer_raw(format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\r\n{page}",
        page.len()
    ))
    .await;
    for result in [client(&url).publish(PATH, b"x").await, client(&url).delete(PATH).await] {
        let error = result.unwrap_err().to_string();
        assert!(
            error.ends_with("refused with 200 (a web page); check that --kbs-url is a Trustee KBS"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_path_of_the_api_is_added_once() {
    for tail in ["", "/", "/kbs/v0", "/kbs/v0/", "//"] {
        let (kbs, address) = serve(&[]).await;
        client(&format!("http://{address}{tail}")).publish(PATH, b"x").await.unwrap();
        assert_eq!(kbs.lock().unwrap().requests[0].1, format!("/kbs/v0/resource/{PATH}"), "{tail}");
    }
    let (kbs, address) = serve(&[]).await;
    client(&format!("http://{address}/a/kbs/v0")).publish(PATH, b"x").await.unwrap();
    assert_eq!(kbs.lock().unwrap().requests[0].1, format!("/a/kbs/v0/resource/{PATH}"));
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
    // Held, and without a listener: another test gets no server there.
    let closed = tokio::net::TcpSocket::new_v4().unwrap();
    closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    let start = Instant::now();
    let client = KbsClient::new(&settings(&url), SHORT).unwrap();
    let error = client.publish(PATH, b"x").await.unwrap_err();
    assert!(matches!(error, KbsError::Unreachable { tries: 2.., .. }), "{error}");
    let early = SHORT - Duration::from_millis(150);
    assert!(start.elapsed() >= early, "gave up early, after {:?}", start.elapsed());
    let text = error.to_string();
    let tries = text.strip_prefix(&format!("KBS at {url}: gave up after ")).unwrap();
    let (_, cause) = tries.split_once(" s: ").unwrap();
    assert_eq!(
        cause,
        "connect: Connection refused (os error 111); check that it runs, --kbs-url, and the network"
    );
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn a_silent_kbs_fails_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let client = KbsClient::new(&settings(&url), Duration::from_millis(600)).unwrap();
    let start = Instant::now();
    let text = client.publish(PATH, b"x").await.unwrap_err().to_string();
    assert!(text.contains("no answer in time"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn a_last_attempt_without_time_does_not_hide_the_cause() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let start = Instant::now();
    tokio::spawn(async move {
        let mut silent = Vec::new();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = socket.read(&mut [0; 4096]).await;
            // The attempts from now on have half a second or less.
            if start.elapsed() + Duration::from_millis(500) > SHORT {
                silent.push(socket);
                continue;
            }
            let _ = socket
                .write_all(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                .await;
        }
    });
    let client = KbsClient::new(&settings(&url), SHORT).unwrap();
    let text = client.publish(PATH, b"x").await.unwrap_err().to_string();
    assert!(text.contains(" s: answered 503"), "{text}");
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

/// Serves HTTPS with the certificate and the key, both in DER; every request gets 200. Returns its URL.
async fn serve_tls(certificate: Vec<u8>, key: Vec<u8>) -> String {
    use tokio_rustls::rustls::{ServerConfig, crypto::ring};
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.into()], PrivateKeyDer::try_from(key).unwrap())
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
    url
}

/// A self-signed certificate with these names, changed by `change`: its PEM and DER, and the key's DER.
fn self_signed(
    names: &[&str],
    change: impl FnOnce(&mut rcgen::CertificateParams),
) -> (String, Vec<u8>, Vec<u8>) {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    change(&mut params);
    let key = rcgen::KeyPair::generate().unwrap();
    let made = params.self_signed(&key).unwrap();
    (made.pem(), made.der().to_vec(), key.serialize_der())
}

/// Publishes to `url` with `pem` as `--kbs-ca`.
async fn publish_with_ca(url: &str, pem: &str) -> Result<(), KbsError> {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, pem).unwrap();
    let settings = KbsSettings { ca: Some(ca), ..settings(url) };
    KbsClient::new(&settings, Duration::from_secs(10))?.publish(PATH, b"x").await
}

fn openssl(dir: &Path, command: &str) {
    let out = std::process::Command::new("sh").arg("-c").arg(command).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Serves HTTPS with `kbs.pem` and `kbs.key` of the directory, by OpenSSL: it has kinds that rustls has not.
fn serve_openssl(dir: &Path) -> (std::process::Child, String) {
    let mut child = std::process::Command::new("openssl")
        .args(["s_server", "-www", "-accept", "127.0.0.1:0", "-cert", "kbs.pem", "-key", "kbs.key"])
        .current_dir(dir)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // It says which port it got.
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let address =
        said.by_ref().lines().find_map(|line| line.unwrap().strip_prefix("ACCEPT ").map(str::to_owned));
    child.stdout = Some(said.into_inner());
    (child, format!("https://{}", address.unwrap()))
}

#[tokio::test]
async fn an_https_kbs_is_trusted_through_the_given_ca_and_no_other() {
    let (pem, certificate, key) = self_signed(&["127.0.0.1"], |_| {});
    let url = serve_tls(certificate, key).await;
    publish_with_ca(&url, &pem).await.unwrap();
    let (stranger, ..) = self_signed(&["127.0.0.1"], |_| {});
    let start = Instant::now();
    for result in [publish_with_ca(&url, &stranger).await, client(&url).publish(PATH, b"x").await] {
        let error = result.unwrap_err();
        assert!(matches!(error, KbsError::Certificate { .. }), "{error:?}");
        assert!(
            error.to_string().contains("give the CA that signed it, or that very certificate"),
            "{error}"
        );
    }
    assert!(start.elapsed() < Duration::from_secs(9), "a bad certificate was tried again");
    let error = publish_with_ca(&url, "no certificate").await.unwrap_err().to_string();
    assert!(error.ends_with("(--kbs-ca): no certificate in it; name a PEM file with the CA's certificate, or with the KBS's own"), "{error}");
}

fn make_ca(params: &mut rcgen::CertificateParams) {
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
}

#[tokio::test]
async fn the_kbs_certificate_itself_is_trusted() {
    type Case<'a> = (&'a str, &'a [&'a str], fn(&mut rcgen::CertificateParams));
    let cases: [Case<'_>; 4] = [
        ("a CA, as of plain openssl req -x509", &["127.0.0.1"], make_ca),
        ("a CA without a name", &[], make_ca),
        ("no CA, without a name", &[], |_| {}),
        ("a CA for clients only", &["127.0.0.1"], |params| {
            make_ca(params);
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }),
    ];
    for (what, names, change) in cases {
        let (pem, certificate, key) = self_signed(names, change);
        let url = serve_tls(certificate, key).await;
        publish_with_ca(&url, &pem).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        // Among others, it is found as well. Alone, the others do not help.
        let (other, ..) = self_signed(&["127.0.0.1"], make_ca);
        publish_with_ca(&url, &format!("{other}{pem}"))
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(publish_with_ca(&url, &other).await.is_err(), "{what}");
    }
    // One whose CA is not in the file.
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    make_ca(&mut ca);
    let issuer = rcgen::Issuer::new(ca, rcgen::KeyPair::generate().unwrap());
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let url = serve_tls(leaf.der().to_vec(), key.serialize_der()).await;
    publish_with_ca(&url, &leaf.pem()).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_only_resembles_the_given_one_is_refused() {
    // The same names, serial number and CA:TRUE with another key: only the bytes differ.
    let same = |params: &mut rcgen::CertificateParams| {
        make_ca(params);
        params.serial_number = Some(7.into());
    };
    let (pem, ..) = self_signed(&["127.0.0.1"], same);
    let (_, certificate, key) = self_signed(&["127.0.0.1"], same);
    let url = serve_tls(certificate, key).await;
    let error = publish_with_ca(&url, &pem).await.unwrap_err();
    assert!(matches!(error, KbsError::Certificate { .. }), "{error:?}");
}

#[tokio::test]
async fn a_given_certificate_must_be_valid_now_and_for_its_name() {
    let expired = |params: &mut rcgen::CertificateParams| {
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    };
    let future = |params: &mut rcgen::CertificateParams| params.not_before = rcgen::date_time_ymd(3000, 1, 1);
    type Change = Box<dyn Fn(&mut rcgen::CertificateParams)>;
    let cases: [(&str, Change, &str); 5] = [
        ("127.0.0.1", Box::new(expired), "renew it, or correct this node's clock"),
        ("127.0.0.1", Box::new(future), "correct this node's clock"),
        (
            "127.0.0.1",
            Box::new(move |params| {
                make_ca(params);
                expired(params);
            }),
            "renew it, or correct this node's clock",
        ),
        (
            "kbs.example",
            Box::new(|_| {}),
            "correct the host in --kbs-url, or make one for the KBS with: openssl req",
        ),
        ("kbs.example", Box::new(make_ca), "not valid for name"),
    ];
    for (name, change, expected) in cases {
        let (pem, certificate, key) = self_signed(&[name], change);
        let url = serve_tls(certificate, key).await;
        let error = publish_with_ca(&url, &pem).await.unwrap_err();
        assert!(matches!(error, KbsError::Certificate { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn the_openssl_command_of_the_advice_makes_a_certificate_that_works() {
    let dir = tempfile::tempdir().unwrap();
    let (pem, certificate, key) = self_signed(&["kbs.example"], |_| {});
    let error = publish_with_ca(&serve_tls(certificate, key).await, &pem).await.unwrap_err().to_string();
    let (_, command) = error.split_once("make one for the KBS with: ").unwrap();
    let (command, _) = command.split_once("; then give kbs.pem with --kbs-ca").unwrap();
    openssl(dir.path(), command);
    let pem = std::fs::read_to_string(dir.path().join("kbs.pem")).unwrap();
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
    let key = PrivateKeyDer::from_pem_file(dir.path().join("kbs.key")).unwrap().secret_der().to_vec();
    publish_with_ca(&serve_tls(certificate, key).await, &pem).await.unwrap();
}

#[tokio::test]
async fn certificates_that_tls_cannot_use_get_the_command_for_a_better_one() {
    let cases = [
        (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-521 -nodes -subj /CN=kbs -keyout kbs.key -out kbs.pem",
            "its key is on the curve P-521, which TLS cannot check here; make one for the KBS with: openssl",
        ),
        (
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=kbs -keyout kbs.key -out kbs.csr \
             && openssl x509 -req -in kbs.csr -signkey kbs.key -out kbs.pem -days 5 -extfile /dev/null",
            "X.509 certificate of version 1; make one for the KBS with: openssl",
        ),
    ];
    for (command, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        openssl(dir.path(), command);
        let (mut server, url) = serve_openssl(dir.path());
        let pem = std::fs::read_to_string(dir.path().join("kbs.pem")).unwrap();
        let result = publish_with_ca(&url, &pem).await;
        server.kill().unwrap();
        server.wait().unwrap();
        let text = result.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

#[tokio::test]
async fn the_wrong_scheme_is_named() {
    let fails = |url: String| async move {
        let client = KbsClient::new(&settings(&url), SHORT).unwrap();
        client.publish(PATH, b"x").await.unwrap_err().to_string()
    };
    let (_, plain) = serve(&[]).await;
    let plain = fails(format!("https://{plain}"));
    let closes = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", closes.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = closes.accept().await.unwrap();
            let _ = socket.read(&mut [0; 4096]).await;
        }
    });
    let closes = fails(url);
    let alert = fails(answer_raw("\x15\x03\x03\x00\x02\x02\x16".to_owned()).await);
    let nginx = answer_raw(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html><head><title>400 The \
         plain HTTP request was sent to HTTPS port</title></head></html>"
            .to_owned(),
    )
    .await;
    let (plain, closes, alert, nginx) = tokio::join!(plain, closes, alert, fails(nginx));
    for text in [plain, closes] {
        assert!(
            text.ends_with("; does the KBS speak TLS there? If not, write http:// in --kbs-url"),
            "{text}"
        );
    }
    assert!(
        alert.ends_with("its answer is not HTTP; does it speak TLS there? Then write https:// in --kbs-url"),
        "{alert}"
    );
    assert!(nginx.ends_with("; it speaks TLS at this port: write https:// in --kbs-url"), "{nginx}");
}

#[tokio::test]
async fn a_host_that_does_not_resolve_is_named_as_such() {
    let url = "http://kbs-service.does-not-exist.invalid:8080";
    let client = KbsClient::new(&settings(url), Duration::from_millis(300)).unwrap();
    let text = client.publish(PATH, b"x").await.unwrap_err().to_string();
    assert!(
        text.contains("the host name kbs-service.does-not-exist.invalid")
            || text.contains("no answer in time"),
        "{text}"
    );
    assert!(!text.contains("client error") && !text.contains("dns error"), "{text}");
    assert!(!text.contains("does not resolve") || text.ends_with("only with the cluster's DNS"), "{text}");
}
