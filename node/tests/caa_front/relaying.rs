//! The relay between cloud-api-adaptor and a pod's stream.

use std::io::ErrorKind;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use secure_comms_node::caa::front::{RelayEnd, Side, relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use crate::scene::{Keys, PATIENCE, Scene, in_namespace};

/// A relay and both its ends.
struct Relayed {
    caa: TlsStream<TcpStream>,
    pod: UnixStream,
    relay: JoinHandle<RelayEnd>,
}

impl Relayed {
    async fn new(scene: &mut Scene, keys: &Keys) -> Self {
        let (dial, held) = scene.dial(keys).await;
        let stream = held.finish(&keys.server).await.unwrap();
        let (ours, pod) = UnixStream::pair().unwrap();
        Self { caa: dial.await.unwrap().unwrap(), pod, relay: tokio::spawn(relay(stream, ours)) }
    }
}

async fn ended(relay: JoinHandle<RelayEnd>) -> RelayEnd {
    timeout(PATIENCE, relay).await.expect("the relay ends").unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

#[test]
fn bulk_data_goes_both_ways_at_once() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { caa, pod, relay } = Relayed::new(&mut scene, &keys).await;
        let data = pattern(8 << 20);
        let (mut from_caa, mut to_caa) = tokio::io::split(caa);
        let (mut from_pod, mut to_pod) = pod.into_split();
        let (mut at_pod, mut at_caa) = (Vec::new(), Vec::new());
        let up = async {
            to_caa.write_all(&data).await.unwrap();
            to_caa.shutdown().await.unwrap();
        };
        let down = async {
            to_pod.write_all(&data).await.unwrap();
            to_pod.shutdown().await.unwrap();
        };
        let (_, _, up_read, down_read) =
            tokio::join!(up, down, from_pod.read_to_end(&mut at_pod), from_caa.read_to_end(&mut at_caa));
        up_read.unwrap();
        down_read.unwrap();
        assert!(at_pod == data && at_caa == data);
        let end = ended(relay).await;
        assert_eq!((end.to_vm, end.from_vm), (8 << 20, 8 << 20));
    });
}

/// Each side may end its direction first, and gets what the other has still to say.
#[test]
fn the_end_of_one_direction_leaves_the_other() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { mut caa, mut pod, relay } = Relayed::new(&mut scene, &keys).await;
        caa.shutdown().await.unwrap();
        assert_eq!(pod.read(&mut [0; 1]).await.unwrap(), 0);
        pod.write_all(b"last words").await.unwrap();
        drop(pod);
        let mut got = Vec::new();
        caa.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"last words");
        let end = ended(relay).await;
        assert_eq!((end.by, end.from_vm), (Side::Runtime, 10), "{end:?}");

        let Relayed { mut caa, mut pod, relay } = Relayed::new(&mut scene, &keys).await;
        pod.shutdown().await.unwrap();
        assert_eq!(caa.read(&mut [0; 1]).await.unwrap(), 0, "with a close_notify");
        caa.write_all(b"last words").await.unwrap();
        caa.shutdown().await.unwrap();
        let mut got = Vec::new();
        pod.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"last words");
        let end = ended(relay).await;
        assert_eq!((end.by, end.to_vm), (Side::Pod, 10), "{end:?}");
    });
}

#[test]
fn a_relay_ends_when_one_side_is_gone() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { caa, mut pod, relay } = Relayed::new(&mut scene, &keys).await;
        caa.get_ref().0.set_zero_linger().unwrap();
        drop(caa);
        let end = ended(relay).await;
        assert_eq!((end.by, end.reason.as_str()), (Side::Runtime, "it reset the connection"));
        assert_eq!(pod.read(&mut [0; 1]).await.unwrap(), 0);

        let Relayed { caa, pod: _pod, relay } = Relayed::new(&mut scene, &keys).await;
        // Without a close_notify, as when its process is killed.
        drop(caa);
        let end = ended(relay).await;
        assert_eq!(
            (end.by, end.reason.as_str()),
            (Side::Runtime, "it closed the connection without a TLS close_notify")
        );

        let Relayed { mut caa, pod, relay } = Relayed::new(&mut scene, &keys).await;
        drop(pod);
        assert_eq!(caa.read(&mut [0; 1]).await.unwrap(), 0, "with a close_notify");
        drop(caa);
        assert_eq!(ended(relay).await.by, Side::Pod);
    });
}

/// The runtime has closed long before the pod has taken all.
#[test]
fn a_slow_pod_gets_all_that_was_sent() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { mut caa, mut pod, relay } = Relayed::new(&mut scene, &keys).await;
        let data = pattern(1 << 20);
        let sending = data.clone();
        let sent = tokio::spawn(async move {
            caa.write_all(&sending).await.unwrap();
            caa.shutdown().await.unwrap();
            caa
        });
        let mut got = Vec::<u8>::new();
        let mut piece = vec![0; 4096];
        loop {
            // Others run first, so that the relay waits for the pod each time.
            tokio::task::yield_now().await;
            match pod.read(&mut piece).await.unwrap() {
                0 => break,
                count => got.extend(&piece[..count]),
            }
        }
        assert!(got == data);
        drop((pod, sent));
        assert_eq!(ended(relay).await.to_vm, 1 << 20);
    });
}

/// The pod takes nothing: its VM is cut off.
#[test]
fn the_runtimes_end_is_seen_while_the_pod_takes_nothing() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (dial, held) = scene.dial(&keys).await;
        let stream = held.finish(&keys.server).await.unwrap();
        let mut caa = dial.await.unwrap().unwrap();
        let (ours, _pod) = UnixStream::pair().unwrap();
        // The kernel doubles this, and has at least some 4 KiB.
        setsockopt(&ours, sockopt::SndBuf, &1).unwrap();
        let relay = tokio::spawn(relay(stream, ours));
        // More than the pod has room for, and less than fits into the TCP connection besides.
        caa.write_all(&pattern(40_000)).await.unwrap();
        caa.flush().await.unwrap();
        drop(caa);
        let end = ended(relay).await;
        assert_eq!((end.by, end.reason.as_str()), (Side::Runtime, "it closed the connection"));
        assert!(end.to_vm < 40_000, "{end:?}");
    });
}

#[test]
fn data_of_a_pod_is_not_read_ahead() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { caa, pod, relay } = Relayed::new(&mut scene, &keys).await;
        pod.writable().await.unwrap();
        let data = vec![0; 1 << 20];
        let mut sent = 0;
        // Until nothing goes on for a while: then the runtime's socket and the pod's are full.
        while timeout(Duration::from_secs(1), pod.writable()).await.is_ok() {
            sent += pod.try_write(&data).unwrap_or_default();
        }
        assert!(sent < 64 << 20, "{sent} bytes are under way");
        drop(caa);
        assert_eq!(ended(relay).await.by, Side::Runtime);
    });
}

#[test]
fn garbage_in_the_tls_stream_ends_the_relay() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let Relayed { caa, mut pod, relay } = Relayed::new(&mut scene, &keys).await;
        let (mut raw, _) = caa.into_inner();
        raw.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let end = ended(relay).await;
        assert_eq!((end.by, end.to_vm), (Side::Runtime, 0), "{end:?}");
        assert!(end.reason.starts_with("the connection is broken: "), "{end:?}");
        assert_eq!(pod.read(&mut [0; 1]).await.unwrap(), 0);
        let mut rest = Vec::new();
        let got = raw.read_to_end(&mut rest).await;
        assert!(got.is_ok() || got.unwrap_err().kind() == ErrorKind::ConnectionReset);
    });
}
