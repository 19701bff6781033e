//! The interceptor in a relay: between a stream with credits and a socket.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../tunnel/tests/harness/mod.rs"]
mod harness;
#[path = "../src/kata/messages.rs"]
#[allow(dead_code, reason = "the unit tests use the rest")]
mod messages;

// The modules that messages.rs imports.
use agent_protocol_forwarder::kata::{KataAgent, edit, frame};
use frame::{HEADER, Header, RESPONSE};
use harness::{Connection, FIXED, KERNEL, Raw, quiet, unix, within};
use messages::{CreateContainer, CreateSandbox, Oci, Response, decode, request};
use prost::Message;
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::relay::RelayError;
use secure_comms_tunnel::{Event, Receiver, Sender};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// The type of a data frame.
const DATA: u8 = 3;

fn interceptor() -> KataAgent {
    KataAgent::new(Some("/run/netns/podns"), std::env::temp_dir().to_str().unwrap().parse().unwrap())
}

/// Sends `data` in messages of this length, as credit allows.
async fn send(raw: &Raw, data: &[u8], step: usize) {
    for piece in data.chunks(step) {
        raw.flow.ready().await;
        raw.flow.spend(piece.len());
        raw.send(piece.to_vec()).await;
    }
}

/// The next frame.
async fn next(server: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    server.read_exact(&mut frame).await.unwrap();
    let length = Header::parse(frame[..].try_into().unwrap()).unwrap().length;
    frame.resize(HEADER + length, 0);
    server.read_exact(&mut frame[HEADER..]).await.unwrap();
    frame
}

fn container_of(size: usize) -> Vec<u8> {
    let oci = Oci { later: vec![7; size], ..Oci::default() };
    let container = CreateContainer { oci: Some(oci), ..CreateContainer::default() };
    request(1, "CreateContainer", &container.encode_to_vec())
}

fn bind(source: &std::path::Path, volume: bool) -> Vec<u8> {
    let source = source.to_str().unwrap();
    let container = CreateContainer::with_mounts(&[source], if volume { source } else { "" });
    request(1, "CreateContainer", &container.encode_to_vec())
}

#[tokio::test]
async fn a_request_larger_than_the_window_returns_its_credit_once() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut server, socket) = unix();
        let (relay, mut raw) = connection.raw_through(interceptor(), socket).await;
        let id = raw.flow.id();
        let sandbox = CreateSandbox { dns: vec!["10.0.0.1".into()], ..CreateSandbox::default() };
        let stream = [
            messages::frame(DATA, 3, &[1; 5000]),
            container_of(4_000_000),
            request(5, "CreateSandbox", &sandbox.encode_to_vec()),
            request(7, "WriteStdin", &[2; 1 << 20]),
            messages::frame(DATA, 3, b""),
        ]
        .concat();
        // A length that cuts headers.
        let sending = send(&raw, &stream, 1021);
        let receiving = async {
            let mut frames = Vec::new();
            for _ in 0..5 {
                frames.push(next(&mut server).await);
            }
            frames
        };
        let ((), frames) = tokio::join!(sending, receiving);
        let container = CreateContainer::decode(&*decode(&frames[1]).payload).unwrap();
        assert_eq!(container.namespaces().len(), 1);
        assert_eq!(container.oci.unwrap().later.len(), 4_000_000);
        assert!(CreateSandbox::decode(&*decode(&frames[2]).payload).unwrap().dns.is_empty());
        assert_eq!(frames[3], request(7, "WriteStdin", &[2; 1 << 20]));
        // Credit comes back in batches of half a window: after this many small messages none is withheld.
        let initial = i64::from(FIXED.initial);
        let mut available = 0;
        for _ in 0..FIXED.initial / 512 {
            send(&raw, &messages::frame(DATA, 9, b""), HEADER).await;
            next(&mut server).await;
            quiet(|| connection.meter(Side::Agent, id).available).await;
            available = available.max(connection.meter(Side::Agent, id).available);
        }
        assert_eq!(available, initial);
        raw.sender.eof().await.unwrap();
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        drop(server);
        assert_eq!(raw.receive().await.1, Some(Event::Eof));
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_server_that_takes_nothing_bounds_the_edited_requests_too() {
    within(async {
        let connection = Connection::new(CreditLimits::KUBERNETES);
        let (server, socket) = unix();
        let (relay, raw) = connection.raw_through(interceptor(), socket).await;
        let id = raw.flow.id();
        let container = container_of(100_000);
        let sending = async {
            loop {
                send(&raw, &container, 32 * 1024).await;
            }
        };
        let stalled = async {
            quiet(|| connection.meter(Side::Agent, id).bytes).await;
            connection.meter(Side::Agent, id).bytes
        };
        let sent = tokio::select! {
            sent = stalled => sent,
            () = sending => unreachable!(),
        };
        assert!(sent < KERNEL, "{sent}");
        drop(server);
        relay.abort();
    })
    .await;
}

#[tokio::test]
async fn a_refusal_fits_between_the_frames_of_a_busy_server() {
    within(async {
        let connection = Connection::new(CreditLimits::KUBERNETES);
        let (server, socket) = unix();
        let (_relay, mut raw) = connection.raw_through(interceptor(), socket).await;
        let (mut from, mut to) = server.into_split();
        // No frame ends where a read does.
        let writer = tokio::spawn(async move {
            for round in 0..600_u32 {
                let response = messages::frame(RESPONSE, 2 * round + 1, &vec![5; 50_001]);
                to.write_all(&response).await.unwrap();
            }
            to
        });
        let (mut got, mut refused) = (Vec::new(), false);
        while got.len() < 600 * (HEADER + 50_001) {
            let Some(Event::Data(data)) = raw.receiver.recv().await else { panic!("an end") };
            raw.flow.consumed(raw.flow.arrived(data.len()).unwrap());
            got.extend_from_slice(&data);
            if !std::mem::replace(&mut refused, true) {
                send(&raw, &request(0x7fff_ffff, "CreateContainer", &[0x32, 9]), 1024).await;
            }
        }
        let (mut rest, mut seen, mut refusals) = (&got[..], 0, 0);
        while let Some((header, after)) = rest.split_first_chunk::<HEADER>() {
            let header = Header::parse(*header).unwrap();
            let Some((data, after)) = after.split_at_checked(header.length) else { break };
            if header.stream == 0x7fff_ffff {
                assert_eq!(Response::decode(data).unwrap().status.unwrap().code, 3);
                refusals += 1;
            } else {
                assert_eq!(header.stream, 2 * seen + 1);
                assert!(data.iter().all(|byte| *byte == 5));
                seen += 1;
            }
            rest = after;
        }
        assert_eq!(refusals, 1, "it came long before the last of {seen}");
        drop(writer.await.unwrap());
        raw.sender.eof().await.unwrap();
        assert_eq!(from.read(&mut [0; 64]).await.unwrap(), 0, "the server sees nothing of the request");
    })
    .await;
}

#[tokio::test]
async fn a_held_container_is_dropped_when_its_client_has_gone() {
    within(async {
        let directory = tempfile::tempdir().unwrap();
        let connection = Connection::new(FIXED);
        let (mut server, socket) = unix();
        let (relay, raw) = connection.raw_through(interceptor(), socket).await;
        send(&raw, &bind(directory.path(), true), 1024).await;
        send(&raw, &request(3, "StartContainer", b"c"), 1024).await;
        raw.sender.eof().await.unwrap();
        assert_eq!(decode(&next(&mut server).await).method, "StartContainer");
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        drop(server);
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_held_container_stalls_no_other_request() {
    within(async {
        let directory = tempfile::tempdir().unwrap();
        let connection = Connection::new(FIXED);
        let ((mut one, one_socket), (mut two, two_socket)) = (unix(), unix());
        let (relay, first) = connection.raw_through(interceptor(), one_socket).await;
        let (_relay, second) = connection.raw_through(interceptor(), two_socket).await;
        send(&first, &bind(directory.path(), true), 1024).await;
        for round in 0..20_u32 {
            let frame = request(2 * round + 3, "StartContainer", b"c");
            for (raw, server) in [(&first, &mut one), (&second, &mut two)] {
                send(raw, &frame, 20).await;
                assert_eq!(next(server).await, frame);
            }
        }
        first.sender.close().await.unwrap();
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Cut)));
        assert_eq!(one.read(&mut [0]).await.unwrap(), 0, "the request that waited is gone");
    })
    .await;
}

#[tokio::test]
async fn a_pods_connection_that_is_lost_says_what_that_costs() {
    within(async {
        let connection = Connection::new(FIXED);
        let (server, socket) = unix();
        let (relay, raw) = connection.raw_through(interceptor(), socket).await;
        send(&raw, &request(1, "CreateSandbox", b""), 1024).await;
        raw.sender.close().await.unwrap();
        let text = relay.await.unwrap().unwrap_err().to_string();
        assert_eq!(
            text,
            "the other end closed the stream before its end; a runtime connection was lost: the pod will end"
        );
        drop(server);
    })
    .await;
}

#[tokio::test]
async fn a_bad_frame_on_either_side_ends_the_tunnel_with_a_reason() {
    within(async {
        // A type that ttrpc does not have.
        let too_long = Header { length: (4 << 20) + 1, stream: 1, kind: 4, flags: 0 }.to_bytes();
        let cut = &messages::frame(DATA, 1, b"data")[..12];
        for (bytes, text) in [
            (
                &too_long[..],
                "reading ttrpc frames: a header announces 4194305 bytes, and a frame has at most 4194304;",
            ),
            (cut, "reading ttrpc frames: the stream ended 2 bytes before the end of a frame;"),
        ] {
            for from_client in [true, false] {
                let connection = Connection::new(FIXED);
                let (mut server, socket) = unix();
                let (relay, mut raw) = connection.raw_through(interceptor(), socket).await;
                if from_client {
                    raw.send(bytes.to_vec()).await;
                    raw.sender.eof().await.unwrap();
                } else {
                    server.write_all(bytes).await.unwrap();
                    server.shutdown().await.unwrap();
                }
                let error = relay.await.unwrap().unwrap_err();
                assert!(matches!(error, RelayError::Intercept(_)));
                assert!(error.to_string().starts_with(text), "{error}");
                assert_eq!(raw.receive().await.1, Some(Event::Close), "no EOF before it");
                drop(raw.flow);
                assert_eq!(connection.adaptor.credits.open_streams(), 0);
            }
        }
    })
    .await;
}
