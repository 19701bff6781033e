use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// A part of a key, at which a test finds the key in a text.
const CANARY: &str = "b3BlbnNzaC1rZXkt";

/// The error of an attempt whose requests `answer` is sent for, one after the other.
async fn error(answers: &[String]) -> AttemptError {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let guest = GuestApi { namespace: None, address: listener.local_addr().unwrap() };
    let pod = "0123456789abcdef".repeat(4).parse().unwrap();
    let serve = async {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_buf(&mut request).await.unwrap();
            }
            // The client may close the connection early.
            drop(stream.write_all(answer.as_bytes()).await);
        }
        std::future::pending().await
    };
    tokio::select! {
        keys = guest.keys(&pod) => keys.unwrap_err(),
        () = serve => unreachable!(),
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn an_attempts_error_quotes_no_key() {
    let pem = format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----\n");
    let good = secure_comms_keys::PodKey::generate().unwrap().to_pem().unwrap();
    for answers in [
        vec![format!("HTTP/1.1 500 Oops\r\n\r\n{pem}")],
        vec![format!("HTTP/1.1 206 OK\r\n\r\n{pem}")],
        vec![format!("HTTP/1.1 200 OK\r\nContent-Length: {CANARY}\r\n\r\n")],
        // Bodies that are no keys.
        vec![ok(&pem), ok(&pem)],
        vec![ok(CANARY), ok(CANARY)],
        vec![ok(&pem.replace("OPENSSH ", "")), ok(&pem)],
        vec![ok(&pem.replace("OPENSSH", CANARY)), ok(&pem)],
        vec![ok(&pem.replace("-----\n", "")), ok(&pem)],
        vec![ok(&good), ok(&pem)],
        vec![ok(&good), ok(CANARY)],
        vec![ok(&good), ok(&format!("ssh-{CANARY}"))],
        vec![ok(&good), ok(&format!("ssh-ed25519 {CANARY} {CANARY}"))],
        vec![ok(&good), ok(&format!("# {CANARY}"))],
    ] {
        let error = error(&answers).await;
        // The first is both the line of the log and `keys.error`.
        let texts = format!("{error} {error:?}");
        assert!(!texts.contains(CANARY) && !texts.contains("c1rZXkt"), "{answers:?} gave {texts}");
    }
}

#[tokio::test]
async fn an_attempts_error_says_each_cause_once() {
    let text = error(&["HTTP/1.1 500 Oops\r\n\r\nttrpc request error".to_owned()]).await.to_string();
    assert_eq!(text.matches("api-server-rest").count(), 1, "{text}");
    assert_eq!(text.matches("0123").count(), 1, "{text}");
}
