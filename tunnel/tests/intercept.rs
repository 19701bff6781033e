//! Interceptors inspect bytes, hold pieces back, inject their own, and cost a peer no credit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use harness::{Connection, FIXED, quiet, tcp, within};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{Kubernetes, OutboundTag};
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::intercept::{FromServer, InterceptError, Interceptor, ToServer};
use secure_comms_tunnel::relay::RelayError;
use secure_comms_tunnel::{Event, Link, Outbounds, Receiver, Sender};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// Splits messages at `|`, and keeps a part without one. Holds the part `hold` back until `go` is notified, and fails at
/// the part `break`. After the part `stop` nothing passes in either direction. In the other direction it injects `wake`
/// between two lines when `wake` is notified.
#[derive(Clone, Debug, Default)]
struct Parts {
    go: Arc<Notify>,
    wake: Arc<Notify>,
    stopped: Arc<AtomicBool>,
}

struct To {
    go: Arc<Notify>,
    wake: Arc<Notify>,
    stopped: Arc<AtomicBool>,
    kept: Vec<u8>,
    held: Vec<Bytes>,
}

struct From {
    wake: Arc<Notify>,
    stopped: Arc<AtomicBool>,
    between: bool,
    woken: bool,
    done: bool,
}

impl Interceptor for Parts {
    type ToServer = To;
    type FromServer = From;

    fn begin(&self) -> (To, From) {
        (
            To {
                go: self.go.clone(),
                wake: self.wake.clone(),
                stopped: self.stopped.clone(),
                kept: vec![],
                held: vec![],
            },
            From {
                wake: self.wake.clone(),
                stopped: self.stopped.clone(),
                between: true,
                woken: false,
                done: false,
            },
        )
    }
}

impl ToServer for To {
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        for byte in message {
            if byte != b'|' {
                self.kept.push(byte);
                continue;
            }
            match Bytes::from(std::mem::take(&mut self.kept)) {
                part if part == "hold" => self.held.push(part),
                part if part == "stop" => {
                    self.stopped.store(true, Relaxed);
                    self.wake.notify_one();
                    return Ok(());
                }
                part if part == "break" => return Err("reading parts: this one breaks".into()),
                part => out(part),
            }
        }
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        if self.kept.is_empty() { Ok(()) } else { Err("reading parts: the last one has no end".into()) }
    }

    fn has_pending(&self) -> bool {
        !self.held.is_empty()
    }

    async fn next_released(&mut self) -> Result<Option<Bytes>, InterceptError> {
        self.go.notified().await;
        Ok(self.held.pop())
    }

    fn is_finished(&self) -> bool {
        self.stopped.load(Relaxed)
    }
}

impl FromServer for From {
    fn on_data(&mut self, data: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        self.between = data.ends_with(b"\n");
        if data.contains(&b'!') {
            return Err("reading lines: a bad one".into());
        }
        // A tilde is dropped.
        data.split(|byte| *byte == b'~').for_each(|piece| out(data.slice_ref(piece)));
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        if self.between { Ok(()) } else { Err("reading lines: the last one has no end".into()) }
    }

    fn read_limit(&self) -> usize {
        if self.woken { 1 } else { usize::MAX }
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        let piece = (self.between && std::mem::take(&mut self.woken)).then(|| Bytes::from("wake\n"));
        self.done |= piece.is_some() && self.stopped.load(Relaxed);
        piece
    }

    async fn injection_ready(&mut self) {
        self.wake.notified().await;
        self.woken = true;
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}

#[tokio::test]
async fn kept_bytes_return_credit_once_and_held_ones_precede_eof() {
    within(async {
        let (connection, parts) = (Connection::new(FIXED), Parts::default());
        let (mut server, socket) = tcp().await;
        let (relay, raw) = connection.raw_through(parts.clone(), socket).await;
        let id = raw.flow.id();
        // A batch of credit is half a window: this number of messages leaves no credit withheld.
        let messages = FIXED.initial as usize / 512;
        for round in 0..messages {
            raw.flow.ready().await;
            raw.flow.spend(10);
            raw.send(["a|b|c|dddd", "|hold|eeee", "ffffffffff", "|g|h|iiii|"][round % 4]).await;
        }
        let mut got = vec![0; messages / 4 * 25];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(got, b"abcddddeeeeffffffffffghiiii".repeat(messages / 4)[..got.len()]);
        quiet(|| connection.meter(Side::Agent, id).available).await;
        assert_eq!(connection.meter(Side::Agent, id).available, i64::from(FIXED.initial));
        raw.sender.eof().await.unwrap();
        let mut rest = vec![0; messages / 4 * 27 - got.len()];
        server.read_exact(&mut rest).await.unwrap();
        for _ in 0..messages / 4 {
            parts.go.notify_one();
            server.read_exact(&mut [0; 4]).await.unwrap();
        }
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        drop(server);
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_injected_piece_waits_for_a_boundary() {
    within(async {
        let (connection, parts) = (Connection::new(FIXED), Parts::default());
        let (mut server, socket) = tcp().await;
        let (relay, mut raw) = connection.raw_through(parts.clone(), socket).await;
        let next = async |raw: &mut harness::Raw| match raw.receiver.recv().await {
            Some(Event::Data(data)) => data,
            other => panic!("{other:?}"),
        };
        parts.wake.notify_one();
        assert_eq!(next(&mut raw).await, "wake\n");
        server.write_all(b"abc").await.unwrap();
        assert_eq!(next(&mut raw).await, "abc");
        parts.wake.notify_one();
        quiet(|| connection.meter(Side::Adaptor, raw.flow.id()).messages).await;
        server.write_all(b"d\ne\n").await.unwrap();
        server.shutdown().await.unwrap();
        raw.sender.eof().await.unwrap();
        assert_eq!(raw.receive().await, (b"d\nwake\ne\n".to_vec(), Some(Event::Eof)));
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_interceptor_that_is_finished_ends_both_directions_in_order() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut server, socket) = tcp().await;
        let (relay, mut raw) = connection.raw_through(Parts::default(), socket).await;
        raw.send("a|b|stop|c|").await;
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"ab");
        // The server is still there and sends nothing; the injected piece is the last one.
        assert_eq!(raw.receive().await, (b"wake\n".to_vec(), Some(Event::Eof)));
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn bytes_of_the_server_may_be_dropped() {
    within(async {
        let (connection, parts) = (Connection::new(FIXED), Parts::default());
        let (mut server, socket) = tcp().await;
        let (relay, mut raw) = connection.raw_through(parts.clone(), socket).await;
        let lines = "~~one~two~\n".repeat(5);
        let writing = async {
            server.write_all(lines.as_bytes()).await.unwrap();
            server.shutdown().await.unwrap();
        };
        raw.sender.eof().await.unwrap();
        let ((), (got, end)) = tokio::join!(writing, raw.receive());
        assert_eq!((got, end), ("onetwo\n".repeat(5).into_bytes(), Some(Event::Eof)));
        relay.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_intercept_error_resets_the_server_and_closes() {
    within(async {
        for (from_server, text) in [
            (None, "reading parts: this one breaks"),
            (Some(&b"a\n!"[..]), "reading lines: a bad one"),
            (Some(b"a\nb"), "reading lines: the last one has no end"),
        ] {
            let connection = Connection::new(FIXED);
            let (mut server, socket) = tcp().await;
            let (relay, mut raw) = connection.raw_through(Parts::default(), socket).await;
            if let Some(data) = from_server {
                server.write_all(data).await.unwrap();
                server.shutdown().await.unwrap();
            } else {
                raw.send("a|break|b|").await;
            }
            let error = relay.await.unwrap().unwrap_err();
            assert!(matches!(error, RelayError::Intercept(_)));
            assert_eq!(error.to_string(), text);
            assert_eq!(raw.receive().await.1, Some(Event::Close), "no EOF before it");
            let error = server.read_to_end(&mut vec![]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        let connection = Connection::new(FIXED);
        let (_server, socket) = tcp().await;
        let (relay, raw) = connection.raw_through(Parts::default(), socket).await;
        raw.send("half of").await;
        raw.sender.eof().await.unwrap();
        let error = relay.await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "reading parts: the last one has no end");
    })
    .await;
}

#[tokio::test]
async fn an_interceptor_sees_only_the_bytes_of_its_tunnel() {
    within(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let list = format!("BOTH_PHASES:PARTS:{port},BOTH_PHASES:OTHER:{port}");
        let tags: Vec<OutboundTag> = parse_list(&list).unwrap();
        let outbounds = Outbounds::<Kubernetes>::new(&tags);
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds.with_interceptor("PARTS".parse().unwrap(), Parts::default()));
        for (asked, expected) in [("PARTS", "ab"), ("OTHER", "a|b|"), ("PARTS", "ab")] {
            let stream = connection.adaptor.open(&asked.parse().unwrap()).await.unwrap();
            let mut server = listener.accept().await.unwrap().0;
            stream.sender.send("a|b|".into()).await.unwrap();
            stream.sender.eof().await.unwrap();
            let mut got = String::new();
            server.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, expected);
        }
    })
    .await;
}
