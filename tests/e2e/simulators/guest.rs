//! The simulated guest components fetch through the KBS, in this process and as processes of their own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::http::{Answer, call};
use hyper::Method;
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::simulators::guest::{Backend, Cdh, CdhOptions, CdhSocket, Rest};
use secure_comms_tests::simulators::kbs::{Fault, Kbs, KbsOptions};
use tokio::process::Command;

const PATH: &str = "default/pp-1/privateKey";
const SOON: Duration = Duration::from_secs(10);

async fn kbs(https: bool) -> Kbs {
    let kbs = Kbs::start(KbsOptions { https, ..KbsOptions::default() }).await.unwrap();
    kbs.put(PATH, "the key").unwrap();
    kbs
}

fn options(kbs: &Kbs) -> CdhOptions {
    CdhOptions { ca_pem: kbs.ca_pem().map(str::to_owned), ..CdhOptions::new(kbs.url()) }
}

async fn rest(options: CdhOptions) -> (Rest, Arc<Cdh>) {
    let cdh = Arc::new(Cdh::new(options).unwrap());
    (Rest::start("127.0.0.1:0".parse().unwrap(), Backend::Local(Arc::clone(&cdh))).await.unwrap(), cdh)
}

async fn fetch(rest: SocketAddr, path: &str) -> Answer {
    call(rest, Method::GET, &format!("/cdh/resource/{path}"), &[], b"").await.unwrap()
}

fn assert_failed(answer: &Answer) {
    assert_eq!((answer.status.as_u16(), &answer.body[..]), (500, &b"ttrpc request error"[..]));
}

#[tokio::test]
async fn a_fetch_takes_one_attestation_and_two_connections() {
    let kbs = kbs(false).await;
    let (rest, cdh) = rest(options(&kbs)).await;
    for fetches in 1..=2 {
        let answer = fetch(rest.addr(), PATH).await;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b"the key"[..]));
        // Nothing is cached: each fetch costs the same.
        assert_eq!((kbs.attestations(), kbs.connections()), (fetches, 2 * fetches));
        assert_eq!(kbs.requests().len() as u64, 3 * fetches);
    }
    assert_eq!((cdh.fetches(), cdh.most_at_once()), (2, 1));
}

#[tokio::test]
async fn https_works_with_the_pinned_ca_and_with_no_other() {
    let kbs = kbs(true).await;
    let (rest_of_kbs, _) = rest(options(&kbs)).await;
    assert_eq!(&fetch(rest_of_kbs.addr(), PATH).await.body[..], b"the key");

    let stranger = Kbs::start(KbsOptions { https: true, ..KbsOptions::default() }).await.unwrap();
    let wrong = CdhOptions { ca_pem: stranger.ca_pem().map(str::to_owned), ..options(&kbs) };
    let error = Cdh::new(wrong).unwrap().fetch(PATH).await.unwrap_err();
    assert!(format!("{error:#}").contains("TLS to the KBS"), "{error:#}");
    assert!(Cdh::new(CdhOptions { ca_pem: None, ..options(&kbs) }).is_err());
}

#[tokio::test]
async fn a_missing_or_denied_resource_costs_four_attestations() {
    let kbs = kbs(false).await;
    let (rest, _) = rest(options(&kbs)).await;
    assert_failed(&fetch(rest.addr(), "default/pp-2/privateKey").await);
    assert_eq!(kbs.attestations(), 4);
    kbs.deny(PATH);
    assert_failed(&fetch(rest.addr(), PATH).await);
    assert_eq!(kbs.attestations(), 8);
}

#[tokio::test]
async fn a_guest_with_the_wrong_evidence_gets_nothing() {
    let kbs = kbs(false).await;
    let (rest, _) = rest(CdhOptions { evidence: "made up".to_owned(), ..options(&kbs) }).await;
    assert_failed(&fetch(rest.addr(), PATH).await);
    assert_eq!(kbs.attestations(), 0);
}

#[tokio::test]
async fn a_kbs_that_is_down_fails_the_fetch_after_its_retries() {
    let kbs = kbs(false).await;
    let (rest, _) = rest(options(&kbs)).await;
    kbs.kill().await.unwrap();
    let start = Instant::now();
    assert_failed(&fetch(rest.addr(), PATH).await);
    assert!(start.elapsed() >= 3 * Duration::from_millis(50));
    kbs.restart().await.unwrap();
    assert_eq!(&fetch(rest.addr(), PATH).await.body[..], b"the key");
}

#[tokio::test]
async fn a_silent_kbs_is_not_retried_and_garbage_is_passed_on() {
    let kbs = kbs(false).await;
    let (rest, _) = rest(CdhOptions { answer_limit: Duration::from_millis(100), ..options(&kbs) }).await;
    kbs.set_fault(Fault::Silent);
    assert_failed(&fetch(rest.addr(), PATH).await);
    assert_eq!(kbs.connections(), 1);
    kbs.set_fault(Fault::Garbage(vec![0, 255, 10]));
    let (rest, _) = self::rest(options(&kbs)).await;
    assert_eq!(&fetch(rest.addr(), PATH).await.body[..], [0, 255, 10]);
}

#[tokio::test]
async fn the_front_reaches_the_back_over_a_unix_socket() {
    let kbs = kbs(false).await;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cdh.sock");
    let back = CdhSocket::start(&socket, Arc::new(Cdh::new(options(&kbs)).unwrap())).unwrap();
    let rest = Rest::start("127.0.0.1:0".parse().unwrap(), Backend::Unix(socket.clone())).await.unwrap();
    assert_eq!(&fetch(rest.addr(), PATH).await.body[..], b"the key");
    assert_failed(&fetch(rest.addr(), "default/no/key").await);
    drop(back);
    assert!(!socket.exists());
    assert_failed(&fetch(rest.addr(), PATH).await);
}

async fn spawn(args: &[&str]) -> (Child, String) {
    let mut command = Command::new(&ensure_built().await.unwrap().simulator);
    command.args(args);
    let child = Child::spawn("guest", command).unwrap();
    let line = child.wait_for_text("listening on ", SOON).await.unwrap();
    let at = line.strip_prefix("listening on ").unwrap().to_owned();
    (child, at)
}

#[tokio::test]
async fn one_process_serves_front_and_back_over_https() {
    let kbs = kbs(true).await;
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), kbs.ca_pem().unwrap()).unwrap();
    let ca = ca.path().to_str().unwrap();
    let (_guest, at) =
        spawn(&["api-server-rest", "--listen", "127.0.0.1:0", "--kbs", &kbs.url(), "--ca", ca]).await;
    assert_eq!(&fetch(at.parse().unwrap(), PATH).await.body[..], b"the key");
}

#[tokio::test]
async fn front_and_back_run_as_processes_and_clean_up() {
    let kbs = kbs(false).await;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cdh.sock");
    let path = socket.to_str().unwrap();
    let (mut back, _) = spawn(&["cdh", "--listen", path, "--kbs", &kbs.url(), "--retry-ms", "10"]).await;
    let (_front, at) = spawn(&["api-server-rest", "--listen", "127.0.0.1:0", "--cdh", path]).await;
    assert_eq!(&fetch(at.parse().unwrap(), PATH).await.body[..], b"the key");
    back.signal(Signal::SIGTERM).unwrap();
    assert!(back.wait_exit(SOON).await.unwrap().success());
    assert!(!Path::new(path).exists());
}

#[tokio::test]
async fn pooled_connections_end_when_the_kbs_closes_them() {
    let head_limit = Duration::from_secs(2);
    let kbs = Kbs::start(KbsOptions { head_limit, ..KbsOptions::default() }).await.unwrap();
    kbs.put(PATH, "the key").unwrap();
    let (rest, _) = rest(CdhOptions { pooled: true, ..options(&kbs) }).await;
    assert_eq!(&fetch(rest.addr(), PATH).await.body[..], b"the key");
    tokio::time::timeout(SOON, kbs.wait_until_idle()).await.unwrap();
}
