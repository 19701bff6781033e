use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{DATA_MAX, Framed, HEADER};
use crate::kata::pattern::fill;

fn pattern(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(1, 0, &mut bytes);
    bytes
}

fn frame(length: u32, stream: u32, kind: u8, flags: u8, data: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, flags], data].concat()
}

/// A reader of exactly these bytes, at most `step` at a time.
fn reader(bytes: Vec<u8>, step: usize) -> Framed<DuplexStream> {
    let (mut far, near) = duplex(step);
    tokio::spawn(async move { far.write_all(&bytes).await });
    Framed::new(near)
}

#[tokio::test]
async fn any_split_and_any_frame_size_carry_the_same_bytes() {
    let sent = pattern(5000);
    for (pipe, size) in [(1, 1), (3, 7), (10, 4999), (11, 5000), (64, 64), (16 * 1024, 1000), (7, DATA_MAX)] {
        let (near, far) = duplex(pipe);
        let (mut near, mut far) = (Framed::with_frames_of(near, size), Framed::new(far));
        let send = async {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let ((), read) = tokio::join!(send, far.read_to_end(&mut received));
        read.unwrap();
        assert_eq!(received, sent, "a pipe of {pipe}, frames of {size}");
    }
}

#[tokio::test]
async fn one_write_is_one_frame_with_the_header_of_the_protocol() {
    let (near, mut far) = duplex(1024);
    let mut near = Framed::with_frames_of(near, 4);
    near.write_all(b"hello").await.unwrap();
    near.write_all(b"").await.unwrap();
    near.shutdown().await.unwrap();
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, [frame(4, 1, 3, 0, b"hell"), frame(1, 1, 3, 0, b"o")].concat());
}

#[tokio::test]
async fn frames_of_no_data_are_no_end() {
    let empty = frame(0, 1, 3, 0, b"");
    let bytes = [empty.clone(), empty.clone(), frame(2, 1, 3, 0, b"hi"), empty].concat();
    let mut read = String::new();
    reader(bytes, 3).read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "hi");
}

#[tokio::test]
async fn after_a_half_close_the_other_direction_still_carries() {
    let (near, far) = duplex(16);
    let (mut near, mut far) = (Framed::new(near), Framed::new(far));
    near.shutdown().await.unwrap();
    assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
    far.write_all(b"still").await.unwrap();
    let mut read = [0; 5];
    near.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"still");
}

#[tokio::test]
async fn to_shut_down_in_the_middle_of_a_frame_is_an_error() {
    let (near, _far) = duplex(HEADER + 2);
    let mut near = Framed::new(near);
    let write = near.write_all(b"more than fits");
    assert!(tokio::time::timeout(Duration::ZERO, write).await.is_err());
    assert_eq!(near.shutdown().await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_malformed_header_is_an_error() {
    let too_long = u32::try_from(DATA_MAX + 1).unwrap();
    for (what, header) in [
        ("too long", frame(too_long, 1, 3, 0, b"")),
        ("plain bytes", b"GET / HTTP/1.1\r\n".to_vec()),
        ("a request", frame(1, 1, 1, 0, b"x")),
        ("a response", frame(1, 1, 2, 0, b"x")),
        ("another stream", frame(1, 3, 3, 0, b"x")),
        ("flags", frame(1, 1, 3, 1, b"x")),
    ] {
        let error = reader(header, 4).read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{what}: {error}");
    }
}

#[tokio::test]
async fn an_end_inside_a_frame_is_an_error() {
    let whole = frame(5, 1, 3, 0, b"hello");
    for length in 1..whole.len() {
        let error = reader(whole[..length].to_vec(), 64).read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{length}: {error}");
    }
}
