//! Who poses as the pod's VM reaches no endpoint of the KBS but those of an attesting agent. With the real adaptor.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::impostor::Impostor;
use secure_comms_tests::attackers::raw::{Key, Packet, Raw, message, uint};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, client, scene, up, works};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const EVIL: [&str; 9] = [
    "GET /metrics HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "POST /kbs/v0/resource-policy HTTP/1.1\r\nHost: kbs\r\nContent-Length: 2\r\n\r\n{}",
    "DELETE /kbs/v0/resource/default/pp-x/keys HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "POST /kbs/v0/resource/default/pp-x/keys HTTP/1.1\r\nHost: kbs\r\nContent-Length: 1\r\n\r\nx",
    "GET /kbs/v0/resource/../../../metrics HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "GET /kbs/v0/resource/a/%2e%2e/b HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "GET http://kbs/metrics HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "CONNECT kbs:8080 HTTP/1.1\r\nHost: kbs\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
];
/// A request for the KBS in the body of one, for a server that takes the shorter length.
const SMUGGLED: &str = "POST /kbs/v0/auth HTTP/1.1\r\nHost: kbs\r\nContent-Length: 45\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: kbs\r\n\r\n";
const AUTH: &str = "POST /kbs/v0/auth HTTP/1.1\r\nHost: kbs\r\nContent-Length: 2\r\n\r\n{}";

/// The requests that the KBS received besides the adaptor's own, which are POSTs to resources.
fn received(scene: &Scene) -> Vec<String> {
    let requests = scene.kbs.requests().into_iter();
    let requests = requests.map(|request| format!("{} {}", request.method, request.path));
    requests.filter(|request| !request.starts_with("POST /kbs/v0/resource/default/")).collect()
}

/// An impostor's stream to the KBS, and our end's number of it.
async fn stream(impostor: &mut Raw, ours: u32, originator: u32) -> Result<u32> {
    let open =
        Packet::open("forwarded-tcpip", ours).string("KBS").uint(1).string("127.0.0.1").uint(originator);
    impostor.send(&open).await?;
    uint(&impostor.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?, 5)
}

/// What comes back on a stream, until it ends.
async fn answer(impostor: &mut Raw) -> Result<String> {
    let mut text = Vec::new();
    loop {
        let packet =
            impostor.expect(&[message::CHANNEL_DATA, message::CHANNEL_EOF, message::CHANNEL_CLOSE]).await?;
        if packet[0] != message::CHANNEL_DATA {
            return Ok(String::from_utf8(text)?);
        }
        text.extend_from_slice(packet.get(9..).context("data")?);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impostor_gets_nothing_but_attestation_of_the_kbs() -> Result<()> {
    let impostor = Impostor::new(1).await?;
    let mut raw = impostor.next().await?;
    raw.welcome(&Key::generate()?).await?;
    let control = raw.grant_control(2, 1).await?;
    let hello =
        "{\"hello\":{\"version\":1,\"credit\":32768,\"phase\":\"attestation\",\"inbounds\":[\"KBS\"]}}\n";
    raw.send(&Packet::data(control, hello)).await?;
    for (n, request) in EVIL.iter().chain([&SMUGGLED]).enumerate() {
        let n = u32::try_from(n)?;
        let channel = stream(&mut raw, 10 + n, 2 + 2 * n).await?;
        raw.send(&Packet::data(channel, request)).await?;
        let answer =
            answer(&mut raw).await.with_context(|| format!("{request}\n{}", impostor.adaptor.log()))?;
        ensure!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{request}: {answer}");
        raw.send(&Packet::new(message::CHANNEL_CLOSE).uint(channel)).await?;
    }
    ensure!(received(&impostor.scene).is_empty(), "{:?}", received(&impostor.scene));
    let line =
        impostor.adaptor.wait_for_text("tunnel KBS: refusing a request of the agent at 127.0.0.1:", PATIENCE);
    let line = line.await?;
    ensure!(line.contains("'GET /metrics HTTP/1.1': only POST /kbs/v0/auth"), "{line}");
    ensure!(line.ends_with("give --kbs-filter off"), "{line}");
    impostor.gives_way().await
}

/// A request over a fresh connection in the VM; the whole answer.
async fn ask(scene: &Scene, request: &str) -> Result<String> {
    let mut socket = client(scene.kbs_inbound).await?;
    socket.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut answer)).await.context("no answer")??;
    Ok(String::from_utf8(answer)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_the_vm_attests_over_keep_alive_and_gets_no_more() -> Result<()> {
    let scene = scene().await?;
    let (agent, adaptor) = (scene.agent().await?, scene.adaptor()?);
    works(&scene, &adaptor).await.with_context(|| agent.log())?;
    let mark = received(&scene).len();
    for request in EVIL.iter().chain([&SMUGGLED]) {
        let answer = ask(&scene, request).await.with_context(|| adaptor.log())?;
        ensure!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{request}: {answer}");
    }
    ensure!(received(&scene).len() == mark, "{:?}", received(&scene));
    // Two good requests on one connection, and then a bad one.
    let mut socket = client(scene.kbs_inbound).await?;
    for _ in 0..2 {
        socket.write_all(AUTH.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await?);
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 200"), "{head}");
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let mut body = vec![0; length.context("a length")?.parse()?];
        socket.read_exact(&mut body).await?;
    }
    ensure!(received(&scene).len() == mark + 2, "{:?}", received(&scene));
    socket.write_all(EVIL[0].as_bytes()).await?;
    let mut answer = String::new();
    timeout(PATIENCE, socket.read_to_string(&mut answer)).await??;
    ensure!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    ensure!(received(&scene).len() == mark + 2, "{:?}", received(&scene));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_is_off_passes_what_the_kbs_may_refuse() -> Result<()> {
    let scene = scene().await?;
    let _agent = scene.agent().await?;
    let mut adaptor = scene.adaptor_command(&[scene.ssh])?;
    adaptor.args(["--kbs-filter", "off"]);
    let adaptor = Child::spawn("adaptor", adaptor)?;
    up(&adaptor).await?;
    let mut socket = client(scene.kbs_inbound).await?;
    socket.write_all(EVIL[0].as_bytes()).await?;
    scene.kbs.wait_for_request(|request| request.path == "/metrics", PATIENCE).await?;
    Ok(())
}
