//! Key exchanges in a row, incomplete, and at the wrong time (RFC 4253 9).

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, message};

/// What a client offers in a later exchange, where the markers have no meaning.
fn again() -> Offer {
    Offer { kex: "curve25519-sha256", ..Offer::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_rekeys_keep_the_connection_and_leak_nothing() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for offer in [again(), again().by_sequence()] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.open_control(1).await?;
        for _ in 0..10 {
            raw.exchange_keys(offer).await?;
        }
        let before = attacked.agent.rss_kib()?;
        for number in 0..500 {
            raw.exchange_keys(offer).await.with_context(|| format!("exchange {number}"))?;
        }
        answers(&mut raw).await?;
        let after = attacked.agent.rss_kib()?;
        println!("500 exchanges: RSS of the agent {before} KiB before, {after} KiB after");
        ensure!(after < before + 512, "the agent grew from {before} to {after} KiB");
        attacked.holds_and_attests().await?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rekey_during_a_login_changes_nothing() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
    let session = raw.session().to_vec();
    raw.exchange_keys(again()).await?;
    raw.ask_to_authenticate().await?;
    raw.exchange_keys(again()).await?;
    ensure!(!raw.authenticate(&Packet::authenticate("kubernetes", "none")).await?);
    raw.exchange_keys(again().by_sequence()).await?;
    ensure!(raw.authenticate(&Packet::authenticate("attestation", "none")).await?);
    raw.exchange_keys(again()).await?;
    answers(&mut raw).await?;
    ensure!(raw.session() == session, "the session has another id");
    attacked.holds_and_attests().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exchange_that_is_begun_and_disturbed_ends_the_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let disturbances = [
        ("begun twice", again().packet()),
        ("a request", Packet::global("are-you-there@example.org")),
        ("data", Packet::data(2, b"{\"ping\":1}\n")),
        ("an open", Packet::open("session", 9)),
        (
            "the server's half",
            Packet::new(message::KEX_ECDH_REPLY).string([0; 51]).string([1; 32]).string([0; 83]),
        ),
        ("new keys at once", Packet::new(message::NEWKEYS)),
        ("half a point", Packet::new(message::KEX_ECDH_INIT).string([1; 16])),
    ];
    for (what, packet) in &disturbances {
        for control in [false, true] {
            let mut raw = Raw::attestation(attacked.scene.ssh).await?;
            if control {
                raw.open_control(1).await?;
            }
            raw.begin(again()).await?;
            raw.send(packet).await?;
            raw.ends().await.with_context(|| (*what).to_owned())?;
        }
        attacked.holds_and_attests().await?;
    }
    // Nothing in common, and lists that can't be parsed.
    for offer in [
        Offer { kex: "diffie-hellman-group1-sha1", ..again() },
        Offer { kex: "", ..again() },
        Offer { kex: ",,,", ..again() },
        Offer { ciphers: "aes128-cbc", ..again() },
        Offer { compression: "zlib", ..again() },
    ] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.send(&offer.packet()).await?;
        raw.ends().await.with_context(|| format!("{offer:?}"))?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn exchanges_that_never_end_hold_up_nobody_else() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut pending = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.open_control(1).await?;
        raw.begin(again()).await?;
        // Allowed during an exchange, in any number.
        for _ in 0..1000 {
            drop(raw.send(&Packet::new(message::IGNORE).string([0; 1000])).await);
        }
        pending.push(raw);
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await?;
    for mut raw in pending {
        raw.ends().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_nodes_tunnels_go_on_over_a_storm_of_new_keys() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let mut raw = attacked.node().await?;
    for number in 0..50 {
        let open = Packet::open("direct-tcpip", number).string("VMSERVICE").uint(1);
        raw.send(&open.string("127.0.0.1").uint(2 * number + 1)).await?;
        let opened = raw.expect(&[message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE]).await?;
        ensure!(opened[0] == message::CHANNEL_OPEN_CONFIRMATION, "{}", opened.escape_ascii());
        raw.exchange_keys(again()).await?;
    }
    answers(&mut raw).await?;
    drop(raw);
    attacked.comes_up().await.map(drop)
}
