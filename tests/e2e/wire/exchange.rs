//! The first key exchange, and what strict key exchange forbids in it (OpenSSH PROTOCOL 1.10, CVE-2023-48795).

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, message};
use secure_comms_tests::harness::scene::PATIENCE;

/// Messages that could be inserted into a handshake unnoticed without strict key exchange.
fn stowaways() -> [Packet; 3] {
    [
        Packet::new(message::IGNORE).string("x"),
        Packet::new(message::DEBUG).byte(0).string("x").string(""),
        Packet::new(message::UNIMPLEMENTED).uint(0),
    ]
}

/// The handshake up to a point, a message there, and the rest as usual.
async fn slipped_in(attacked: &AttackedAgent, place: usize, stowaway: &Packet) -> Result<()> {
    let mut raw = Raw::connect(attacked.scene.ssh).await?;
    raw.identify().await?;
    if place == 0 {
        raw.send(stowaway).await?;
    }
    let exchange = raw.begin(Offer::default()).await?;
    if place == 1 {
        raw.send(stowaway).await?;
    }
    let keys = raw.agree(exchange).await?;
    if place == 2 {
        raw.send(stowaway).await?;
    }
    raw.seal_with(&keys).await?;
    raw.open_with(&keys).await?;
    raw.attest().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_slipped_in_before_new_keys_ends_the_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for stowaway in stowaways() {
        for place in 0..3 {
            let slipped = slipped_in(&attacked, place, &stowaway).await;
            ensure!(slipped.is_err(), "{stowaway:?} at place {place} was taken");
        }
        attacked.holds_and_attests().await?;
    }
    slipped_in(&attacked, 3, &stowaways()[0]).await.context("the same without a stowaway")?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_strict_key_exchange_gets_no_keys() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for kex in [
        "curve25519-sha256",
        "curve25519-sha256,kex-strict-s-v00@openssh.com",
        "curve25519-sha256,kex-strict-c-v00@openssh.co",
        "curve25519-sha256,xkex-strict-c-v00@openssh.com",
        "curve25519-sha256,KEX-STRICT-C-V00@OPENSSH.COM",
        "kex-strict-c-v00@openssh.com",
        "kex-strict-c-v00@openssh.com,curve25519-sha256@libssh.org",
        "",
    ] {
        let mark = attacked.agent.mark();
        ensure!(Raw::secured(attacked.scene.ssh, Offer { kex, ..Offer::default() }).await.is_err(), "{kex}");
        attacked.agent.wait_from(mark, |line| line.contains(": ended: "), PATIENCE).await?;
    }
    attacked.holds_and_attests().await
}

#[tokio::test(flavor = "multi_thread")]
async fn prefix_truncation_ends_the_connection_with_either_cipher() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    for offer in [Offer::default(), Offer::default().by_sequence()] {
        for cut in [0, 1, 2] {
            let mut raw = Raw::secured(attacked.scene.ssh, offer).await?;
            for _ in 0..cut {
                // Encrypted, and lost on the path.
                raw.seal(&Packet::new(message::IGNORE).string("x"))?;
            }
            let attests = raw.attest().await;
            ensure!(attests.is_ok() == (cut == 0), "{offer:?}, {cut} packets cut off: {attests:?}");
        }
        attacked.holds_and_attests().await?;
    }
    // Continued sequence numbers made the truncation attack possible.
    let mut raw = Raw::connect(attacked.scene.ssh).await?;
    raw.starts_over = false;
    raw.identify().await?;
    ensure!(raw.exchange_keys(Offer::default().by_sequence()).await.is_ok());
    ensure!(raw.attest().await.is_err(), "sequence numbers that go on were taken");
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guessed_exchange_passes_only_where_the_standard_has_it() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    // first_kex_packet_follows (RFC 4253 7.1): a wrong guess, because the agent prefers another of the offered exchanges.
    let kex = "sntrup761x25519-sha512,curve25519-sha256,kex-strict-c-v00@openssh.com";
    let offer = Offer { kex, ..Offer::default() };
    for extra in 0..4 {
        let mut raw = Raw::connect(attacked.scene.ssh).await?;
        raw.identify().await?;
        let mut init = offer.packet().payload().to_vec();
        let follows = init.len() - 5;
        init[follows] = 1;
        raw.send(&Packet::whole(init.clone())).await?;
        for _ in 0..extra {
            raw.send(&Packet::new(message::KEX_ECDH_INIT).string([9; 32])).await?;
        }
        let theirs = raw.expect(&[message::KEXINIT]).await?;
        let exchange = raw.begun_with(init, theirs);
        let done = async {
            let keys = raw.agree(exchange).await?;
            raw.seal_with(&keys).await?;
            raw.open_with(&keys).await?;
            raw.attest().await?;
            answers(&mut raw).await
        };
        let done = done.await;
        ensure!(done.is_ok() == (extra == 1), "{extra} guessed packets: {done:?}");
        attacked.holds()?;
    }
    attacked.holds_and_attests().await
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_and_small_order_public_keys_yield_no_keys() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut field = Packet::new(message::KEX_ECDH_INIT).string([1; 32]).payload().to_vec();
    field[1] = 0xff;
    let publics = [
        Packet::new(message::KEX_ECDH_INIT),
        Packet::new(message::KEX_ECDH_INIT).byte(0),
        Packet::new(message::KEX_ECDH_INIT).string([]),
        Packet::new(message::KEX_ECDH_INIT).string([1; 31]),
        Packet::new(message::KEX_ECDH_INIT).string([1; 33]),
        Packet::new(message::KEX_ECDH_INIT).string([1; 200_000]),
        Packet::new(message::KEX_ECDH_INIT).string([1; 32]).byte(0),
        // The shared secret would be zero whatever the agent's half is.
        Packet::new(message::KEX_ECDH_INIT).string([0; 32]),
        Packet::new(message::KEX_ECDH_INIT).string([&[1], [0; 31].as_slice()].concat()),
        Packet::whole(field),
    ];
    for kex in [
        "curve25519-sha256,kex-strict-c-v00@openssh.com",
        "mlkem768x25519-sha256,kex-strict-c-v00@openssh.com",
    ] {
        for public in &publics {
            let mut raw = Raw::connect(attacked.scene.ssh).await?;
            raw.identify().await?;
            raw.begin(Offer { kex, ..Offer::default() }).await?;
            drop(raw.send(public).await);
            let reply = raw.expect(&[message::KEX_ECDH_REPLY]).await;
            ensure!(reply.is_err(), "{kex}: {public:?} got a reply");
            attacked.holds()?;
        }
        // Of the right length, but no key of the lattice: every coefficient is too large.
        let mut raw = Raw::connect(attacked.scene.ssh).await?;
        raw.identify().await?;
        raw.begin(Offer { kex, ..Offer::default() }).await?;
        raw.send(&Packet::new(message::KEX_ECDH_INIT).string([0xff; 1184 + 32])).await?;
        ensure!(raw.expect(&[message::KEX_ECDH_REPLY]).await.is_err(), "{kex}: no key got a reply");
    }
    attacked.holds_and_attests().await
}
