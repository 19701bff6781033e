//! Packets that are replayed, truncated, too long, or tampered with (RFC 4253 6).

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, message};

/// A connection before authentication, and one after.
async fn both(attacked: &AttackedAgent, offer: Offer) -> Result<[Raw; 2]> {
    let before = Raw::secured(attacked.scene.ssh, offer).await?;
    let mut after = Raw::secured(attacked.scene.ssh, offer).await?;
    after.attest().await?;
    Ok([before, after])
}

fn noise() -> Packet {
    Packet::new(message::IGNORE).string([5; 1000])
}

/// Checks that the connection ends, or that the peer is refused.
async fn is_ended(mut raw: Raw, what: &str) -> Result<()> {
    raw.ends().await.with_context(|| what.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_dropped_or_changed_packets_end_the_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for offer in [Offer::default(), Offer::default().by_sequence()] {
        for mut raw in both(&attacked, offer).await? {
            let once = raw.seal(&noise())?;
            raw.write(&[once.as_slice(), &once].concat()).await?;
            is_ended(raw, "a replayed packet").await?;
        }
        for mut raw in both(&attacked, offer).await? {
            let (one, two) = (raw.seal(&noise())?, raw.seal(&noise())?);
            raw.write(&[two, one].concat()).await?;
            is_ended(raw, "two packets in the wrong order").await?;
        }
        // The length, the first block, the middle, the tag.
        for at in [3, 4, 500, 1020] {
            for mut raw in both(&attacked, offer).await? {
                let mut bytes = raw.seal(&noise())?;
                bytes[at] ^= 1;
                // After a larger length the agent waits for more.
                bytes.extend_from_slice(&[0; 400_000]);
                // The agent may end the connection before all is written.
                drop(raw.write(&bytes).await);
                is_ended(raw, "a changed bit").await?;
            }
        }
        attacked.holds_and_attests().await?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_packet_lengths_end_the_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    // Nothing follows: the agent must end the connection because of the length alone.
    for length in [262_178, 1 << 20, 1 << 24, 1 << 30, i32::MAX as u32, u32::MAX - 3, u32::MAX] {
        for mut raw in both(&attacked, Offer::default()).await? {
            raw.write(&length.to_be_bytes()).await?;
            is_ended(raw, &format!("length {length}")).await?;
        }
        let mut raw = Raw::connect(attacked.scene.ssh).await?;
        raw.identify().await?;
        raw.write(&length.to_be_bytes()).await?;
        is_ended(raw, &format!("length {length} in the clear")).await?;
    }
    attacked.holds_and_attests().await?;
    // Encrypted, with a valid tag: only the content is wrong.
    for (what, body) in [
        ("nothing at all", vec![]),
        ("more padding than packet", vec![200; 32]),
        ("as much padding as packet", vec![32; 32]),
    ] {
        for offer in [Offer::default(), Offer::default().by_sequence()] {
            for mut raw in both(&attacked, offer).await? {
                let sealed = raw.seal_body(u32::try_from(body.len())?, body.clone())?;
                raw.write(&sealed).await?;
                is_ended(raw, what).await?;
            }
        }
        let mut raw = Raw::connect(attacked.scene.ssh).await?;
        raw.identify().await?;
        let clear = raw.seal_body(u32::try_from(body.len())?, body.clone())?;
        raw.write(&clear).await?;
        is_ended(raw, &format!("{what}, in the clear")).await?;
    }
    attacked.comes_up().await.map(drop)
}

/// The standard forbids it, but it harms no one: the tag covers it, so the peer itself sent it.
#[tokio::test(flavor = "multi_thread")]
async fn padding_of_any_length_does_no_harm() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for padding in [0_u8, 1, 2, 3, 4, 17, 255] {
        for offer in [Offer::default(), Offer::default().by_sequence()] {
            let mut raw = Raw::secured(attacked.scene.ssh, offer).await?;
            raw.attest().await?;
            let payload = Packet::global("are-you-there@example.org");
            let body = [&[padding], payload.payload(), &vec![0; padding.into()]].concat();
            let sealed = raw.seal_body(u32::try_from(body.len())?, body)?;
            raw.write(&sealed).await?;
            raw.expect(&[message::REQUEST_FAILURE]).await.with_context(|| format!("{padding}"))?;
            // Without a payload.
            let empty = [&[padding], vec![0; padding.into()].as_slice()].concat();
            let sealed = raw.seal_body(u32::try_from(empty.len())?, empty)?;
            raw.write(&sealed).await?;
            answers(&mut raw).await?;
        }
    }
    attacked.holds_and_attests().await
}

#[tokio::test(flavor = "multi_thread")]
async fn half_packets_hold_nothing_up() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut halves = Vec::new();
    // As many as are admitted, each with the longest packet announced and all but the last byte of a shorter one sent.
    for _ in 0..8 {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        let whole = raw.seal(&Packet::new(message::IGNORE).string(vec![0; 250_000]))?;
        raw.write(&whole[..whole.len() - 1]).await?;
        halves.push(raw);
        let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
        raw.write(&262_000_u32.to_be_bytes()).await?;
        halves.push(raw);
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await?;
    println!("the agent's peak with 16 half packets: {} KiB", attacked.agent.peak_kib()?);
    for mut raw in halves {
        ensure!(raw.ends().await.is_ok());
    }
    Ok(())
}
