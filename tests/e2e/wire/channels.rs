//! Channels that do not exist, windows that were not granted, and too many of either (RFC 4254 5).

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Packet, Raw, message, uint};

const MANY: u32 = 10_000;

/// Messages on the agent's channel of this number.
type Abuse = fn(u32) -> Vec<Packet>;

fn window_adjust(id: u32, bytes: u32) -> Packet {
    Packet::new(message::CHANNEL_WINDOW_ADJUST).uint(id).uint(bytes)
}

fn confirmation(id: u32) -> Packet {
    Packet::new(message::CHANNEL_OPEN_CONFIRMATION).uint(id).uint(7).uint(u32::MAX).uint(0)
}

fn failure(id: u32) -> Packet {
    Packet::new(message::CHANNEL_OPEN_FAILURE).uint(id).uint(2).string("no").string("en")
}

fn eof(id: u32) -> Packet {
    Packet::new(message::CHANNEL_EOF).uint(id)
}

fn close(id: u32) -> Packet {
    Packet::new(message::CHANNEL_CLOSE).uint(id)
}

fn extended(id: u32, code: u32, data: &[u8]) -> Packet {
    Packet::new(message::CHANNEL_EXTENDED_DATA).uint(id).uint(code).string(data)
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_that_are_not_there_take_nothing_and_answer_nothing() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    // Other peers' channels have the same numbers: no message must reach them.
    let mut other = Raw::attestation(attacked.scene.ssh).await?;
    let others = other.open_control(1).await?;
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    for id in [others, 0, 1, 3, u32::MAX] {
        for packet in [
            Packet::data(id, b"this is no JSON\n"),
            extended(id, 1, b"x"),
            window_adjust(id, u32::MAX),
            eof(id),
            close(id),
            failure(id),
            Packet::request(id, "subsystem").string("secure-comms"),
            Packet::new(message::CHANNEL_SUCCESS).uint(id),
            Packet::new(message::CHANNEL_FAILURE).uint(id),
        ] {
            raw.send(&packet).await?;
            answers(&mut raw).await.with_context(|| format!("{packet:?}"))?;
        }
    }
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    let own = raw.open_control(1).await?;
    raw.send(&confirmation(own)).await?;
    raw.ends().await?;
    for id in [others, 0, u32::MAX] {
        // The agent never opened it: the peer's state is wrong, and the connection ends.
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.send(&confirmation(id)).await?;
        raw.ends().await?;
    }
    answers(&mut other).await.context("another peer's connection")?;
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abused_control_channel_harms_only_its_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let abuses: [(&str, Abuse); 11] = [
        ("a window beyond 32 bits", |id| vec![window_adjust(id, u32::MAX), window_adjust(id, u32::MAX)]),
        ("closed twice", |id| vec![close(id), close(id), Packet::data(id, b"{\"ping\":1}\n"), eof(id)]),
        ("data after the end", |id| vec![eof(id), Packet::data(id, b"{\"ping\":1}\n"), eof(id), eof(id)]),
        ("refused by its opener", |id| vec![failure(id), failure(id), Packet::data(id, b"x")]),
        ("errors on it", |id| (0..1000).map(|code| extended(id, code, &[0; 1000])).collect()),
        ("nothing on it", |id| vec![Packet::data(id, []); MANY as usize]),
        ("blank lines on it", |id| vec![Packet::data(id, b"\n \n\t\n"); MANY as usize]),
        ("ends on it", |id| vec![eof(id); MANY as usize]),
        ("one byte at a time", |id| {
            br#"{"ping":1}"#.iter().map(|&byte| Packet::data(id, [byte])).chain([Packet::data(id, "\n")]).collect()
        }),
        ("asked for again", |id| vec![Packet::request(id, "subsystem").string("secure-comms"); 100]),
        ("requests on it", |id| vec![Packet::request(id, "env").string("A").string("B"); MANY as usize]),
    ];
    for (what, packets) in abuses {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        let id = raw.open_control(1).await?;
        for packet in packets(id) {
            raw.send(&packet).await.with_context(|| what.to_owned())?;
        }
        answers(&mut raw).await.with_context(|| what.to_owned())?;
        attacked.holds_and_attests().await.with_context(|| what.to_owned())?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_and_packets_of_no_size_stall_nobody_else() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let open = |window, packet| {
        Packet::new(message::CHANNEL_OPEN).string("session").uint(1).uint(window).uint(packet)
    };
    for window in [0, u32::MAX] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.send(&open(window, 0)).await?;
        raw.ends().await?;
    }
    for (window, packet) in [(0, 1 << 15), (1, 1), (u32::MAX, u32::MAX)] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.send(&open(window, packet)).await?;
        let id = uint(&raw.expect(&[message::CHANNEL_OPEN_CONFIRMATION]).await?, 5)?;
        // The agent's hello has to wait for window.
        raw.send(&Packet::request(id, "subsystem").string("secure-comms")).await?;
        raw.expect(&[message::CHANNEL_SUCCESS]).await?;
        raw.send(&window_adjust(id, u32::MAX)).await?;
        raw.send(&window_adjust(id, u32::MAX)).await?;
        raw.expect(&[message::CHANNEL_DATA]).await?;
        answers(&mut raw).await?;
        attacked.holds_and_attests().await?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_refused_opens_leave_no_memory() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    attacked.holds_and_attests().await?;
    let before = attacked.agent.rss_kib()?;
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    raw.open_session(0).await?;
    let mut refused = 0;
    for round in 0..MANY / 100 {
        for id in 0..25 {
            let id = round * 100 + id;
            raw.send(&Packet::open("session", id)).await?;
            let stream = Packet::open("direct-tcpip", id).string("KATAAGENT").uint(1);
            raw.send(&stream.string("127.0.0.1").uint(id)).await?;
            raw.send(&Packet::open("x11", id).string("127.0.0.1").uint(1)).await?;
            raw.send(&Packet::open("auth-agent@openssh.com", id)).await?;
        }
        for _ in 0..100 {
            raw.expect(&[message::CHANNEL_OPEN_FAILURE]).await?;
            refused += 1;
        }
    }
    answers(&mut raw).await?;
    let after = attacked.agent.rss_kib()?;
    println!("{refused} opens refused; RSS of the agent {before} KiB before, {after} KiB after");
    ensure!(after < before + 1024, "the agent grew from {before} to {after} KiB");
    drop(raw);
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}
