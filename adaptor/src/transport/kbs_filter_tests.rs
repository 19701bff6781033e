//! The filter in front of the KBS: what passes, what does not, and that nothing follows what does not.

use proptest::prelude::*;

use super::*;

const AUTH: &str = "POST /kbs/v0/auth HTTP/1.1\r\nhost: 127.0.0.1:8080\r\ncontent-length: 2\r\n\r\n{}";
const ATTEST: &str = "POST /kbs/v0/attest HTTP/1.1\r\nHost: kbs\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0A\r\n0123456789\r\n0\r\n\r\n";
const RESOURCE: &str = "GET /kbs/v0/resource/default/pp-1a/keys HTTP/1.1\r\nHost: kbs\r\nConnection: keep-alive\r\nCookie: kbs-session-id=1\r\n\r\n";

/// What the KBS receives of a text in one message; none if something was refused.
fn passed(text: &str) -> Option<String> {
    let (received, refused) = filtered([Bytes::copy_from_slice(text.as_bytes())]);
    (!refused).then(|| String::from_utf8(received).unwrap())
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: kbs\r\n\r\n")
}

/// An allowed request with these further header lines.
fn auth_with(lines: &str) -> String {
    format!("POST /kbs/v0/auth HTTP/1.1\r\nHost: kbs\r\n{lines}\r\n")
}

fn refused(text: &str) -> bool {
    let (received, refused) = filtered([Bytes::copy_from_slice(text.as_bytes())]);
    assert!(!refused || received.is_empty(), "{text:?} came through as {}", received.escape_ascii());
    refused
}

#[test]
fn the_requests_of_an_attesting_agent_pass_unchanged() {
    let texts = [
        AUTH.to_owned(),
        ATTEST.to_owned(),
        RESOURCE.to_owned(),
        get("/kbs/v0/resource/type/tag_1.2-x"),
        // Over keep-alive, one after the other and pipelined.
        [AUTH, ATTEST, RESOURCE, AUTH, RESOURCE, RESOURCE].concat(),
        auth_with("Expect: 100-continue\r\nContent-Length: 0\r\n"),
        auth_with("Authorization: Bearer a.b.c\r\nUser-Agent: x\r\nConnection: Keep-Alive, close\r\n"),
        "POST /kbs/v0/auth HTTP/1.0\r\nContent-Length: 1\r\n\r\nx".to_owned(),
    ];
    for text in texts {
        assert_eq!(passed(&text).as_deref(), Some(text.as_str()));
    }
}

#[test]
fn no_other_endpoint_is_reached() {
    let paths = [
        "/metrics",
        "/",
        "/kbs/v0/resource-policy",
        "/kbs/v0/resource",
        "/kbs/v0/resource/",
        "/kbs/v0/resource/a",
        "/kbs/v0/resource/a/b/c/d",
        "/kbs/v0/resource//a/b",
        "/kbs/v0/resource/a/b/",
        "/kbs/v0/resource/../../metrics",
        "/kbs/v0/resource/a/..",
        "/kbs/v0/resource/a/./b",
        "/kbs/v0/resource/a/%2e%2e/%2e%2e",
        "/kbs/v0/resource/a/b%2f..",
        "/kbs/v0/resource/a/b?x=1",
        "/kbs/v0/resource/a/b#x",
        "/kbs/v0/resource/a/b;x",
        "/kbs/v0/resource/a\\b/c",
        "/KBS/v0/resource/a/b",
        "//kbs/v0/resource/a/b",
        "http://kbs/kbs/v0/resource/a/b",
        "http://other/metrics",
        "*",
        "/kbs/v0/auth",
        "/kbs/v0/attestation-policy",
        "/kbs/v0/resource/a/b\u{e4}",
    ];
    for path in paths {
        assert!(refused(&get(path)), "GET {path}");
    }
    let requests = [
        ("POST", "/kbs/v0/resource/a/b/c"),
        ("PUT", "/kbs/v0/resource/a/b/c"),
        ("DELETE", "/kbs/v0/resource/a/b/c"),
        ("HEAD", "/kbs/v0/resource/a/b/c"),
        ("OPTIONS", "*"),
        ("CONNECT", "kbs:8080"),
        ("get", "/kbs/v0/resource/a/b/c"),
        ("POST", "/kbs/v0/resource-policy"),
        ("POST", "/kbs/v0/attestation-policy"),
        ("POST", "/kbs/v0/auth/"),
        ("POST", "/kbs/v0/auth?x"),
        ("POST", "/kbs/v0/attest/../resource-policy"),
    ];
    for (method, path) in requests {
        assert!(refused(&format!("{method} {path} HTTP/1.1\r\nHost: kbs\r\n\r\n")), "{method} {path}");
    }
}

#[test]
fn what_two_servers_could_read_differently_is_refused() {
    let lines = [
        "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        "Content-Length: 2\r\nContent-Length: 2\r\n",
        "Content-Length: 2\r\nContent-Length: 3\r\n",
        "Content-Length: 2, 2\r\n",
        "Content-Length: +2\r\n",
        "Content-Length: 0x2\r\n",
        "Content-Length: \r\n",
        "Content-Length: 99999999999999999999999\r\n",
        "Content-Length: 16777217\r\n",
        "Content_Length: 2\r\n",
        "Transfer_Encoding: chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding:\u{b}chunked\r\n",
        " folded: 1\r\n",
        "A: b\r\n\tfolded\r\n",
        "A: b\nContent-Length: 2\r\n",
        "A: b\rContent-Length: 2\r\n",
        "A: b\0\r\n",
        "Host: other\r\n",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: x\r\n",
        "Connection: upgrade\r\n",
        "Connection: close, Content-Length\r\nContent-Length: 2\r\n",
        "Upgrade: websocket\r\n",
        "Expect: something\r\n",
        "X-HTTP-Method-Override: DELETE\r\n",
        "X_HTTP_METHOD_OVERRIDE: DELETE\r\n",
        "X-Original-URL: /metrics\r\n",
        "X-Rewrite-URL: /metrics\r\n",
        "X-Forwarded-For: 127.0.0.1\r\n",
        "Forwarded: for=127.0.0.1\r\n",
        "Trailer: Content-Length\r\n",
        "no colon\r\n",
        ": no name\r\n",
    ];
    for line in lines {
        assert!(refused(&auth_with(line)), "{line:?}");
    }
    let texts = [
        format!("\r\n{AUTH}"),
        format!("\n{AUTH}"),
        format!(" {AUTH}"),
        AUTH.replace("\r\n", "\n"),
        AUTH.replace("HTTP/1.1", "HTTP/2.0"),
        AUTH.replace(" HTTP/1.1", ""),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        RESOURCE.replace("Host: kbs\r\n", "Host: kbs\r\nContent-Length: 4\r\n") + "abcd",
        RESOURCE.replace("Host: kbs\r\n", "Host: kbs\r\nTransfer-Encoding: chunked\r\n"),
        ATTEST.replace("HTTP/1.1", "HTTP/1.0"),
        format!("POST /kbs/v0/auth HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65)),
        format!("POST /kbs/v0/auth HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(70_000)),
        "b".repeat(70_000),
    ];
    for text in texts {
        assert!(refused(&text), "{text:.100?}");
    }
}

#[test]
fn a_chunk_that_is_not_clear_ends_the_stream() {
    const HEAD: &str = "POST /kbs/v0/attest HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let evil = get("/metrics");
    for body in [
        "3;x=y\r\nabc\r\n",
        " 3\r\nabc\r\n",
        "3 \r\nabc\r\n",
        "3\nabc\r\n",
        "\r\nabc",
        "0x3\r\nabc\r\n",
        "-1\r\n",
        "FFFFFFFFF\r\n",
        "1000001\r\n",
        "3\r\nabcd\r\n",
        "3\r\nabc\n",
        "0\r\nTrailer: x\r\n\r\n",
        "0\r\n\n",
    ] {
        let (received, refused) = filtered([format!("{HEAD}{body}{evil}").into()]);
        let received = String::from_utf8(received).unwrap();
        assert!(refused, "{body:?}");
        assert!(!received.contains("metrics"), "{body:?}: {received}");
    }
    // No chunk alone is too long.
    let many = format!("800000\r\n{}\r\n", "x".repeat(0x0080_0000)).repeat(3);
    let (received, refused) = filtered([format!("{HEAD}{many}").into()]);
    assert!(refused && received.len() < (BODY + 200), "{}", received.len());
}

const BODY: usize = 16 * 1024 * 1024;

#[test]
fn nothing_passes_after_a_request_that_was_refused() {
    for evil in [get("/metrics"), "x\0".to_owned(), "b".repeat(70_000)] {
        let (received, refused) =
            filtered([Bytes::from(AUTH), Bytes::from(evil), Bytes::from(AUTH), Bytes::from(RESOURCE)]);
        assert!(refused);
        assert_eq!(received, AUTH.as_bytes());
    }
}

#[test]
fn tls_passes_unread_and_what_only_begins_like_it_does_not() {
    let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 0, 255];
    for split in 0..hello.len() {
        let (first, rest) = hello.split_at(split);
        let (received, refused) = filtered([Bytes::copy_from_slice(first), Bytes::copy_from_slice(rest)]);
        assert!(!refused && received == hello, "{split}: {received:?}");
    }
    for not_tls in [&b"\x16GET /metrics HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 2, 0, 2, 0], &[22, 2, 0, 0, 0, 1]]
    {
        let (received, refused) = filtered([Bytes::copy_from_slice(not_tls)]);
        assert!(refused && received.is_empty());
    }
    // Only at the beginning of a stream.
    let (received, refused) = filtered([Bytes::from(AUTH), Bytes::copy_from_slice(&hello)]);
    assert!(refused && received == AUTH.as_bytes());
}

#[tokio::test]
async fn a_refusal_is_answered_once_and_ends_both_directions() {
    let (mut to_kbs, mut from_kbs) = KbsFilter::new(true).begin();
    let mut passed = Vec::new();
    to_kbs.on_message(Bytes::from(AUTH), &mut |piece| passed.push(piece)).unwrap();
    assert_eq!(passed, [Bytes::from(AUTH.strip_suffix("{}").unwrap()), Bytes::from("{}")]);
    assert!(from_kbs.next_injected().is_none() && !from_kbs.is_finished() && !to_kbs.is_finished());
    to_kbs.on_message(get("/metrics").into(), &mut |_| panic!("passed")).unwrap();
    from_kbs.injection_ready().await;
    let answer = from_kbs.next_injected().unwrap();
    let answer = std::str::from_utf8(&answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{answer}");
    assert!(body.contains("only POST /kbs/v0/auth"), "{answer}");
    assert!(from_kbs.is_finished() && to_kbs.is_finished() && from_kbs.next_injected().is_none());
    to_kbs.on_message(get("/metrics").into(), &mut |_| panic!("passed")).unwrap();
}

#[test]
fn a_filter_that_is_off_passes_everything() {
    let (mut to_kbs, from_kbs) = KbsFilter::new(false).begin();
    let mut passed = Vec::new();
    to_kbs.on_message(get("/metrics").into(), &mut |piece| passed.push(piece)).unwrap();
    assert_eq!(passed, [Bytes::from(get("/metrics"))]);
    assert!(!to_kbs.is_finished() && !from_kbs.is_finished());
}

/// Requests, good and bad, and noise.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(AUTH.as_bytes().to_vec()),
        Just(ATTEST.as_bytes().to_vec()),
        Just(RESOURCE.as_bytes().to_vec()),
        Just(get("/metrics").into_bytes()),
        Just(auth_with("A: b\nc: d\r\n").into_bytes()),
        Just(b"\r\n".to_vec()),
        Just(vec![22, 3, 1, 0, 5, 1]),
        Just(b"a".repeat(40_000)),
        proptest::collection::vec(any::<u8>(), 0..30),
    ];
    proptest::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_split_of_the_bytes_has_the_same_result(
        bytes in stream(),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..20),
    ) {
        let whole = filtered([Bytes::from(bytes.clone())]);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let bytes = Bytes::from(bytes);
        let mut at = 0;
        let mut pieces: Vec<Bytes> = cuts.iter().map(|cut| {
            let piece = bytes.slice(at..*cut);
            at = *cut;
            piece
        }).collect();
        pieces.push(bytes.slice(at..));
        prop_assert_eq!(&filtered(pieces), &whole);
        let single: Vec<Bytes> = (0..bytes.len()).map(|at| bytes.slice(at..=at)).collect();
        prop_assert_eq!(&filtered(single), &whole);
        // What passes is the beginning of what was sent.
        prop_assert!(bytes.starts_with(&whole.0));
    }
}
