//! What takes long, and what panics, is in the log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::{Connection, FIXED, MemLink, MemReceiver, MemSender, tunnel, within};
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{InboundTag, Kubernetes, OutboundTag, TunnelName};
use secure_comms_tunnel::{Inbound, Link, OpenError, Outbounds, Stream};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Every line of this process; tests look for their own tunnels' names.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = format!("{}: {}", record.level(), record.args());
        // A fault in the accept loop of this inbound.
        assert!(!line.contains("inbound DEADLY: closing a client"), "{line}");
        LINES.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

fn start_log() {
    // Another test of this process may have been first.
    let _ = log::set_logger(&Logger);
    log::set_max_level(log::LevelFilter::Info);
}

fn lines_with(text: &str) -> Vec<String> {
    LINES.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
}

async fn said(text: &str) -> String {
    loop {
        if let Some(line) = lines_with(text).pop() {
            return line;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn outbounds(list: &str) -> Outbounds<Kubernetes> {
    Outbounds::new(&parse_list::<OutboundTag>(list).unwrap())
}

async fn inbound(tag: &str) -> Inbound {
    Inbound::bind(&parse_list::<InboundTag>(tag).unwrap().remove(0)).await.unwrap()
}

#[tokio::test]
async fn a_server_that_comes_late_is_said_to_be_waited_for() {
    within(async {
        start_log();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late");
        let name: TunnelName = "LATE".parse().unwrap();
        let outbounds = outbounds(&format!("KUBERNETES_PHASE:LATE:{}", path.display()));
        let permit = outbounds.with_connect_timeout(&name, Duration::from_secs(100)).permit("LATE").unwrap();
        let connecting = tokio::spawn(async move { permit.connect().await.map(drop) });
        let line = said("tunnel LATE: waiting for").await;
        let path_text = path.display();
        let expected = format!(
            "WARN: tunnel LATE: waiting for {path_text}: No such file or directory (os error 2); 99 s left"
        );
        assert_eq!(line, expected);
        let _server = tokio::net::UnixListener::bind(&path).unwrap();
        connecting.await.unwrap().unwrap();
        let done = said("answered after").await;
        assert!(done.starts_with(&format!("INFO: tunnel LATE: {path_text} answered after ")), "{done}");
        assert_eq!(lines_with("tunnel LATE").len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_namespace_that_does_not_come_is_said_to_be_waited_for() {
    within(async {
        start_log();
        let tag = parse_list::<InboundTag>("KUBERNETES_PHASE:NETNS:no-such-netns:0").unwrap().remove(0);
        let binding = tokio::spawn(async move { Inbound::bind(&tag).await.map(drop) });
        let line = said("inbound NETNS").await;
        assert!(line.contains("waiting for network namespace, ") && line.contains(" s left: "), "{line}");
        assert!(line.contains("/run/netns/no-such-netns"), "{line}");
        binding.abort();
    })
    .await;
}

#[tokio::test]
async fn the_first_of_the_waiting_clients_is_said_to_wait() {
    within(async {
        start_log();
        let inbound = inbound("KUBERNETES_PHASE:QUIET:0").await;
        let local = inbound.local().to_owned();
        let (links, seen) = watch::channel(None::<MemLink>);
        tokio::spawn(inbound.serve(seen));
        let clients = [TcpStream::connect(&local).await.unwrap(), TcpStream::connect(&local).await.unwrap()];
        let line = said("inbound QUIET").await;
        assert!(line.starts_with("INFO: inbound QUIET: a client waits for a peer, "), "{line}");
        assert!(line.ends_with(" s left"), "{line}");
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut connection = Connection::new(FIXED);
        let port = server.local_addr().unwrap().port();
        connection.serve(outbounds(&format!("KUBERNETES_PHASE:QUIET:{port}")));
        links.send_replace(Some(connection.adaptor.clone()));
        for _ in &clients {
            server.accept().await.unwrap();
        }
        assert_eq!(lines_with("inbound QUIET: a client waits").len(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_client_without_a_place_is_said_to_wait_for_one_and_why_it_is_closed() {
    within(async {
        start_log();
        let inbound = inbound("KUBERNETES_PHASE:FULL:0").await;
        let local = inbound.local().to_owned();
        let connection = Connection::new(CreditLimits { streams: 1, ..FIXED });
        let _taken = connection.adaptor.credits.open(&tunnel()).await.unwrap();
        let (_links, seen) = watch::channel(Some(connection.adaptor.clone()));
        tokio::spawn(inbound.serve(seen));
        let _client = TcpStream::connect(&local).await.unwrap();
        let line = said("inbound FULL").await;
        let waits = "INFO: inbound FULL: a client waits for a place among the streams of the connection, ";
        assert!(line.starts_with(waits), "{line}");
        tokio::time::pause();
        let line = said("inbound FULL: closing").await;
        let why = "no place within 30 s: too many open streams on this connection; close some";
        assert_eq!(line, format!("WARN: inbound FULL: closing a client: {why}"));
    })
    .await;
}

/// A link whose first open panics.
#[derive(Clone)]
struct Faulty(Arc<AtomicBool>, MemLink);

impl Link for Faulty {
    type Receiver = MemReceiver;
    type Sender = MemSender;

    async fn open(&self, name: &TunnelName) -> Result<Stream<MemReceiver, MemSender>, OpenError> {
        assert!(self.0.swap(true, Ordering::Relaxed), "a fault of the link");
        self.1.open(name).await
    }

    fn is_gone(&self) -> bool {
        self.1.is_gone()
    }
}

#[tokio::test]
async fn a_panic_costs_one_client_and_is_in_the_log() {
    within(async {
        start_log();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut connection = Connection::new(FIXED);
        let port = server.local_addr().unwrap().port();
        connection.serve(outbounds(&format!("KUBERNETES_PHASE:PANICS:{port}")));
        let inbound = inbound("KUBERNETES_PHASE:PANICS:0").await;
        let local = inbound.local().to_owned();
        let (_links, seen) = watch::channel(Some(Faulty(Arc::default(), connection.adaptor.clone())));
        tokio::spawn(inbound.serve(seen));
        let mut first = TcpStream::connect(&local).await.unwrap();
        assert!(first.read(&mut [0]).await.is_err(), "reset");
        let line = said("inbound PANICS").await;
        assert!(
            line.starts_with("ERROR: inbound PANICS: serving a client: ")
                && line.contains("a fault of the link"),
            "{line}"
        );
        let _second = TcpStream::connect(&local).await.unwrap();
        server.accept().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_inbound_that_a_panic_ends_is_in_the_log() {
    within(async {
        start_log();
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds("KUBERNETES_PHASE:OTHER:1"));
        let inbound = inbound("KUBERNETES_PHASE:DEADLY:0").await;
        let local = inbound.local().to_owned();
        let (_links, seen) = watch::channel(Some(connection.adaptor.clone()));
        let serving = tokio::spawn(inbound.serve(seen));
        let _refused = TcpStream::connect(&local).await.unwrap();
        assert!(serving.await.unwrap_err().is_panic());
        let line = said("inbound DEADLY").await;
        assert_eq!(line, "ERROR: inbound DEADLY: closed by a panic; restart the program, and report the bug");
    })
    .await;
}
