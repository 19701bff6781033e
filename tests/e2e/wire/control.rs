//! Lines on the control channel that no adaptor sends.

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Packet, Raw, message};
use secure_comms_tests::harness::scene::PATIENCE;

/// Sends a line in packets of at most 32 KiB.
async fn say(raw: &mut Raw, channel: u32, line: &[u8]) -> Result<()> {
    for part in line.chunks(1 << 15) {
        raw.send(&Packet::data(channel, part)).await?;
    }
    raw.send(&Packet::data(channel, b"\n")).await
}

/// Waits for the pong of this number, and skips other messages.
async fn pongs(raw: &mut Raw, channel: u32, number: u64) -> Result<()> {
    say(raw, channel, format!("{{\"ping\":{number}}}").as_bytes()).await?;
    let wanted = format!("{{\"pong\":{number}}}\n");
    loop {
        let data = raw.expect(&[message::CHANNEL_DATA]).await?;
        if String::from_utf8_lossy(&data).contains(&wanted) {
            return Ok(());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_are_no_messages_end_the_connection_with_a_reason() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let many_keys = (0..8000).map(|key| format!("\"{key}\":{{}}")).collect::<Vec<_>>().join(",");
    let lines: Vec<(String, &str)> = vec![
        ("x".repeat(65_537), "longer than 65536"),
        ("x".repeat(1_000_000), "longer than 65536"),
        (format!("{{\"ping\":{}1}}", " ".repeat(65_536)), "longer than 65536"),
        (format!("{{\"x\":{}", "[".repeat(65_000)), "not a control message"),
        (format!("{{\"hello\":{{\"inbounds\":{}", "[".repeat(65_000)), "not a control message"),
        (format!("{{\"x\":{}", "{\"a\":".repeat(13_000)), "not a control message"),
        (r#"{"ping":-1}"#.into(), "not a control message"),
        (r#"{"ping":18446744073709551616}"#.into(), "not a control message"),
        (r#"{"ping":1e400}"#.into(), "not a control message"),
        (r#"{"credit":{"stream":7,"bytes":-1}}"#.into(), "not a control message"),
        (r#"{"credit":{"stream":7,"bytes":4294967296}}"#.into(), "not a control message"),
        (r#"{"credit":{"stream":-7,"bytes":1}}"#.into(), "not a control message"),
        (r#"{"credit":{"bytes":1}}"#.into(), "not a control message"),
        (r#"{"credit":{"stream":1,"stream":2,"bytes":1}}"#.into(), "not a control message"),
        (r#"{"hello":{"version":1},"hello":{"version":2}}"#.into(), "not a control message"),
        (r#"{"hello":{"version":1,"credit":0}}"#.into(), "less credit than a message costs"),
        (r#"{"hello":{"version":1,"credit":511}}"#.into(), "less credit than a message costs"),
        ("{\"ping\":1}{\"ping\":2}".into(), "not a control message"),
        ("null".into(), "expected a JSON object"),
        ("\0\0\0\0".into(), "expected a JSON object"),
        (format!("{{{many_keys}").chars().take(65_000).collect(), "not a control message"),
    ];
    for (line, reason) in lines {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        let channel = raw.open_control(1).await?;
        let mark = attacked.agent.mark();
        // Cut in the middle of a long line, the peer can't write all of it.
        drop(say(&mut raw, channel, line.as_bytes()).await);
        raw.ends().await.with_context(|| format!("{line:.80}"))?;
        let logged = attacked.agent.wait_from(
            mark,
            |text| text.contains("control line") || text.contains(reason),
            PATIENCE,
        );
        let logged = logged.await?;
        ensure!(logged.len() < 1000, "the log repeats it: {logged}");
        ensure!(logged.contains(reason) || reason.starts_with("expected"), "{line:.80}: {logged}");
        attacked.holds()?;
    }
    for line in [b"\xff\xfe{}".as_slice(), b"{\"bye\":{\"reason\":\"\xff\"}}", b"{\"\xc3\x28\":1}"] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        let channel = raw.open_control(1).await?;
        say(&mut raw, channel, line).await?;
        raw.ends().await.with_context(|| line.escape_ascii().to_string())?;
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_nobody_needs_change_nothing() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    let channel = raw.open_control(1).await?;
    let names = |length| vec!["\"N\""; length].join(",");
    let lines = [
        r#"{"hello":{"version":4294967295,"credit":4294967295,"inbounds":[""],"outbounds":["\u0000\n"]}}"#
            .to_owned(),
        format!(r#"{{"hello":{{"version":1,"credit":4294967295,"inbounds":[{}]}}}}"#, names(16_000)),
        r#"{"credit":{"stream":0,"bytes":4294967295}}"#.to_owned(),
        r#"{"credit":{"stream":4294967295,"bytes":4294967295}}"#.to_owned(),
        r#"{"credit":{"stream":2,"bytes":4294967295}}"#.to_owned(),
        r#"{"credit":{"stream":2,"bytes":0}}"#.to_owned(),
        r#"{"pong":0}"#.to_owned(),
        r#"{"pong":18446744073709551615}"#.to_owned(),
        r#"{"keys":{"attempt":18446744073709551615,"error":null}}"#.to_owned(),
        r#"{"upgrade":{}}"#.to_owned(),
        r#"{}"#.to_owned(),
        r#"{"later":{"x":[1,2,{"y":null}]}}"#.to_owned(),
        "\r\n \r\n".to_owned(),
        // Nested as deep as a line can be; the parser must not recurse.
        format!("{{\"later\":{}{}}}", "[".repeat(32_000), "]".repeat(32_000)),
    ];
    for (number, line) in lines.iter().enumerate() {
        say(&mut raw, channel, line.as_bytes()).await?;
        pongs(&mut raw, channel, number as u64).await.with_context(|| format!("{line:.80}"))?;
    }
    // Ten thousand of each, faster than they are answered: the agent keeps only the latest of what it owes.
    for number in 0..10_000_u32 {
        let line =
            format!("{{\"credit\":{{\"stream\":{number},\"bytes\":4294967295}}}}\n{{\"ping\":{number}}}\n");
        raw.send(&Packet::data(channel, line)).await?;
    }
    pongs(&mut raw, channel, u64::MAX).await?;
    answers(&mut raw).await?;
    attacked.holds_and_attests().await?;
    // The agent answers a bye by its own end.
    say(&mut raw, channel, br#"{"bye":{"reason":"\u001b[2J\u0000\nforged: line"}}"#).await?;
    raw.ends().await?;
    ensure!(
        !attacked.agent.log().contains('\u{1b}') && !attacked.agent.log().contains("\nforged"),
        "a forged line"
    );
    attacked.comes_up().await.map(drop)
}
