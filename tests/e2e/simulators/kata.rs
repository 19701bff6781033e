//! The simulated kata agent, and the clients that check every byte.

use std::path::Path;
use std::time::Duration;

use secure_comms_tests::harness::process::{Child, ensure_built};
use secure_comms_tests::simulators::kata::KataAgent;
use secure_comms_tests::simulators::kata::client::{
    EchoSession, bulk_both_ways, echo_roundtrip, open_stall, read_source, write_pattern, write_sink,
};
use secure_comms_tests::simulators::kata::framed::Framed;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;

const SOON: Duration = Duration::from_secs(10);
/// Not a multiple of any buffer.
const MUCH: u64 = 5_000_001;

async fn tcp() -> (KataAgent, TcpStream) {
    let kata = KataAgent::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let stream = TcpStream::connect(kata.addr().unwrap()).await.unwrap();
    (kata, stream)
}

/// The kata agent's clients speak in ttrpc frames.
async fn framed(path: &Path) -> Framed<UnixStream> {
    Framed::new(UnixStream::connect(path).await.unwrap())
}

#[tokio::test]
async fn an_echo_is_verified_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kata.sock");
    std::fs::write(&path, "stale").unwrap();
    let kata = KataAgent::unix(&path).unwrap();
    let mut stream = framed(&path).await;
    echo_roundtrip(&mut stream, 1000, 1).await.unwrap();
    bulk_both_ways(framed(&path).await, MUCH, 2).await.unwrap();
    assert_eq!(kata.connections(), 2);
    drop(kata);
    assert!(!path.exists());
}

#[tokio::test]
async fn many_round_trips_use_one_connection_which_then_half_closes() {
    let (kata, stream) = tcp().await;
    let mut echo = EchoSession::open(stream).await.unwrap();
    for seed in 0..100 {
        echo.roundtrip(seed, seed).await.unwrap();
    }
    assert_eq!(kata.open(), 1);
    echo.finish().await.unwrap();
}

#[tokio::test]
async fn a_source_is_read_to_its_end_and_a_sink_has_all() {
    let (_kata, stream) = tcp().await;
    read_source(stream, MUCH, 3).await.unwrap();
    let (_kata, stream) = tcp().await;
    write_sink(stream, MUCH, 4).await.unwrap();
    let (_kata, stream) = tcp().await;
    write_sink(stream, 0, 4).await.unwrap();
}

#[tokio::test]
async fn a_stalled_server_lets_the_writer_write_only_so_much() {
    let (kata, mut stream) = tcp().await;
    open_stall(&mut stream).await.unwrap();
    let write = write_pattern(&mut stream, 1 << 30, 0);
    assert!(tokio::time::timeout(Duration::from_millis(300), write).await.is_err());
    drop(kata);
}

#[tokio::test]
async fn an_unknown_command_ends_the_connection() {
    let (_kata, mut stream) = tcp().await;
    stream.write_all(b"garbage!").await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
}

/// Relays bytes, but changes, drops or adds one on the way back.
async fn tampering(kind: &str) -> tokio::io::DuplexStream {
    let kata = KataAgent::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let (near, far) = tokio::io::duplex(4096);
    let kind = kind.to_owned();
    tokio::spawn(async move {
        let (mut up_read, mut up_write) =
            TcpStream::connect(kata.addr().unwrap()).await.unwrap().into_split();
        let (mut down_read, mut down_write) = tokio::io::split(far);
        let up = async {
            tokio::io::copy(&mut down_read, &mut up_write).await?;
            up_write.shutdown().await
        };
        let down = async {
            let mut bytes = Vec::new();
            up_read.read_to_end(&mut bytes).await?;
            match kind.as_str() {
                "change" => bytes[500] ^= 1,
                "drop" => drop(bytes.pop()),
                "add" => bytes.push(0),
                _ => {}
            }
            down_write.write_all(&bytes).await?;
            down_write.shutdown().await
        };
        tokio::join!(up, down)
    });
    near
}

#[tokio::test]
async fn a_byte_changed_dropped_or_added_on_the_way_is_found() {
    bulk_both_ways(tampering("nothing").await, 1000, 5).await.unwrap();
    for (kind, expected) in [
        ("change", "byte 500 is"),
        ("drop", "ended after 999 bytes of 1000"),
        ("add", "a byte came after the last one"),
    ] {
        let error = bulk_both_ways(tampering(kind).await, 1000, 5).await.unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}

#[tokio::test]
async fn the_process_serves_both_kinds_of_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kata.sock");
    let mut command = Command::new(&ensure_built().await.unwrap().simulator);
    command.args(["kata-agent", "--socket"]).arg(&path).args(["--tcp", "127.0.0.1:0"]);
    let kata = Child::spawn("kata", command).unwrap();
    let line = kata.wait_for_text("listening on 127.", SOON).await.unwrap();
    let addr = line.strip_prefix("listening on ").unwrap();
    bulk_both_ways(framed(&path).await, MUCH, 6).await.unwrap();
    bulk_both_ways(TcpStream::connect(addr).await.unwrap(), MUCH, 7).await.unwrap();
}
