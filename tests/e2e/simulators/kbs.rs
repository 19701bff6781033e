//! The simulated KBS refuses and answers as Trustee does.

use std::time::{Duration, Instant};

use super::http::{Answer, call, now};
use anyhow::Result;
use hyper::{Method, StatusCode};
use secure_comms_tests::simulators::kbs::{Fault, Kbs, KbsOptions};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATH: &str = "default/pp-1/privateKey";
const URL: &str = "/kbs/v0/resource/default/pp-1/privateKey";
const SOON: Duration = Duration::from_secs(10);

async fn kbs() -> Kbs {
    Kbs::start(KbsOptions::default()).await.unwrap()
}

async fn admin(kbs: &Kbs, method: Method, url: &str, body: &[u8]) -> Result<Answer> {
    let token = format!("Bearer {}", kbs.admin_token().unwrap());
    call(kbs.addr(), method, url, &[("authorization", &token)], body).await
}

#[tokio::test]
async fn an_admin_stores_replaces_and_deletes_a_resource() {
    let kbs = kbs().await;
    for body in [&b"one"[..], b"two"] {
        assert_eq!(admin(&kbs, Method::POST, URL, body).await.unwrap().status, 200);
        assert_eq!(kbs.resource(PATH).unwrap(), body);
    }
    assert_eq!(admin(&kbs, Method::DELETE, URL, b"").await.unwrap().status, 200);
    assert_eq!(kbs.resource(PATH), None);
    assert_eq!(admin(&kbs, Method::DELETE, URL, b"").await.unwrap().status, 200, "it is gone already");
    let methods: Vec<_> = kbs.requests().into_iter().map(|r| format!("{} {}", r.method, r.path)).collect();
    assert_eq!(
        methods,
        [format!("POST {URL}"), format!("POST {URL}"), format!("DELETE {URL}"), format!("DELETE {URL}")]
    );
}

#[tokio::test]
async fn a_read_only_storage_is_a_plugin_error_without_its_cause() {
    let kbs = kbs().await;
    kbs.put(PATH, "kept").unwrap();
    kbs.set_fault(Fault::ReadOnly);
    for method in [Method::POST, Method::DELETE] {
        let answer = admin(&kbs, method, URL, b"new").await.unwrap();
        assert_eq!(
            (answer.status, answer.variant().as_str()),
            (StatusCode::UNAUTHORIZED, "PluginInternalError")
        );
        assert_eq!(answer.json()["detail"], "Plugin internal error");
    }
    assert_eq!(kbs.resource(PATH).unwrap(), b"kept");
}

#[tokio::test]
async fn a_token_with_an_audience_or_none_at_all_changes_nothing() {
    let kbs = kbs().await;
    kbs.put(PATH, "kept").unwrap();
    let with_aud = kbs.sign_claims(&json!({"role": "admin", "exp": now() + 60, "aud": "kbs"}));
    for headers in [vec![], vec![("authorization", format!("Bearer {with_aud}"))]] {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        for method in [Method::POST, Method::DELETE] {
            let answer = call(kbs.addr(), method, URL, &headers, b"new").await.unwrap();
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
            assert_eq!(answer.variant(), "AdminAuthInitialization");
            assert!(answer.headers.get("content-type").is_none());
        }
    }
    assert_eq!(kbs.resource(PATH).unwrap(), b"kept");
}

#[tokio::test]
async fn a_get_without_attestation_is_refused_even_to_the_admin() {
    let kbs = kbs().await;
    kbs.put(PATH, "secret").unwrap();
    let answer = admin(&kbs, Method::GET, URL, b"").await.unwrap();
    assert_eq!((answer.status, answer.variant().as_str()), (StatusCode::UNAUTHORIZED, "TokenVerifierError"));

    // A session without evidence gives access to nothing.
    let auth = call(kbs.addr(), Method::POST, "/kbs/v0/auth", &[], b"{}").await.unwrap();
    let cookie = auth.cookie();
    let answer = call(kbs.addr(), Method::GET, URL, &[("cookie", &cookie)], b"").await.unwrap();
    assert_eq!(answer.variant(), "TokenVerifierError");
    let wrong = json!({"nonce": auth.json()["nonce"], "evidence": "made up"}).to_string();
    let attest =
        call(kbs.addr(), Method::POST, "/kbs/v0/attest", &[("cookie", &cookie)], wrong.as_bytes()).await;
    assert_eq!(attest.unwrap().variant(), "AttestationError");
    assert_eq!(kbs.attestations(), 0);
}

#[tokio::test]
async fn an_attested_session_reads_but_writes_nothing() {
    let kbs = kbs().await;
    kbs.put(PATH, "secret").unwrap();
    let (cookie, token) = super::http::attest(&kbs).await;
    let token = format!("Bearer {token}");
    for header in [("cookie", cookie.as_str()), ("authorization", token.as_str())] {
        let answer = call(kbs.addr(), Method::GET, URL, &[header], b"").await.unwrap();
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"secret"[..]));
        let answer = call(kbs.addr(), Method::POST, URL, &[header], b"mine").await.unwrap();
        assert_eq!(answer.variant(), "AdminAuthInitialization");
    }
    let other =
        call(kbs.addr(), Method::GET, &URL.replace("pp-1", "pp-2"), &[("cookie", &cookie)], b"").await;
    assert_eq!(other.unwrap().variant(), "PluginInternalError");
    kbs.deny(PATH);
    let denied = call(kbs.addr(), Method::GET, URL, &[("cookie", &cookie)], b"").await.unwrap();
    assert_eq!(denied.variant(), "PolicyDeny");
    assert_eq!(kbs.attestations(), 1);
}

#[tokio::test]
async fn a_resource_of_two_mebibytes_is_taken_and_a_byte_more_is_413() {
    let kbs = kbs().await;
    let body = vec![7; 2 * 1024 * 1024 + 1];
    assert_eq!(admin(&kbs, Method::POST, URL, &body[1..]).await.unwrap().status, 200);
    assert_eq!(admin(&kbs, Method::POST, URL, &body).await.unwrap().status, 413);
    assert_eq!(kbs.resource(PATH).unwrap().len(), 2 * 1024 * 1024);
}

#[tokio::test]
async fn an_illegal_path_is_refused_and_an_unknown_one_not_found() {
    let kbs = kbs().await;
    for path in ["a/b", "a/b/c/d", "a/.b/c", "a//c"] {
        let answer = admin(&kbs, Method::POST, &format!("/kbs/v0/resource/{path}"), b"").await.unwrap();
        assert_eq!(answer.variant(), "PluginInternalError", "{path}");
    }
    assert_eq!(admin(&kbs, Method::GET, "/nowhere", b"").await.unwrap().status, 404);
    let absolute = format!("{}{URL}", kbs.url());
    assert_eq!(admin(&kbs, Method::POST, &absolute, b"").await.unwrap().status, 404);
}

#[tokio::test]
async fn an_old_kbs_knows_no_delete_but_takes_an_empty_body() {
    let kbs = Kbs::start(KbsOptions { old: true, ..KbsOptions::default() }).await.unwrap();
    kbs.put(PATH, "secret").unwrap();
    assert_eq!(admin(&kbs, Method::DELETE, URL, b"").await.unwrap().status, 405);
    assert_eq!(admin(&kbs, Method::POST, URL, b"").await.unwrap().status, 200);
    assert_eq!(kbs.resource(PATH).unwrap(), b"");
}

#[tokio::test]
async fn faults_come_and_go_while_it_runs() {
    let kbs = kbs().await;
    let health = || call(kbs.addr(), Method::GET, "/healthz", &[], b"");
    assert_eq!(health().await.unwrap().status, 200);
    kbs.set_fault(Fault::Refuse);
    assert!(health().await.is_err());
    kbs.set_fault(Fault::Status(503));
    assert_eq!(health().await.unwrap().status, 503);
    kbs.set_fault(Fault::Garbage(b"garbage".to_vec()));
    let answer = call(kbs.addr(), Method::GET, URL, &[], b"").await.unwrap();
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"garbage"[..]));
    kbs.set_fault(Fault::Silent);
    assert!(tokio::time::timeout(Duration::from_millis(100), health()).await.is_err());
    kbs.set_fault(Fault::None);
    assert_eq!(health().await.unwrap().status, 200);
}

#[tokio::test]
async fn a_restarted_kbs_has_its_port_and_its_resources() {
    let kbs = kbs().await;
    kbs.put(PATH, "secret").unwrap();
    let (cookie, _) = super::http::attest(&kbs).await;
    let mut open = TcpStream::connect(kbs.addr()).await.unwrap();
    kbs.kill().await.unwrap();
    assert_eq!(open.read(&mut [0]).await.unwrap_or(0), 0);
    // A process that another test is about to start has the listener for a moment.
    let refused = async {
        loop {
            if let Err(error) = TcpStream::connect(kbs.addr()).await {
                return error;
            }
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(30), refused).await.unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(kbs.kill().await.is_err());
    kbs.restart().await.unwrap();
    assert!(kbs.restart().await.is_err());
    let answer = call(kbs.addr(), Method::GET, URL, &[("cookie", &cookie)], b"").await.unwrap();
    assert_eq!(answer.variant(), "TokenVerifierError");
    assert_eq!(kbs.resource(PATH).unwrap(), b"secret");
}

#[tokio::test]
async fn connections_without_a_request_head_are_closed() {
    let head_limit = Duration::from_millis(300);
    let kbs = Kbs::start(KbsOptions { head_limit, ..KbsOptions::default() }).await.unwrap();
    for request in [&b""[..], b"GET /heal", b"GET /healthz HTTP/1.1\r\nhost: kbs\r\n\r\n"] {
        let start = Instant::now();
        let mut stream = TcpStream::connect(kbs.addr()).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(start.elapsed() >= head_limit, "{:?}", start.elapsed());
        assert_eq!(answer.starts_with(b"HTTP/1.1 200"), request.ends_with(b"\r\n\r\n"));
    }
}

#[tokio::test]
async fn a_client_that_half_closes_after_its_request_gets_its_answer() {
    let kbs = kbs().await;
    let mut stream = TcpStream::connect(kbs.addr()).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: kbs\r\n\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test]
async fn a_request_is_waited_for_past_or_coming() {
    let kbs = kbs().await;
    let (seen, _) = tokio::join!(
        kbs.wait_for_request(|request| request.path == "/healthz", SOON),
        call(kbs.addr(), Method::GET, "/healthz", &[], b"")
    );
    assert_eq!(seen.unwrap().method, "GET");
    kbs.wait_for_request(|request| request.path == "/healthz", SOON).await.unwrap();
    assert!(kbs.wait_for_request(|request| request.path == "/no", Duration::from_millis(20)).await.is_err());
}
