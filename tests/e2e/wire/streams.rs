//! Streams and their credit in the Kubernetes phase: a faulty worker node, or one whose key was stolen. It controls the
//!  pod, and must not bring the agent down.

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Packet, Raw, message, uint};
use secure_comms_tests::harness::scene::PATIENCE;
use serde_json::json;
use tokio::net::TcpListener;

fn stream(channel: u32, id: u32) -> Packet {
    to("VMSERVICE", channel, id)
}

fn to(tunnel: &str, channel: u32, id: u32) -> Packet {
    Packet::open("direct-tcpip", channel).string(tunnel).uint(1).string("127.0.0.1").uint(id)
}

/// A worker node after its hello, with its control channel.
async fn greeted(attacked: &AttackedAgent, credit: u32) -> Result<(Raw, u32)> {
    let mut raw = attacked.node().await?;
    let control = raw.open_control(0).await?;
    let hello = format!(
        "{{\"hello\":{{\"version\":1,\"credit\":{credit},\"pod_id\":\"{}\"}}}}\n",
        attacked.scene.pod
    );
    raw.send(&Packet::data(control, hello)).await?;
    raw.expect(&[message::CHANNEL_DATA]).await?;
    Ok((raw, control))
}

/// Opens a stream; returns the agent's channel number.
async fn open(raw: &mut Raw, channel: u32, id: u32) -> Result<u32> {
    raw.send(&stream(channel, id)).await?;
    uint(&raw.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?, 5)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_id_that_is_in_use_or_the_agents_is_refused() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let (mut raw, _) = greeted(&attacked, 32_768).await?;
    open(&mut raw, 1, 1).await?;
    for id in [1, 0, 2, 4_294_967_294] {
        raw.send(&stream(2, id)).await?;
        let refused = raw.expect(&[message::CHANNEL_OPEN_FAILURE]).await?;
        ensure!(uint(&refused, 5)? == 1, "{}", refused.escape_ascii());
        let words = String::from_utf8_lossy(&refused).into_owned();
        ensure!(words.contains("in use or not the opener's to give"), "{words}");
    }
    open(&mut raw, 2, u32::MAX).await?;
    answers(&mut raw).await?;
    drop(raw);
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn data_beyond_its_credit_ends_the_connection() -> Result<()> {
    // A server that does not read: data for it must be buffered.
    let deaf = TcpListener::bind("127.0.0.1:0").await?;
    let tag = format!("KUBERNETES_PHASE:DEAF:{}", deaf.local_addr()?);
    let attacked = AttackedAgent::kubernetes_with(json!({"sc-outbounds": tag})).await?;
    drop(attacked.comes_up().await?);
    // A message costs 512 bytes at least: the third case has no byte of data in it.
    for (what, message, messages) in
        [("large", vec![1; 32_768], 1000), ("small", vec![1; 1], 100_000), ("empty", vec![], 100_000)]
    {
        let (mut raw, _) = greeted(&attacked, 32_768).await?;
        raw.send(&to("DEAF", 1, 1)).await?;
        let channel = uint(&raw.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?, 5)?;
        let mark = attacked.agent.mark();
        for _ in 0..messages {
            if raw.send(&Packet::data(channel, &message)).await.is_err() {
                break;
            }
        }
        raw.ends().await.with_context(|| what.to_owned())?;
        attacked.agent.wait_from(mark, |line| line.contains("ended"), PATIENCE).await?;
        attacked.holds().with_context(|| what.to_owned())?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_credit_for_open_streams_overflows_nothing() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let (mut raw, control) = greeted(&attacked, u32::MAX).await?;
    let channel = open(&mut raw, 1, 1).await?;
    for _ in 0..100 {
        let line = "{\"credit\":{\"stream\":1,\"bytes\":4294967295}}\n";
        raw.send(&Packet::data(control, line)).await?;
    }
    raw.send(&Packet::new(message::CHANNEL_WINDOW_ADJUST).uint(channel).uint(u32::MAX)).await?;
    raw.send(&Packet::new(message::CHANNEL_EOF).uint(channel)).await?;
    raw.send(&Packet::data(channel, b"after the end")).await?;
    raw.send(&Packet::new(message::CHANNEL_CLOSE).uint(channel)).await?;
    raw.send(&Packet::new(message::CHANNEL_CLOSE).uint(channel)).await?;
    answers(&mut raw).await?;
    // The number of a closed channel can be used again.
    open(&mut raw, 5, 3).await?;
    drop(raw);
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_streams_are_refused_and_leave_nothing_open() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let files = attacked.agent.open_files()?;
    let (mut raw, _) = greeted(&attacked, 32_768).await?;
    let (mut opened, mut refused) = (0, 0);
    for number in 0..1500 {
        raw.send(&stream(number, 2 * number + 1)).await?;
        let answers = [message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE];
        match raw.expect(&answers).await?[0] {
            message::CHANNEL_OPEN_CONFIRMATION => opened += 1,
            _ => refused += 1,
        }
    }
    let rss = attacked.agent.rss_kib()?;
    println!("{opened} streams, {refused} refused; RSS of the agent {rss} KiB");
    let most = CreditLimits::KUBERNETES.tunnel_streams();
    ensure!(opened == most && opened + refused == 1500, "{opened} streams, {refused} refused");
    // The others are not taken: here those that are reserved for the kata agent.
    for number in 2000..2064 {
        raw.send(&to("KATAAGENT", number, 2 * number + 1)).await?;
        let answers = [message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE];
        let answer = raw.expect(&answers).await?;
        ensure!(answer[0] == message::CHANNEL_OPEN_CONFIRMATION, "{}", answer.escape_ascii());
    }
    answers(&mut raw).await?;
    drop(raw);
    attacked.agent.wait_for_files(files, PATIENCE).await?;
    attacked.comes_up().await.map(drop)
}
