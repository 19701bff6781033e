use super::*;

fn read(mut bytes: &[u8]) -> Result<Answer, HttpError> {
    read_answer(&mut bytes)
}

fn body(bytes: &[u8]) -> Vec<u8> {
    read(bytes).unwrap().body
}

fn error(bytes: &[u8]) -> String {
    read(bytes).unwrap_err().to_string()
}

#[test]
fn a_body_ends_by_length_chunks_or_connection() {
    assert_eq!(body(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef"), b"abc");
    assert_eq!(body(b"HTTP/1.0 200 OK\r\n\r\nabcdef"), b"abcdef");
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\n02\r\nde\r\n0\r\nX-Trailer: z\r\n\r\n";
    assert_eq!(body(chunked), b"abcde");
}

#[test]
fn a_body_cut_short_is_an_error() {
    assert!(error(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc").contains("Content-Length"));
    for cut in ["3", "3\r\n", "3\r\nab", "3\r\nabc", "3\r\nabc\r\n", "3\r\nabc\r\n0"] {
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{cut}");
        assert!(error(answer.as_bytes()).contains("last chunk"), "{cut:?}");
    }
    assert!(error(b"HTTP/1.1 200 OK\r\nConte").contains("head"));
    assert!(error(b"").contains("head"));
}

#[test]
fn interim_answers_are_skipped() {
    assert_eq!(body(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"), b"a");
    let endless = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000);
    assert!(read(&endless).is_err());
}

#[test]
fn a_redirect_is_an_error_that_says_so() {
    let redirect = b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n";
    assert_eq!(error(redirect), "a redirect (status 302), which is not followed");
}

#[test]
fn a_failed_status_does_not_wait_for_its_body() {
    let answer = read(b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000\r\n\r\n").unwrap();
    assert_eq!(answer, Answer { status: 404, body: vec![] });
}

#[test]
fn doubtful_framing_is_refused() {
    for headers in [
        "Content-Length: 3\r\nContent-Length: 3",
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Content-Length: +3",
        "Content-Length: -3",
        "Content-Length: 3, 3",
        "Content-Length:",
        "Content-Length: 99999999999999999999999",
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\nabc");
        assert!(error(answer.as_bytes()).ends_with(" is refused"), "{headers}");
    }
    assert!(
        error(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
            .ends_with("in HTTP/1.0 is refused")
    );
    for chunks in [
        "\r\n",
        "1\r\na\r\n\r\n",
        ";x\r\n\r\n",
        "1;a=b\nc\r\na\r\n0\r\n\r\n",
        "x\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcXX0\r\n\r\n",
        "fffffffffffffffffff\r\n",
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
        assert!(error(answer.as_bytes()).ends_with(" is refused"), "{chunks}");
    }
}

#[test]
fn a_content_encoding_is_refused_by_name() {
    let gzip = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na";
    assert!(error(gzip).contains("content encoding"));
    assert_eq!(body(b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Length: 1\r\n\r\na"), b"a");
}

#[test]
fn every_part_has_a_limit() {
    let long = BODY_LIMIT + 1;
    let by_length = format!("HTTP/1.1 200 OK\r\nContent-Length: {long}\r\n\r\n");
    let closed = ["HTTP/1.1 200 OK\r\n\r\n", &"a".repeat(long)].concat();
    let chunk = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{long:x}\r\n");
    let chunks =
        ["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &"1\r\na\r\n".repeat(long)].concat();
    let head = ["HTTP/1.1 200 OK\r\nX: ", &"a".repeat(long)].concat();
    let extension =
        ["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", &"a".repeat(3 * long)].concat();
    for answer in [by_length, closed, chunk, chunks, head, extension] {
        let error = read(answer.as_bytes()).unwrap_err();
        assert!(matches!(error, HttpError::TooLong { .. } | HttpError::Refused(_)), "{error}");
    }
    let headers = ["HTTP/1.1 200 OK\r\n", &"X: y\r\n".repeat(HEADERS_LIMIT + 1), "\r\n"].concat();
    assert!(matches!(
        read(headers.as_bytes()).unwrap_err(),
        HttpError::Malformed(httparse::Error::TooManyHeaders)
    ));
    let whole = format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY_LIMIT}\r\n\r\n{}", "a".repeat(BODY_LIMIT));
    assert_eq!(body(whole.as_bytes()).len(), BODY_LIMIT);
}
