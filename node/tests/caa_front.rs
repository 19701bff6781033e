//! The port of cloud-api-adaptor's dials, in network namespaces with the redirect, and the relay behind it. Needs root and nft.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "caa_front/scene.rs"]
mod scene;

#[path = "caa_front/relaying.rs"]
mod relaying;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use rcgen::KeyPair;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use secure_comms_node::caa::front::{Closed, FinishError, FrontLimits, Refusal, Side, relay};
use secure_comms_node::metrics::Form;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use scene::{Client, Keys, NAME, PATIENCE, Scene, VM, VM_V6, client_certificate, in_namespace, read_to_end};

async fn answered(client: Client, address: &'static str, scene: &mut Scene, keys: &Keys) {
    let dial = tokio::spawn(client.connect(address));
    let held = scene.held().await;
    assert_eq!((held.server_name.as_str(), held.vm), (NAME, address.parse().unwrap()));
    let finished = held.finish(&keys.server).await.unwrap();
    let mut client = dial.await.unwrap().unwrap();
    let (ours, mut pod) = UnixStream::pair().unwrap();
    let relay = tokio::spawn(relay(finished, ours));
    client.write_all(b"Check").await.unwrap();
    let mut request = [0; 5];
    pod.read_exact(&mut request).await.unwrap();
    assert_eq!(&request, b"Check");
    pod.write_all(b"SERVING").await.unwrap();
    let mut answer = [0; 7];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"SERVING");
    client.shutdown().await.unwrap();
    assert_eq!(pod.read(&mut request).await.unwrap(), 0, "the end is passed on");
    drop(pod);
    let end = relay.await.unwrap();
    assert_eq!((end.by, end.to_vm, end.from_vm), (Side::Runtime, 5, 7), "{end:?}");
}

#[test]
fn a_dial_is_held_finished_and_relayed() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        answered(keys.client(), VM, &mut scene, &keys).await;
        answered(keys.client().tls12(), VM, &mut scene, &keys).await;
        answered(keys.client(), VM_V6, &mut scene, &keys).await;
        answered(Client { name: Some("PodVM-nginx-0A1B2C3D"), ..keys.client() }, VM, &mut scene, &keys).await;
        scene.stop.send(true).unwrap();
        scene.task.await.unwrap();
    });
}

#[test]
fn a_held_connection_gets_no_answer() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let stream = TcpStream::connect(VM).await.unwrap();
        let std = stream.into_std().unwrap();
        let peek = TcpStream::from_std(std.try_clone().unwrap()).unwrap();
        let dial = tokio::spawn(keys.client().handshake(TcpStream::from_std(std).unwrap()));
        let held = scene.held().await;
        assert_eq!(peek.try_read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
        held.refuse_with(Refusal::UnknownPod, "it is unknown");
        assert_eq!(dial.await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(scene.refused("unknown_pod"), 1);
    });
}

#[test]
fn a_hello_may_come_in_any_pieces() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        for (padding, segment) in [(0, 1), (1300, 700), (1300, 1), (12_000, 1448), (12_000, usize::MAX)] {
            let client = Client { padding, segment, ..keys.client() };
            let dial = tokio::spawn(client.connect_in_segments(VM));
            let held = scene.held().await;
            held.finish(&keys.server).await.unwrap();
            dial.await.unwrap().unwrap();
        }
    });
}

/// RFC 8446, 5.1: a message may be cut into any number of records.
#[test]
fn a_hello_may_come_in_any_records() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let hello = hello(keys.client()).await;
        for size in [1, 5, 6, 100] {
            let cut = |part: &[u8]| [&[22, 3, 1, 0, u8::try_from(part.len()).unwrap()], part].concat();
            let records: Vec<u8> = hello[5..].chunks(size).flat_map(cut).collect();
            let mut stream = TcpStream::connect(VM).await.unwrap();
            stream.write_all(&records).await.unwrap();
            drop(scene.held().await);
        }
    });
}

#[test]
fn another_client_certificate_is_refused() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (certificate, key) = client_certificate();
        let other =
            Client { certificate: Some((certificate.der().clone(), key.serialize_der())), ..keys.client() };
        for client in [other.clone(), other.tls12()] {
            let dial = tokio::spawn(client.connect(VM));
            let error = scene.held().await.finish(&keys.server).await.unwrap_err();
            assert!(matches!(error, FinishError::OtherClientCertificate), "{error:?}");
            fails(dial.await.unwrap()).await;
        }
        assert_eq!(scene.refused("other_client_certificate"), 2);
    });
}

/// The certificate of the pod's client, but a signature by another key.
#[test]
fn a_stolen_client_certificate_is_refused() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (certificate, _) = keys.client().certificate.unwrap();
        let key = client_certificate().1.serialize_der();
        let thief = Client { certificate: Some((certificate, key)), ..keys.client() };
        for client in [thief.clone(), thief.tls12()] {
            let dial = tokio::spawn(client.connect(VM));
            let error = scene.held().await.finish(&keys.server).await.unwrap_err();
            assert!(matches!(error, FinishError::Tls(_)), "{error:?}");
            fails(dial.await.unwrap()).await;
        }
        assert_eq!(scene.refused("handshake"), 2);
    });
}

/// In TLS 1.3 a client learns of its refusal when it reads.
async fn fails(dial: std::io::Result<tokio_rustls::client::TlsStream<TcpStream>>) {
    if let Ok(mut stream) = dial {
        stream.read(&mut [0; 1]).await.unwrap_err();
    }
}

#[test]
fn a_client_without_certificate_is_refused() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let nobody = Client { certificate: None, ..keys.client() };
        for client in [nobody.clone(), nobody.tls12()] {
            let dial = tokio::spawn(client.connect(VM));
            let error = scene.held().await.finish(&keys.server).await.unwrap_err();
            assert!(matches!(error, FinishError::NoClientCertificate), "{error:?}");
            fails(dial.await.unwrap()).await;
        }
        assert_eq!(scene.refused("no_client_certificate"), 2);
    });
}

#[test]
fn keys_that_do_not_fit_end_no_handshake() {
    in_namespace(|| async {
        let (mut scene, mut keys) = (Scene::new().await, Keys::new());
        let key = KeyPair::generate().unwrap().serialize_der();
        for broken in [key, b"no key".to_vec()] {
            let (dial, held) = scene.dial(&keys).await;
            keys.server.key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(broken));
            let error = held.finish(&keys.server).await.unwrap_err();
            assert!(matches!(error, FinishError::Identity(_)), "{error:?}");
            assert_eq!(dial.await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        keys.server = Keys::new().server;
        keys.server.certificate = b"no certificate".as_slice().to_vec().into();
        let (_dial, held) = scene.dial(&keys).await;
        let error = held.finish(&keys.server).await.unwrap_err();
        assert!(matches!(error, FinishError::Identity(_)), "{error:?}");
        keys.server = Keys::new().server;
        keys.server.server_name = "podvm-other-0a1b2c3d".to_owned();
        let (_dial, held) = scene.dial(&keys).await;
        let error = held.finish(&keys.server).await.unwrap_err();
        assert!(matches!(error, FinishError::OtherName { .. }), "{error:?}");
        assert_eq!(scene.refused("bad_identity"), 4);
    });
}

#[test]
fn a_server_certificate_that_the_client_refuses_is_an_error() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let mut others = Keys::new();
        others.server.client = keys.server.client.clone();
        let (dial, held) = scene.dial(&keys).await;
        let error = held.finish(&others.server).await.unwrap_err();
        assert!(matches!(&error, FinishError::Refused(_)), "{error:?}");
        assert!(dial.await.unwrap().is_err());
    });
}

#[test]
fn a_client_that_does_not_go_on_is_given_up() {
    in_namespace(|| async {
        let limits = FrontLimits { finish_time: Duration::from_secs(2), ..FrontLimits::default() };
        let (mut scene, keys) = (Scene::with(limits).await, Keys::new());
        let (mut stream, held) = hello_only(&mut scene, &keys).await;
        let error = held.finish(&keys.server).await.unwrap_err();
        assert!(matches!(error, FinishError::Timeout(_)), "{error:?}");
        let (bytes, _) = read_to_end(&mut stream).await;
        assert!(!bytes.is_empty(), "it had our part of the handshake");
        assert_eq!(scene.refused("handshake_timeout"), 1);
    });
}

/// A connection of which a client has sent its hello, and goes on by hand.
async fn hello_only(scene: &mut Scene, keys: &Keys) -> (TcpStream, secure_comms_node::caa::front::Held) {
    let mut stream = TcpStream::connect(VM).await.unwrap();
    stream.write_all(&hello(keys.client()).await).await.unwrap();
    let held = scene.held().await;
    (stream, held)
}

/// The bytes of a client's hello.
async fn hello(client: Client) -> Vec<u8> {
    let (ours, mut theirs) = tokio::io::duplex(32 * 1024);
    let handshake = tokio::spawn(client.handshake(ours));
    let mut bytes = vec![0; 5];
    theirs.read_exact(&mut bytes).await.unwrap();
    let length = usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
    bytes.resize(5 + length, 0);
    theirs.read_exact(&mut bytes[5..]).await.unwrap();
    handshake.abort();
    bytes
}

#[test]
fn the_end_of_a_held_connection_is_seen() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        for more in [0, 1, 100_000] {
            let (mut stream, mut held) = hello_only(&mut scene, &keys).await;
            stream.write_all(&vec![0; more]).await.unwrap();
            drop(stream);
            assert_eq!(timeout(PATIENCE, held.closed()).await.unwrap(), Closed::ByClient, "{more}");
        }
        for more in [0, 1, 100_000] {
            let (mut stream, mut held) = hello_only(&mut scene, &keys).await;
            stream.write_all(&vec![0; more]).await.unwrap();
            stream.set_zero_linger().unwrap();
            drop(stream);
            assert_eq!(timeout(PATIENCE, held.closed()).await.unwrap(), Closed::Reset, "{more}");
        }
    });
}

#[test]
fn bytes_after_the_hello_are_part_of_the_handshake() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (mut stream, mut held) = hello_only(&mut scene, &keys).await;
        stream.write_all(b"garbage, that is no TLS record").await.unwrap();
        // They end nothing as long as the connection is held.
        let closed = tokio::select! {
            biased;
            closed = held.closed() => Some(closed),
            () = tokio::task::yield_now() => None,
        };
        assert_eq!(closed, None);
        let error = held.finish(&keys.server).await.unwrap_err();
        assert!(matches!(error, FinishError::Tls(_)), "{error:?}");
    });
}

#[test]
fn a_burst_of_dials_for_a_name_leaves_the_first_one() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (dial, first) = scene.dial(&keys).await;
        let mut burst = Vec::new();
        for _ in 0..5 {
            burst.push(hello_only(&mut scene, &keys).await);
        }
        let (_, second) = burst.first_mut().unwrap();
        assert_eq!(timeout(PATIENCE, second.closed()).await.unwrap(), Closed::Superseded);
        assert_eq!(scene.refused("superseded"), 1, "the other one was not looked at");
        first.finish(&keys.server).await.unwrap();
        dial.await.unwrap().unwrap();
    });
}

#[test]
fn too_many_held_connections_are_refused() {
    in_namespace(|| async {
        let limits = FrontLimits { held: 2, ..FrontLimits::default() };
        let (mut scene, keys) = (Scene::with(limits).await, Keys::new());
        let (_first, first) = hello_only(&mut scene, &keys).await;
        let (_second, second) = hello_only(&mut scene, &keys).await;
        first.recognise();
        second.recognise();
        let error = keys.client().connect(VM).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(scene.refused("too_many_held"), 1);
        drop(first);
        scene.dial(&keys).await.1.finish(&keys.server).await.unwrap();
    });
}

/// What is no dial of cloud-api-adaptor's, what it gets, and the word for it.
#[test]
fn whatever_else_is_refused_with_a_reason() {
    in_namespace(|| async {
        let limits = FrontLimits { hello_time: Duration::from_secs(3), ..FrontLimits::default() };
        let (scene, keys) = (Scene::with(limits).await, Keys::new());
        let hello = hello(keys.client()).await;
        let mut tls11 = hello.clone();
        tls11[9..11].copy_from_slice(&[3, 2]);
        let mut bent = hello.clone();
        bent[5 + 4 + 2 + 32] = 99;
        let mut long = vec![22, 3, 1, 0x40, 0, 1, 0, 0xf0, 0, 3, 3];
        long.resize(40_000, 0);
        let reset = Some(ErrorKind::ConnectionReset);
        // They wait for the limit while the others are refused.
        let mut late = Vec::new();
        for bytes in [&hello[..hello.len() - 1], b""] {
            let mut stream = TcpStream::connect(VM).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            late.push(stream);
        }
        let cases: [(&[u8], &str, Option<ErrorKind>); 7] = [
            (b"GET / HTTP/1.1\r\nHost: vm\r\n\r\n", "not_tls", reset),
            (b"SSH-2.0-OpenSSH_9.9\r\n", "not_tls", reset),
            (b"\0\0\0\x10\0\0\0\x01\x01\0", "not_tls", reset),
            (b"\x80\x2e\x01\x03\x01\0\x15", "not_tls", reset),
            (&tls11, "tls_version", None),
            (&bent, "bad_hello", None),
            (&long, "hello_too_long", reset),
        ];
        for (bytes, word, how) in cases {
            let before = scene.refused(word);
            let mut stream = TcpStream::connect(VM).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let (answer, end) = read_to_end(&mut stream).await;
            assert_eq!(
                scene.refused(word),
                before + 1,
                "{word}: {}",
                scene.metrics.counters(Form::Prometheus).unwrap()
            );
            assert_eq!((end, answer.is_empty()), (how, how.is_some()), "{word}");
            if how.is_none() {
                assert_eq!(answer[0], 21, "a TLS alert");
            }
        }
        for mut stream in late {
            assert_eq!(read_to_end(&mut stream).await, (vec![], reset));
        }
        assert_eq!(scene.refused("hello_timeout"), 2);

        let error = Client { name: None, ..keys.client() }.connect(VM).await.unwrap_err();
        assert_eq!((error.kind(), scene.refused("no_server_name")), (ErrorKind::ConnectionReset, 1));

        let mut scanner = TcpStream::connect(VM).await.unwrap();
        scanner.shutdown().await.unwrap();
        read_to_end(&mut scanner).await;
        assert_eq!(scene.refused("closed_early"), 1);

        for direct in ["127.0.0.1", "[::1]"] {
            let mut direct = TcpStream::connect(format!("{direct}:{}", scene.port)).await.unwrap();
            assert_eq!(read_to_end(&mut direct).await, (vec![], reset));
        }
        assert_eq!(scene.refused("not_redirected"), 2);
    });
}

/// A local process dials, says nothing and stays.
#[test]
fn ten_thousand_dials_keep_no_pod_from_starting() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let flood = tokio::spawn(async {
            let mut open = VecDeque::new();
            for index in 0..10_000_u32 {
                open.push_back(TcpStream::connect(VM).await.unwrap());
                if open.len() > 2000 {
                    open.pop_front();
                }
                if index % 20 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            open
        });
        let mut times = Vec::new();
        while !flood.is_finished() {
            let began = Instant::now();
            let (dial, held) = scene.dial(&keys).await;
            held.finish(&keys.server).await.unwrap();
            dial.await.unwrap().unwrap();
            times.push(began.elapsed());
        }
        times.sort();
        println!("{} dials of a pod, slowest {:?}", times.len(), times.last());
        assert!(times.len() > 1);
        let open = flood.await.unwrap();
        let held: usize = open
            .iter()
            .filter(|stream| stream.try_read(&mut [0; 1]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock))
            .count();
        assert!(held <= 256, "{held} are still open");
    });
}

/// `cargo test -p secure-comms-node --test caa_front -- --ignored --nocapture`
#[test]
#[ignore = "prints numbers"]
fn how_long_the_end_of_a_handshake_takes() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let mut times = Vec::new();
        for _ in 0..500 {
            let (dial, held) = scene.dial(&keys).await;
            let began = Instant::now();
            held.finish(&keys.server).await.unwrap();
            dial.await.unwrap().unwrap();
            times.push(began.elapsed());
        }
        times.sort();
        println!("finish, both ends: p50 {:?}, p99 {:?}, most {:?}", times[250], times[495], times[499]);
    });
}
