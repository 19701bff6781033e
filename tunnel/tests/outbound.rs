//! Outbounds reach the servers of their phase, and refuse all other names with the reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::time::Duration;

use harness::{Connection, FIXED, accept, quiet, within};
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{Attestation, Kubernetes, OutboundTag, RefusalKind, TunnelName};
use secure_comms_tunnel::{Event, Incoming, Link, OpenError, Outbounds, Receiver, Sender, outbound};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, UnixListener, UnixSocket, UnixStream};

fn name(text: &str) -> TunnelName {
    text.parse().unwrap()
}

fn tags(list: &str) -> Vec<OutboundTag> {
    parse_list(list).unwrap()
}

/// A loopback port without a listener; the socket reserves it.
fn closed_port() -> (TcpSocket, u16) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

async fn refusal(connection: &Connection, asked: &str) -> String {
    match connection.adaptor.open(&name(asked)).await {
        Err(OpenError::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn other_names_than_outbounds_of_the_phase_are_prohibited() {
    let tags = tags("KUBERNETES_PHASE:KATAAGENT:/run/kata, BOTH_PHASES:KBS:8080, ATTESTATION_PHASE:ONLY:1");
    let attestation = Outbounds::<Attestation>::new(&tags);
    let kubernetes = Outbounds::<Kubernetes>::new(&tags);
    for (refused, reason) in [
        (
            attestation.permit("KATAAGENT").err(),
            "tunnel KATAAGENT, Attestation phase: no outbound of this name in this phase",
        ),
        (
            kubernetes.permit("ONLY").err(),
            "tunnel ONLY, Kubernetes phase: no outbound of this name in this phase",
        ),
        (
            kubernetes.permit("nobody").err(),
            "tunnel nobody, Kubernetes phase: no outbound of this name in this phase",
        ),
        (kubernetes.permit("a b\n").err(), "tunnel a b\\n, Kubernetes phase: not a tunnel name"),
        (kubernetes.permit("").err(), "tunnel , Kubernetes phase: not a tunnel name"),
    ] {
        let refusal = refused.unwrap();
        assert_eq!((refusal.kind, refusal.reason.as_str()), (RefusalKind::Prohibited, reason));
    }
    assert!(kubernetes.permit("kataagent").is_ok(), "names have no case");
    let long = attestation.permit(&"x".repeat(30_000)).unwrap_err().reason;
    assert!(long.len() < 200, "what a stranger asks for does not fill the log: {}", long.len());
}

#[tokio::test]
async fn the_other_end_receives_the_reason_of_a_refusal() {
    within(async {
        let (_socket, port) = closed_port();
        let mut connection = Connection::new(CreditLimits { streams: 2, ..FIXED });
        connection.serve(Outbounds::<Kubernetes>::new(&tags(&format!(
            "KUBERNETES_PHASE:DOWN:{port}, KUBERNETES_PHASE:NOSOCKET:/nonexistent/socket, ATTESTATION_PHASE:KBS:1"
        ))));
        for asked in ["KBS", "NOBODY"] {
            let expected = format!("tunnel {asked}, Kubernetes phase: no outbound of this name in this phase");
            assert_eq!(refusal(&connection, asked).await, expected);
        }
        let reason = refusal(&connection, "DOWN").await;
        let expected = format!("tunnel DOWN, Kubernetes phase: connecting to 127.0.0.1:{port}: Connection refused");
        assert!(reason.starts_with(&expected), "{reason}");
        let reason = refusal(&connection, "NOSOCKET").await;
        let expected = "tunnel NOSOCKET, Kubernetes phase: connecting to /nonexistent/socket: No such file";
        assert!(reason.starts_with(expected), "{reason}");
        quiet(|| connection.agent.credits.open_streams()).await;
        assert_eq!(connection.agent.credits.open_streams(), 0);
        assert_eq!(connection.adaptor.credits.open_streams(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_bad_stream_id_and_one_stream_too_many_are_refused() {
    within(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let outbounds = Outbounds::<Kubernetes>::new(&tags(&format!("BOTH_PHASES:T:{port}")));
        let mut connection = Connection::new(CreditLimits { streams: 1, ..FIXED });
        let mut asks = connection.take_asks();
        let hold = accept(&connection.agent.credits, 1).await.unwrap();
        let mut answer = async |id: u32, hold: &mut Option<secure_comms_tunnel::Flow>| {
            let link = connection.adaptor.clone();
            let asked = tokio::spawn(async move { link.open(&name("T")).await.map(|_| ()) });
            let ask = asks.recv().await.unwrap();
            let _hold = hold.take();
            let permit = outbounds.permit(&ask.name).unwrap();
            match permit.admit(&connection.agent.credits) {
                Ok(admitted) => outbound::serve(admitted, id, ask.incoming).await,
                Err(refusal) => ask.incoming.refuse(refusal).await,
            }
            asked.await.unwrap()
        };
        assert_eq!(answer(3, &mut Some(hold)).await, Err(OpenError::Full));
        let bad = "tunnel T, Kubernetes phase: stream id 4 is in use or not the opener's to give";
        assert_eq!(answer(4, &mut None).await, Err(OpenError::Refused(bad.into())));
    })
    .await;
}

#[tokio::test]
async fn a_server_is_reached_by_address_by_name_and_by_path() {
    within(async {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = tcp.local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server");
        let unix = UnixListener::bind(&path).unwrap();
        let mut connection = Connection::new(FIXED);
        connection.serve(Outbounds::<Kubernetes>::new(&tags(&format!(
            "BOTH_PHASES:PORT:{port},BOTH_PHASES:NAME:localhost:{port},BOTH_PHASES:PATH:{}",
            path.display()
        ))));
        for asked in ["PORT", "NAME", "PATH"] {
            let stream = connection.adaptor.open(&name(asked)).await.unwrap();
            let mut server: Box<dyn harness::Io> = if asked == "PATH" {
                Box::new(unix.accept().await.unwrap().0)
            } else {
                Box::new(tcp.accept().await.unwrap().0)
            };
            server.write_all(b"hi").await.unwrap();
            let mut receiver = stream.receiver;
            assert_eq!(receiver.recv().await, Some(Event::Data("hi".into())));
            stream.sender.eof().await.unwrap();
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        }
    })
    .await;
}

#[tokio::test]
async fn an_outbound_with_a_connect_timeout_retries() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late");
        let tag = tags(&format!("KUBERNETES_PHASE:KATAAGENT:{}", path.display()));
        let patient = Outbounds::<Kubernetes>::new(&tag)
            .with_connect_timeout(&TunnelName::kata_agent(), Duration::from_secs(100));
        let mut connection = Connection::new(FIXED);
        connection.serve(patient);
        let link = connection.adaptor.clone();
        let opened = tokio::spawn(async move { link.open(&TunnelName::kata_agent()).await });
        quiet(|| connection.agent.credits.open_streams()).await;
        assert!(!opened.is_finished());
        let server = UnixListener::bind(&path).unwrap();
        server.accept().await.unwrap();
        opened.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_connect_timeout_ends_with_the_last_error() {
    let _watchdog = harness::Watchdog::new();
    let patience = Duration::from_secs(150);
    let outbounds = Outbounds::<Kubernetes>::new(&tags("KUBERNETES_PHASE:KATAAGENT:/nonexistent/socket"))
        .with_connect_timeout(&TunnelName::kata_agent(), patience);
    let start = tokio::time::Instant::now();
    let error = outbounds.permit("KATAAGENT").unwrap().connect().await.unwrap_err().to_string();
    assert!(error.starts_with("connecting to /nonexistent/socket: No such file"), "{error}");
    let waited = start.elapsed();
    assert!(waited <= patience && waited > patience - Duration::from_secs(6), "{waited:?}");
}

#[tokio::test]
async fn a_unix_server_with_a_full_backlog_is_retried() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("busy");
        let socket = UnixSocket::new_stream().unwrap();
        socket.bind(&path).unwrap();
        let busy = socket.listen(1).unwrap();
        let mut waiting = Vec::new();
        while let Ok(client) = UnixStream::connect(&path).await {
            waiting.push(client);
        }
        let outbounds =
            Outbounds::<Kubernetes>::new(&tags(&format!("KUBERNETES_PHASE:T:{}", path.display())));
        let permit = outbounds.permit("T").unwrap();
        let connect = permit.connect();
        let accept = async {
            for _ in 0..waiting.len() {
                busy.accept().await.unwrap();
            }
        };
        let (connected, ()) = tokio::join!(connect, accept);
        connected.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_outbound_stops_dialling_when_the_connection_ends() {
    within(async {
        let outbounds = Outbounds::<Kubernetes>::new(&tags("KUBERNETES_PHASE:KATAAGENT:/nonexistent/socket"))
            .with_connect_timeout(&TunnelName::kata_agent(), Duration::from_secs(3600));
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds);
        let link = connection.adaptor.clone();
        let opened = tokio::spawn(async move { link.open(&TunnelName::kata_agent()).await.map(|_| ()) });
        quiet(|| connection.agent.credits.open_streams()).await;
        assert_eq!(connection.agent.credits.open_streams(), 1);
        connection.kill();
        assert_eq!(opened.await.unwrap(), Err(OpenError::LinkGone));
        while connection.agent.credits.open_streams() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
