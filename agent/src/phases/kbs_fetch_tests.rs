use proptest::prelude::*;
use tokio::io::duplex;

use super::*;

const PATH: &str = "default/sshclient/publicKey";

/// A part of a key, at which a test finds the key in a text.
const CANARY: &str = "b3BlbnNzaC1rZXkt";

/// The result of `fetch` for `answer`, which is sent in pieces of `piece` bytes before the end of the stream.
fn answer(answer: &[u8], piece: usize) -> Result<Vec<u8>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (client, mut server) = duplex(64);
    runtime.block_on(async {
        let serve = async {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                server.read_buf(&mut request).await.unwrap();
            }
            for piece in answer.chunks(piece) {
                // The client may close the connection early.
                if server.write_all(piece).await.is_err() {
                    break;
                }
            }
            drop(server);
            String::from_utf8(request).unwrap()
        };
        let (fetched, request) = tokio::join!(fetch(client, PATH), serve);
        assert_eq!(
            request,
            format!("GET /cdh/resource/{PATH} HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        );
        fetched.map(|body| body.to_vec()).map_err(|error| {
            assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
            error.to_string()
        })
    })
}

fn whole(text: impl AsRef<[u8]>) -> Result<Vec<u8>, String> {
    let text = text.as_ref();
    let all = answer(text, 4096);
    if text.len() < 1024 {
        assert_eq!(answer(text, 1), all, "in whatever pieces it comes");
    }
    all
}

#[test]
fn a_body_is_read_to_its_length_or_to_the_end_of_the_stream() {
    assert_eq!(whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nkey").unwrap(), b"key");
    assert_eq!(whole("HTTP/1.1 200 OK\r\ncontent-length:  3 \r\n\r\nkey and more").unwrap(), b"key");
    assert_eq!(whole("HTTP/1.0 200 OK\r\n\r\nkey").unwrap(), b"key");
    assert_eq!(whole("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap(), b"");
    let most = format!("HTTP/1.0 200 OK\r\n\r\n{}", "k".repeat(KEY_MAX));
    assert_eq!(whole(most).unwrap().len(), KEY_MAX);
}

#[test]
fn a_server_that_keeps_the_connection_open_is_not_waited_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (client, mut server) = duplex(1024);
    runtime.block_on(async {
        server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nkey").await.unwrap();
        assert_eq!(fetch(client, PATH).await.unwrap().as_slice(), b"key");
    });
}

#[test]
fn every_other_answer_is_an_error_that_says_what_came() {
    for (text, parts) in [
        (String::new(), &["closed the connection before its answer's head"][..]),
        ("HTTP/1.1 200 OK\r\nContent-".into(), &["closed the connection before its answer's head"]),
        ("SSH-2.0-OpenSSH\r\n\r\n".into(), &["not HTTP", "what listens on its port"]),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nkey".into(), &["cut short after 3 bytes"]),
        ("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n".into(), &["not HTTP", "Content-Length is not a"]),
        ("HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nkey".into(), &["Content-Length is not a length"]),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nkeys".into(), &["two values"]),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(), &["Transfer-Encoding"]),
        (
            "HTTP/1.1 500 Oops\r\nContent-Length: 19\r\n\r\nttrpc request error".into(),
            &["answered with status 500; check that the KBS has the resource"],
        ),
        ("HTTP/1.1 404 Nope\r\n\r\n\x1b[1m\nforged".into(), &["status 404; check"]),
        ("HTTP/1.1 204 Empty\r\n\r\n".into(), &["status 204; check"]),
        (format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(HEAD_MAX)), &["head", "longer than 16384 bytes"]),
        (
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", KEY_MAX + 1),
            &["body", "longer than 65536"],
        ),
        (
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", "9".repeat(30)),
            &["Content-Length is not a length"],
        ),
        (format!("HTTP/1.1 200 OK\r\n\r\n{}", "k".repeat(KEY_MAX + 1)), &["body", "longer than 65536 bytes"]),
    ] {
        let error = whole(&text).unwrap_err();
        for part in parts.iter().copied().chain(["api-server-rest", " (default/sshclient/publicKey)"]) {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn an_error_has_no_place_for_bytes_of_an_answer() {
    fn only_numbers_and_constants<T: Copy + 'static>() {}
    only_numbers_and_constants::<Fault>();
}

#[test]
fn no_error_quotes_a_byte_of_the_answer() {
    let pem = format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----\n");
    let length = format!("Content-Length: {}\r\n", pem.len());
    for text in [
        format!("HTTP/1.1 203 OK\r\n{length}\r\n{pem}"),
        format!("HTTP/1.1 206 Partial Content\r\n{length}\r\n{pem}"),
        format!("HTTP/1.1 101 Switching Protocols\r\n\r\n{pem}"),
        format!("HTTP/1.1 500 Oops\r\n{length}\r\n{pem}"),
        format!("HTTP/1.1 500 {CANARY}\r\n\r\n"),
        format!("HTTP/1.1 {CANARY} OK\r\n\r\n"),
        format!("HTTP/{CANARY} 200 OK\r\n\r\n"),
        format!("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/{CANARY}\r\n\r\n"),
        format!("HTTP/1.1 401 Denied\r\nWWW-Authenticate: Bearer {CANARY}\r\n\r\n{pem}"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: {CANARY}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: 3{CANARY}\r\n\r\nkey"),
        format!("HTTP/1.1 200 OK\r\n{CANARY}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {CANARY}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{CANARY}\r\n{pem}\r\n0\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{pem}"),
        format!("HTTP/1.1 200 OK\r\n\r\n{}", pem.repeat(KEY_MAX / pem.len() + 1)),
        format!("HTTP/1.1 200 OK\r\nX: {}", CANARY.repeat(HEAD_MAX)),
        format!(
            "{}HTTP/1.1 200 OK\r\n\r\n{pem}",
            format!("HTTP/1.1 100 {CANARY}\r\n\r\n").repeat(INTERIM_MAX + 1)
        ),
        pem.clone(),
    ] {
        let error = whole(&text).unwrap_err();
        assert!(!error.contains(CANARY), "{text:?} gave {error:?}");
    }
}

#[test]
fn interim_answers_are_skipped_up_to_a_number() {
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: </k>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
    let last = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nkey";
    assert_eq!(whole(format!("{interim}{last}")).unwrap(), b"key");
    assert_eq!(whole(interim.repeat(INTERIM_MAX / 2) + last).unwrap(), b"key");
    let error = whole(interim.repeat(INTERIM_MAX) + last).unwrap_err();
    assert!(error.contains("interim answers without an end"), "{error}");
    let error = whole(format!("{interim}HTTP/1.1 500 Oops\r\n\r\n")).unwrap_err();
    assert!(error.contains("status 500"), "{error}");
    assert!(whole(interim).unwrap_err().contains("before its answer's head was complete"));
}

#[test]
fn a_long_id_is_cut_so_that_cause_and_advice_come_through() {
    let pod = "0123456789abcdef".repeat(4);
    let error = FetchError::new(&format!("default/pp-{pod}/privateKey"), Fault::Status(500)).to_string();
    assert!(error.ends_with("its policy allows this VM (default/pp-01234567.../privateKey)"), "{error}");
    assert!(error.len() < 200, "{error}");
}

#[test]
fn a_path_that_is_no_resource_path_is_never_sent() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for path in ["", "a/b", "a/b/c/d", "a/b/", "a/../c", "a/b/c HTTP/1.1\r\nX: y", "a/b/c?d"] {
        let (client, mut server) = duplex(1024);
        runtime.block_on(async {
            let error = fetch(client, path).await.unwrap_err();
            assert!(matches!(error.fault(), Fault::Path) && !error.to_string().contains('\r'), "{error}");
            assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        });
    }
}

proptest! {
    #[test]
    fn no_answer_makes_it_panic_or_exceed_its_bounds(
        head in prop::sample::select(vec![
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
        ]),
        rest in prop::collection::vec(any::<u8>(), 0..200),
        piece in 1usize..50,
    ) {
        if let Ok(body) = answer(&[head.as_bytes(), &rest].concat(), piece) {
            prop_assert!(body.len() <= rest.len());
        }
    }
}
