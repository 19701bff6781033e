use std::sync::Mutex;

use axum::Router;
use axum::extract::Request;
use axum::http::Method;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::*;
use crate::doctor::Outcome;

type Requests = Arc<Mutex<Vec<String>>>;

/// A KBS that answers each request with a status.
async fn kbs(answer: fn(&Method) -> StatusCode) -> (Url, Requests) {
    let requests = Requests::default();
    let log = Arc::clone(&requests);
    let app = Router::new().fallback(move |request: Request| {
        log.lock().unwrap().push(format!("{} {}", request.method(), request.uri().path()));
        let status = answer(request.method());
        async move { status }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, requests)
}

fn settings(url: Url) -> KbsSettings {
    KbsSettings { url, ca: None, admin: None }
}

#[track_caller]
fn last_fault(findings: &[Finding]) -> (&'static str, String) {
    let last = findings.last().unwrap();
    match &last.outcome {
        Outcome::Fault { found, .. } => (last.check, found.clone()),
        outcome => panic!("{}: {outcome:?}", last.check),
    }
}

#[tokio::test]
async fn a_probe_is_written_and_deleted() {
    let (url, requests) = kbs(|_| StatusCode::OK).await;
    let findings = check(&settings(url)).await;
    let checks: Vec<_> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks, ["kbs-name", "kbs-tcp", "kbs-tls", "kbs-healthy", "kbs-clock", "kbs-token"]);
    assert!(findings.iter().all(|finding| !matches!(finding.outcome, Outcome::Fault { .. })), "{findings:?}");
    let path = format!("/kbs/v0/resource/{PROBE}");
    assert_eq!(
        *requests.lock().unwrap(),
        ["GET /healthz".to_owned(), format!("POST {path}"), format!("DELETE {path}")]
    );
}

#[tokio::test]
async fn an_older_kbs_without_healthz_is_no_fault() {
    let (url, _) =
        kbs(|method| if method == Method::GET { StatusCode::NOT_FOUND } else { StatusCode::OK }).await;
    let findings = check(&settings(url)).await;
    assert!(findings[3].title.contains("404"), "{findings:?}");
}

#[tokio::test]
async fn a_refused_token_is_a_fault() {
    let (url, _) =
        kbs(|method| if method == Method::GET { StatusCode::OK } else { StatusCode::UNAUTHORIZED }).await;
    let (check, found) = last_fault(&check(&settings(url)).await);
    assert_eq!(check, "kbs-token");
    assert!(found.contains("401"), "{found}");
}

#[tokio::test]
async fn a_broken_kbs_is_a_fault() {
    let (url, _) =
        kbs(|method| if method == Method::GET { StatusCode::BAD_GATEWAY } else { StatusCode::OK }).await;
    let findings = check(&settings(url)).await;
    assert!(
        matches!(&findings[3].outcome, Outcome::Fault { found, .. } if found.contains("502")),
        "{findings:?}"
    );
}

#[tokio::test]
async fn a_closed_port_and_an_unknown_name_are_faults() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    assert_eq!(last_fault(&check(&settings(url.parse().unwrap())).await).0, "kbs-tcp");
    let unknown = "http://kbs.invalid:8080".parse().unwrap();
    assert_eq!(last_fault(&check(&settings(unknown)).await).0, "kbs-name");
}

/// A TLS server with a certificate of its own for `name`; its URL and the certificate.
async fn tls(name: &str) -> (Url, String) {
    let own = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let pem = own.cert.pem();
    let key = rustls_pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that refuses the certificate ends it.
            let Ok(stream) = TlsAcceptor::from(Arc::new(config.clone())).accept(stream).await else {
                continue;
            };
            let app = hyper_util::service::TowerToHyperService::new(
                Router::new().fallback(|| async { StatusCode::OK }),
            );
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), app),
            );
        }
    });
    (format!("https://localhost:{port}").parse().unwrap(), pem)
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_a_fault() {
    let (url, pem) = tls("localhost").await;
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap().cert.pem())
        .unwrap();
    let with = |ca: &std::path::Path| KbsSettings { url: url.clone(), ca: Some(ca.to_owned()), admin: None };
    assert_eq!(last_fault(&check(&with(&ca)).await).0, "kbs-tls");
    std::fs::write(&ca, pem).unwrap();
    let findings = check(&with(&ca)).await;
    assert!(
        findings.iter().any(|finding| finding.check == "kbs-tls" && finding.outcome == Outcome::Ok),
        "{findings:?}"
    );
    assert_eq!(last_fault(&check(&with(&dir.path().join("none.pem"))).await).0, "kbs-tls");
}
