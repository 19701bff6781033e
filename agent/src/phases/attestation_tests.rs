use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// A part of a key, at which a test finds the key in a text.
const CANARY: &str = "b3BlbnNzaC1rZXkt";

/// The error of an attempt that fetches `resource`, whose requests `answers` are sent for, one after the other; and the requests.
async fn attempt(resource: KeyResource, answers: &[String]) -> (Result<PodKeys, AttemptError>, Vec<String>) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let guest = GuestApi { namespace: None, address: listener.local_addr().unwrap(), resource };
    let mut requests = Vec::new();
    let pod = "0123456789abcdef".repeat(4).parse().unwrap();
    let serve = async {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_buf(&mut request).await.unwrap();
            }
            requests.push(String::from_utf8(request).unwrap().lines().next().unwrap().to_owned());
            // The client may close the connection early.
            drop(stream.write_all(answer.as_bytes()).await);
        }
        std::future::pending().await
    };
    let keys = tokio::select! {
        keys = guest.keys(&pod) => keys,
        () = serve => unreachable!(),
    };
    (keys, requests)
}

async fn error(answers: &[String]) -> AttemptError {
    attempt(KeyResource::Separate, answers).await.0.unwrap_err()
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

#[tokio::test]
async fn one_attestation_brings_both_keys_and_never_two() {
    let node = secure_comms_keys::WorkerNodeKey::generate().unwrap().public().unwrap();
    let (pem, line) = (
        secure_comms_keys::PodKey::generate().unwrap().to_pem().unwrap(),
        node.authorized_keys_line().unwrap(),
    );
    let digest: InitDataDigest = "ab".repeat(48).parse().unwrap();
    for (digest, name) in [(None, "keys".to_owned()), (Some(digest.clone()), digest.to_string())] {
        let joint = KeyResource::Joint(digest);
        let (keys, requests) = attempt(joint.clone(), &[ok(&format!("{}{line}", *pem))]).await;
        assert!(keys.is_ok(), "{keys:?}");
        let path = format!("/cdh/resource/default/pp-{}/{name}", "0123456789abcdef".repeat(4));
        assert_eq!(requests, [format!("GET {path} HTTP/1.0")]);
        // A key without lines: another answer would be another's to give.
        let (keys, requests) = attempt(joint, &[ok(&pem), ok(&line), ok(&line)]).await;
        assert!(keys.unwrap_err().to_string().contains("no line next to the private key"));
        assert_eq!(requests.len(), 1, "{requests:?}");
    }
}

#[tokio::test]
async fn an_error_of_the_joint_resource_quotes_no_key() {
    let good = secure_comms_keys::PodKey::generate().unwrap().to_pem().unwrap();
    for body in [
        format!("{}{CANARY}", *good),
        format!("{CANARY}\n{}", *good),
        good.replace("OPENSSH", CANARY),
        format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}\n-----END OPENSSH PRIVATE KEY-----\n"),
    ] {
        let (keys, _) = attempt(KeyResource::Joint(None), &[ok(&body)]).await;
        let error = keys.unwrap_err();
        let texts = format!("{error} {error:?}");
        assert!(!texts.contains(CANARY) && !texts.contains("c1rZXkt"), "{texts}");
    }
}
