//! The stand-in with a forwarder without Secure Comms, which the real CAA is made for.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;

use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

use secure_comms_tests::harness::drawn::free_port;
use secure_comms_tests::harness::shim::Shim;
use secure_comms_tests::simulators::caa::forwarder::Forwarder;
use secure_comms_tests::simulators::caa::{Caa, CaaOptions, Cloud, Instance, Line};
use secure_comms_tests::simulators::kata_api::server::KataServer;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// A cloud whose VMs are all at 127.0.0.1.
#[derive(Default)]
struct Loopback {
    deleted: watch::Sender<Vec<String>>,
}

#[async_trait]
impl Cloud for Loopback {
    async fn create(&self, _: Instance) -> Result<IpAddr> {
        Ok([127, 0, 0, 1].into())
    }

    async fn delete(&self, id: &str) -> Result<()> {
        self.deleted.send_modify(|deleted| deleted.push(id.to_owned()));
        Ok(())
    }
}

/// A node with one pod, whose forwarder is started by the test.
struct Node {
    directory: TempDir,
    cloud: Arc<Loopback>,
    kata: KataServer,
    forwarder: SocketAddr,
    caa: Caa,
    shim: Shim,
    agent: PathBuf,
    apf_json: Value,
}

impl Node {
    async fn new(proxy_timeout: Duration) -> Self {
        let directory = tempfile::Builder::new().prefix("sc-").tempdir().unwrap();
        let forwarder = free_port().unwrap();
        let mut options = CaaOptions::new(directory.path());
        options.forwarder_port = forwarder.port();
        options.proxy_timeout = proxy_timeout;
        options.backoff = Duration::from_millis(100);
        let cloud = Arc::<Loopback>::default();
        let caa = Caa::start(options, cloud.clone()).await.unwrap();
        let kata = KataServer::start(directory.path().join("kata.sock")).await.unwrap();
        let shim = Shim::new(caa.socket(), "Web.v2").unwrap();
        let agent = shim.create_vm().await.unwrap();
        let file = caa.directory(&shim.id).join("apf.json");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        let apf_json = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        Self { directory, cloud, kata, forwarder, caa, shim, agent, apf_json }
    }

    async fn forwarder(&self, versions: &[&'static SupportedProtocolVersion]) -> Forwarder {
        Forwarder::start(self.forwarder, &self.apf_json, self.kata.path(), versions).await.unwrap()
    }

    /// The connection of a VM that is being started: its first state that is `wanted`.
    async fn line(&self, wanted: impl Fn(&Line) -> bool) -> watch::Receiver<Line> {
        let mut line = timeout(SOON, async {
            loop {
                // There is no event of its existence.
                match self.caa.line(&self.shim.id) {
                    Ok(line) => break line,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
        .await
        .unwrap();
        is(&mut line, wanted).await;
        line
    }

    fn deleted(&self) -> bool {
        *self.cloud.deleted.borrow() == [self.shim.id.clone()]
    }
}

async fn is(line: &mut watch::Receiver<Line>, wanted: impl FnMut(&Line) -> bool) -> Line {
    timeout(SOON, line.wait_for(wanted)).await.unwrap().unwrap().clone()
}

#[tokio::test]
async fn a_pod_lives_over_one_connection_of_either_version() {
    for version in [&TLS13, &TLS12] {
        let mut node = Node::new(SOON).await;
        let digits = &node.shim.id[..8];
        assert_eq!(node.caa.server_name(&node.shim.id).unwrap(), format!("podvm-web-v2-{digits}"));
        let _forwarder = node.forwarder(&[version]).await;
        node.shim.start_vm().await.unwrap();
        assert!(matches!(&*node.caa.line(&node.shim.id).unwrap().borrow(), Line::Up));
        let mut runtime = node.shim.connect(&node.agent).await.unwrap();
        runtime.exchange(32 * 1024).await.unwrap();
        node.shim.end(runtime).await.unwrap();
        timeout(SOON, node.kata.exited()).await.unwrap().unwrap();
        assert!(!node.agent.exists() && node.deleted());
        assert!(node.caa.directory(&node.shim.id).join("apf.json").exists());
    }
}

#[tokio::test]
async fn it_dials_again_until_a_handshake_is_done() {
    let node = Node::new(SOON).await;
    let starting = tokio::spawn({
        let shim = node.shim.clone();
        async move { shim.start_vm().await }
    });
    node.line(|line| matches!(line, Line::Dials(2..))).await;
    let forwarder = node.forwarder(&[&TLS13]).await;
    forwarder.hold(true);
    node.line(|line| matches!(line, Line::Held(_))).await;
    forwarder.stop().await;
    let forwarder = node.forwarder(&[&TLS13]).await;
    timeout(SOON, starting).await.unwrap().unwrap().unwrap();
    let mut line = node.line(|line| *line == Line::Up).await;
    let mut runtime = node.shim.connect(&node.agent).await.unwrap();
    forwarder.stop().await;
    is(&mut line, |line| matches!(line, Line::Ended(_))).await;
    assert!(runtime.exchange(1).await.is_err());
    runtime.dies().await.unwrap();
    node.shim.stop_vm().await.unwrap();
}

#[tokio::test]
async fn a_stop_during_the_handshake_leaves_the_connection() {
    let node = Node::new(Duration::from_secs(10)).await;
    let forwarder = node.forwarder(&[&TLS13]).await;
    forwarder.hold(true);
    let starting = tokio::spawn({
        let shim = node.shim.clone();
        async move { shim.start_vm().await }
    });
    let mut line = node.line(|line| matches!(line, Line::Held(_))).await;
    node.shim.stop_vm().await.unwrap();
    assert!(node.deleted() && node.agent.exists());
    assert!(matches!(&*line.borrow(), Line::Held(_)));
    let Line::Ended(reason) = is(&mut line, |line| matches!(line, Line::Ended(_))).await else { panic!() };
    assert!(reason.contains("the proxy timeout is over"), "{reason}");
    assert!(timeout(SOON, starting).await.unwrap().unwrap().is_err());
    assert!(node.agent.exists() && node.caa.directory(&node.shim.id).join("apf.json").exists());
}

#[tokio::test]
async fn a_start_without_its_caller_goes_on() {
    let node = Node::new(SOON).await;
    let starting = tokio::spawn({
        let shim = node.shim.clone();
        async move { shim.start_vm().await }
    });
    node.line(|line| matches!(line, Line::Dials(1..))).await;
    starting.abort();
    let _forwarder = node.forwarder(&[&TLS13]).await;
    node.line(|line| *line == Line::Up).await;
}

#[tokio::test]
async fn a_killed_one_leaves_its_files_and_its_successor_knows_nothing() {
    let node = Node::new(SOON).await;
    let _forwarder = node.forwarder(&[&TLS13]).await;
    let runtime = {
        node.shim.start_vm().await.unwrap();
        node.shim.connect(&node.agent).await.unwrap()
    };
    let Node { directory, cloud, caa, shim, agent, .. } = node;
    let file = caa.directory(&shim.id).join("apf.json");
    caa.kill().await.unwrap();
    runtime.dies().await.unwrap();
    assert!(agent.exists() && file.exists() && cloud.deleted.borrow().is_empty());
    let _caa = Caa::start(CaaOptions::new(directory.path()), cloud).await.unwrap();
    let error = format!("{:#}", shim.stop_vm().await.unwrap_err());
    assert!(error.contains("does not exist"), "{error}");
}
