//! Attacks on sessions: by peers that are none of theirs, by an adaptor that lies to the real agent, and by an agent that
//! lies to the real adaptor. Whatever they say, memory stays bounded, and the next session works.
//!
//! `RESUMES=1000` in the environment sets the number of resumes in a loop, `LANES=500` that of lanes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use anyhow::{Context, Result, ensure};
use base64ct::{Base64, Encoding};
use secure_comms_protocol::control::{Bye, KnownStreams, SessionReply, WantedLane};
use secure_comms_protocol::limits::{CreditLimits, MESSAGE_MAX};
use secure_comms_protocol::{Control, Hello, Opening, Position, SessionId};
use secure_comms_tests::attackers::attacked_agent::AttackedAgent;
use secure_comms_tests::attackers::by_hand::{CREDIT, Echo, ForgedAgent, STALL, adaptor_hello, source};
use secure_comms_tests::attackers::raw::{Key, Opened, Raw, RawPeer};
use secure_comms_tests::harness::pod_keys::PodKeys;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, says, says_after};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const LIMITS: CreditLimits = CreditLimits::KUBERNETES;
/// Most that an end may keep for the streams of a session (the other end's credit, and a message of each stream), and what a
/// process is beyond that, in KiB.
const SESSION_MAX_KIB: u64 = ((LIMITS.held_max() + LIMITS.streams * MESSAGE_MAX) / 1024) as u64 + 40 * 1024;

fn number(variable: &str, otherwise: usize) -> Result<usize> {
    match std::env::var(variable) {
        Ok(number) => number.parse().with_context(|| format!("{variable}={number}")),
        Err(_) => Ok(otherwise),
    }
}

/// The text of the `bye` or disconnect that ends a connection, which must contain one of these words.
async fn ends_for(peer: &RawPeer, words: &[&str]) -> Result<()> {
    let reason = peer.ends().await?;
    ensure!(words.iter().any(|word| reason.contains(word)), "none of {words:?} in {reason:?}");
    Ok(())
}

// Peers that have no part in the session.

/// Everything that only a lane may say.
fn said_by_a_lane(id: &str) -> Vec<Control> {
    let reply = SessionReply { id: id.to_owned(), resumed: true };
    vec![
        Control::Session(reply),
        Control::Streams(KnownStreams { known: vec![1, 2, 3] }),
        Control::Lane(WantedLane { name: "data".to_owned() }),
        Control::Position(secure_comms_protocol::StreamPosition {
            stream: 1,
            received: 1 << 40,
            granted: u64::MAX,
        }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unproven_peer_gets_no_session() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let id = SessionId::from_random(7).to_string();
    for lane in ["main", "data"] {
        let raw = Raw::attestation(attacked.scene.ssh).await?;
        let hello = adaptor_hello(&attacked.scene.pod, Some(lane), Some(&id));
        let peer = RawPeer::greet(raw, hello).await?;
        for message in said_by_a_lane(&id) {
            peer.say(message).await?;
        }
        for originator in ["resume 0 32768", "again 18446744073709551615 0"] {
            let refusal = peer.refused("KATAAGENT", 1, originator).await?;
            ensure!(!refusal.contains("session"), "{refusal}");
        }
        peer.lives().await.with_context(|| attacked.agent.log())?;
        let said = peer.seen(|seen| seen.controls.clone());
        ensure!(!said.iter().any(|message| matches!(message, Control::Session(_))), "{said:?}");
        ensure!(!said.iter().any(|message| matches!(message, Control::Position(_))), "{said:?}");
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

/// An agent that lets in the worker node and another, and that other's key.
async fn with_another_key() -> Result<(AttackedAgent, Key)> {
    let directory = tempfile::tempdir()?;
    let other = PodKeys::make(directory.path(), "other").await?;
    let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
    scene.write_user_data().await?;
    scene.deadline = 250;
    let file = scene.path("apf.json");
    let mut user_data: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let own = Base64::decode_vec(user_data["sc-wn-pub"].as_str().unwrap())?;
    let both = [own.as_slice(), b"\n", other.node_public.as_bytes()].concat();
    user_data["sc-wn-pub"] = Base64::encode_string(&both).into();
    std::fs::write(&file, user_data.to_string())?;
    let key = Key::from_openssh(&std::fs::read_to_string(&other.node)?)?;
    Ok((AttackedAgent::start(scene).await?, key))
}

#[tokio::test(flavor = "multi_thread")]
async fn another_permitted_key_has_no_part_in_a_session() -> Result<()> {
    let (attacked, other) = with_another_key().await?;
    let (owner, id) = attacked.session().await?;
    let mut echo = Echo::open(&owner, 1).await?;
    echo.echoes(&owner, b"the owner's").await?;

    let data = attacked.lane_with(&other, "data", Some(&id)).await?;
    ends_for(&data, &["main lane"]).await?;
    echo.echoes(&owner, b"still the owner's").await.with_context(|| attacked.agent.log())?;

    let main = attacked.lane_with(&other, "main", Some(&id)).await?;
    let reply = main.session().await?;
    ensure!(!reply.resumed && reply.id != id, "{reply:?} for another key than that of {id}");
    owner.ends().await?;
    ensure!(owner.session_is_ended(), "the owner has no word of it\n{}", attacked.agent.log());
    let refusal = main.refused("VMSERVICE", 1, Opening::Resume(echo.position())).await?;
    ensure!(refusal.contains("knows no stream 1 of this tunnel"), "{refusal}");
    Echo::open(&main, 3).await?.echoes(&main, b"a stream of its own").await?;

    // The owner's session is over, for the owner, too.
    let again = attacked.lane("main", Some(&id)).await?.session().await?;
    ensure!(!again.resumed && again.id != id, "{again:?} goes on with {id}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_id_begins_a_new_session() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (first, ended) = attacked.session().await?;
    first.say(Control::Bye(Bye { reason: "done".to_owned(), ends_session: true })).await?;
    first.ends().await?;
    let mut wrong: Vec<String> = [
        "",
        "\0",
        "00000000000000000000000000000000",
        "0123456789ABCDEF0123456789ABCDEF",
        " 0123456789abcdef0123456789abcde",
        "../../../../../../../etc/shadow0",
    ]
    .map(ToOwned::to_owned)
    .into();
    wrong.push(ended);
    wrong.push("a".repeat(60_000));
    let mut ids = Vec::new();
    for id in &wrong {
        let (main, current) = attacked.session().await?;
        let mut echo = Echo::open(&main, 1).await?;
        for lane in ["data", "main"] {
            let case = format!("lane {lane} of {id:.40?}");
            let peer = attacked.lane(lane, Some(id)).await?;
            if lane == "data" {
                ends_for(&peer, &["main lane"]).await.context(case)?;
                echo.echoes(&main, b"as before").await.with_context(|| attacked.agent.log())?;
                continue;
            }
            let reply = peer.session().await.with_context(|| case.clone())?;
            ensure!(!reply.resumed && reply.id.parse::<SessionId>().is_ok(), "{case}: {reply:?}");
            ensure!(reply.id != current, "{case}: an id is used twice");
            main.ends().await?;
            ids.extend([current.clone(), reply.id]);
        }
    }
    // Case and blanks are part of an id.
    let (main, id) = attacked.session().await?;
    for near in [id.to_uppercase(), format!("{id} "), format!("{id}0"), id[..31].to_owned()] {
        if near != id {
            ends_for(&attacked.lane("data", Some(&near)).await?, &["main lane"]).await?;
        }
    }
    main.lives().await?;
    ids.push(id);
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() == all, "an id was used twice");
    let log = attacked.agent.log();
    ensure!(log.lines().all(|line| line.len() < 2000), "a long id is in the log\n{log}");
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_hello_changes_nothing() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let mut echo = Echo::open(&main, 1).await?;
    let pod = &attacked.scene.pod;
    let hellos = [
        adaptor_hello(pod, Some("data"), Some(&id)),
        adaptor_hello(pod, Some("main"), None),
        adaptor_hello(pod, None, None),
        Hello { version: 1, ..adaptor_hello("another-pod", Some("nonsense"), Some("x")) },
    ];
    for hello in hellos {
        main.say(Control::Hello(hello)).await?;
        echo.echoes(&main, b"goes on").await.with_context(|| attacked.agent.log())?;
    }
    let replies = main
        .seen(|seen| seen.controls.iter().filter(|message| matches!(message, Control::Session(_))).count());
    ensure!(replies == 1, "{replies} sessions for one connection");
    let data = attacked.resumed("data", &id, &[1]).await?;
    data.lives().await?;
    main.lives().await?;
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_lane_is_refused_with_a_reason() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let mut echo = Echo::open(&main, 1).await?;
    for lane in ["network", "", "MAIN", "main ", "m\u{0}ain\n", &"x".repeat(50_000)] {
        for session in [None, Some(id.as_str())] {
            let peer = attacked.lane(lane, session).await?;
            ends_for(&peer, &["lane"]).await.with_context(|| format!("{lane:.40?}"))?;
            ensure!(!peer.session_is_ended(), "it ends the session of another connection");
            echo.echoes(&main, b"as before").await.with_context(|| attacked.agent.log())?;
        }
    }
    let log = attacked.agent.log();
    ensure!(log.lines().all(|line| line.len() < 2000), "a long name is in the log\n{log}");
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_main_lane_comes_first() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let id = SessionId::from_random(3).to_string();
    for session in [None, Some(id.as_str())] {
        let peer = attacked.lane("data", session).await?;
        ends_for(&peer, &["main lane"]).await.with_context(|| attacked.agent.log())?;
    }
    let (main, _) = attacked.session().await?;
    ends_for(&attacked.lane("data", None).await?, &["main lane"]).await?;
    main.lives().await?;
    attacked.serves_sessions().await
}

/// A login that names no pod is a person's `ssh`: it must not become a lane, nor end the session.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_no_lane() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let mut echo = Echo::open(&main, 1).await?;
    for pod in [None, Some("not a pod id!")] {
        for (lane, session) in [("main", None), ("main", Some(id.as_str())), ("data", Some(id.as_str()))] {
            let hello = adaptor_hello("", Some(lane), session);
            let hello = Hello { pod_id: pod.map(ToOwned::to_owned), ..hello };
            let guest = RawPeer::greet(attacked.node().await?, hello).await?;
            // Either is fine: it is refused, or it stays a guest.
            let replied = match guest.settles().await {
                Ok(()) => guest
                    .seen(|seen| seen.controls.iter().any(|message| matches!(message, Control::Session(_)))),
                Err(_) => false,
            };
            ensure!(!replied, "a guest has a session\n{}", attacked.agent.log());
            echo.echoes(&main, b"as before").await.with_context(|| attacked.agent.log())?;
        }
    }
    attacked.serves_sessions().await
}

// Lanes and resumes without end.

#[tokio::test(flavor = "multi_thread")]
async fn lanes_without_end_leave_one_connection_each() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let lanes = number("LANES", 500)?;
    let (first, id) = attacked.session().await?;
    let mut echo = Echo::open(&first, 1).await?;
    echo.echoes(&first, b"first").await?;
    let (files, before) = (attacked.agent.open_files()?, attacked.agent.rss_kib()?);
    let (mut main, mut data) = (first, attacked.resumed("data", &id, &[1]).await?);
    // None of them is closed here: the agent must.
    let mut replaced = Vec::new();
    for _ in 0..lanes / 2 {
        replaced.push(std::mem::replace(&mut main, attacked.resumed("main", &id, &[1]).await?));
        replaced.push(std::mem::replace(&mut data, attacked.resumed("data", &id, &[1]).await?));
    }
    for peer in &replaced {
        peer.ends().await?;
        ensure!(!peer.session_is_ended(), "a replaced lane is said to end the session");
    }
    // One more connection than before, and a listener's accept or two.
    attacked.agent.wait_for_files(files + 4, PATIENCE).await?;
    let after = attacked.agent.rss_kib()?;
    println!("{} lanes of one session: RSS {before} KiB before, {after} KiB after", replaced.len() + 2);
    echo.resume(&main).await.with_context(|| attacked.agent.log())?;
    echo.echoes(&main, b"after all lanes").await?;
    // New sessions without end: each ends the one before.
    let mut sessions = Vec::new();
    for _ in 0..lanes / 5 {
        sessions.push(attacked.session().await?.0);
    }
    let last = sessions.pop().unwrap();
    for peer in sessions.iter().chain([&main, &data]) {
        peer.ends().await?;
    }
    last.lives().await?;
    attacked.agent.wait_for_files(files + 4, PATIENCE).await?;
    let after = attacked.agent.rss_kib()?;
    println!("{} sessions: RSS {after} KiB after", sessions.len());
    ensure!(after < before + 12 * 1024, "{before} KiB before, {after} KiB after\n{}", attacked.agent.log());
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn resumes_in_a_loop_lose_no_byte() -> Result<()> {
    const STREAMS: u32 = 50;
    let attacked = AttackedAgent::kubernetes().await?;
    let resumes = number("RESUMES", 300)?;
    let (mut main, id) = attacked.session().await?;
    let mut streams = Vec::new();
    for number in 0..STREAMS {
        streams.push(Echo::open(&main, 2 * number + 1).await?);
    }
    let ids: Vec<u32> = streams.iter().map(|echo| echo.stream).collect();
    for echo in &mut streams {
        echo.echoes(&main, format!("stream {}", echo.stream).as_bytes()).await?;
    }
    let before = attacked.agent.rss_kib()?;
    for round in 0..resumes {
        let next = attacked.resumed("main", &id, &ids).await.with_context(|| format!("resume {round}"))?;
        let mut asked = Vec::new();
        for echo in &streams {
            asked.push(echo.ask_to_go_on(&next).await?);
        }
        for (echo, asked) in streams.iter_mut().zip(asked) {
            echo.goes_on(&next, asked)
                .await
                .with_context(|| format!("resume {round}\n{}", attacked.agent.log()))?;
        }
        // Some of the streams carry bytes in each round.
        let at = round % streams.len();
        streams[at].echoes(&next, format!("round {round}").as_bytes()).await?;
        main = next;
    }
    for echo in &mut streams {
        echo.echoes(&main, b"the last").await?;
    }
    let (after, peak) = (attacked.agent.rss_kib()?, attacked.agent.peak_kib()?);
    println!("{resumes} resumes of {STREAMS} streams: RSS {before} KiB before, {after} after, peak {peak}");
    ensure!(after < before + 8 * 1024, "{before} KiB before, {after} KiB after");
    drop(main);
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn resumes_out_of_order_lose_no_byte() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let mut echo = Echo::open(&main, 1).await?;
    echo.echoes(&main, b"one").await?;

    // Without `streams`.
    let next = attacked.lane("main", Some(&id)).await?;
    ensure!(next.session().await?.resumed);
    echo.resume(&next).await.with_context(|| attacked.agent.log())?;
    echo.echoes(&next, b"two").await?;

    // Streams that do not exist, of both ends, and far too many of them; the one that does is among them.
    let many: Vec<u32> = (1..=10_000).collect();
    let next = attacked.resumed("main", &id, &many).await?;
    next.streams(&[u32::MAX, 0, 2, 2, 1, 1]).await?;
    echo.resume(&next).await.with_context(|| attacked.agent.log())?;
    echo.echoes(&next, b"three").await?;
    let asked = next.seen(|seen| seen.opens.clone());
    ensure!(asked.is_empty(), "the agent opens what it never asked for: {asked:?}");

    // A stream that is asked for on another lane goes on there; its connection was given up, and ends.
    let data = attacked.resumed("data", &id, &[1]).await?;
    echo.resume(&data).await.with_context(|| attacked.agent.log())?;
    next.ends().await?;
    echo.echoes(&data, b"four").await.with_context(|| attacked.agent.log())?;

    // Ids that are in use, unknown or of the other end.
    let in_use = data.refused("VMSERVICE", 1, Opening::New).await?;
    ensure!(in_use.contains("stream id"), "{in_use}");
    let of_the_agent = data.refused("VMSERVICE", 2, Opening::New).await?;
    ensure!(of_the_agent.contains("stream id"), "{of_the_agent}");
    let position = Position { received: 0, granted: CREDIT.into() };
    for (tunnel, stream) in
        [("VMSERVICE", 77), ("VMSERVICE", 2), ("VMSERVICE", 0), ("KATAAGENT", 1), ("no such", 1)]
    {
        let refusal = data.refused(tunnel, stream, Opening::Resume(position)).await?;
        println!("resume of stream {stream} of {tunnel}: {refusal}");
    }
    echo.echoes(&data, b"five").await.with_context(|| attacked.agent.log())?;

    // `again`: the stream goes on if it is known, and is new otherwise; a position comes first in both cases.
    let next = attacked.resumed("data", &id, &[1]).await?;
    let asked = next.ask("VMSERVICE", 1, Opening::Again(echo.position())).await?;
    echo.goes_on(&next, asked).await.with_context(|| attacked.agent.log())?;
    echo.echoes(&next, b"six").await?;
    let data = next;
    let new = data.open("VMSERVICE", 9, Opening::Again(position)).await?;
    ensure!(data.first_position(new).await?.received == 0);
    data.data(new, [1, 0, 0, 0, 0, 0, 0, 0]).await?;
    data.data(new, b"new").await?;
    ensure!(data.bytes(new, 1, 3).await? == b"new");
    data.refused("VMSERVICE", 4, Opening::Again(position)).await?;
    attacked.serves_sessions().await
}

/// The last lane that asks gets the stream, at once or when the other has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_resumes_on_two_lanes_at_once_stays_whole() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (mut on, id) = attacked.session().await?;
    let mut echo = Echo::open(&on, 1).await?;
    for round in 0..20 {
        let context = || format!("round {round}\n{}", attacked.agent.log());
        let message = format!("round {round}");
        // It is not acknowledged, and so would come again on both channels if both carried the stream.
        echo.sends(&on, message.as_bytes()).await?;
        echo.receives(&on, message.as_bytes()).await.with_context(context)?;
        let lanes = if round % 2 == 0 { ["main", "data"] } else { ["data", "main"] };
        let first = attacked.resumed(lanes[0], &id, &[1]).await?;
        let last = attacked.resumed(lanes[1], &id, &[1]).await?;
        echo.ask_to_go_on(&first).await?;
        first.settles().await?;
        let asked = echo.ask_to_go_on(&last).await?;
        last.settles().await?;
        drop(first);
        echo.goes_on(&last, asked).await.with_context(context)?;
        echo.echoes(&last, b"whole").await.with_context(context)?;
        on = last;
    }
    attacked.serves_sessions().await
}

// Positions that lie.

/// What an end says that can't be so, each with the words that the log of the other end must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    ReceivedOneMore,
    ReceivedEverything,
    InsideAMessage,
    DataAfterEof,
    EofTwice,
    Overrun,
    Hoards,
}

impl Lie {
    const ALL: [(Self, &str); 7] = [
        (Self::ReceivedOneMore, "it has received"),
        (Self::ReceivedEverything, "it has received 18446744073709551615 bytes"),
        (Self::InsideAMessage, "inside a message"),
        (Self::DataAfterEof, "after its end of file"),
        (Self::EofTwice, "after its end of file"),
        (Self::Overrun, "more than it was granted"),
        (Self::Hoards, "grants more than it acknowledges"),
    ];

    /// Says it about a stream that has brought `count` bytes in one message or more, and their `EOF` if `has_ended`.
    async fn say(self, peer: &RawPeer, stream: u32, channel: Opened, count: u64) -> Result<()> {
        let granted = u64::from(CREDIT);
        match self {
            // One more would be its end of file.
            Self::ReceivedOneMore => peer.position(stream, Position { received: count + 2, granted }).await,
            Self::ReceivedEverything => peer.position(stream, Position { received: u64::MAX, granted }).await,
            Self::InsideAMessage => peer.position(stream, Position { received: 1, granted }).await,
            Self::DataAfterEof => {
                peer.eof(channel).await?;
                peer.data(channel, b"more").await
            }
            Self::EofTwice => {
                peer.eof(channel).await?;
                peer.eof(channel).await
            }
            Self::Overrun => {
                // Much more than the kernel's buffers of the stalled server take, for that is granted again.
                for _ in 0..1024 {
                    // It may end the connection before the last.
                    if peer.data(channel, vec![0; MESSAGE_MAX]).await.is_err() {
                        break;
                    }
                }
                Ok(())
            }
            Self::Hoards => peer.position(stream, Position { received: 0, granted: u64::MAX }).await,
        }
    }
}

/// The agent does not know the session any more.
async fn is_over(attacked: &AttackedAgent, id: &str) -> Result<()> {
    let reply = attacked.lane("main", Some(id)).await?.session().await?;
    ensure!(!reply.resumed && reply.id != id, "{reply:?} goes on with {id}\n{}", attacked.agent.log());
    Ok(())
}

/// The connection ends, and the log of the other end says why.
async fn ends_the_session(peer: &RawPeer, process: &Child, mark: usize, words: &str) -> Result<()> {
    let reason = peer.ends().await.with_context(|| process.log())?;
    says_after(process, mark, words).await?;
    println!("{words:?}: {reason}");
    let rss = process.rss_kib()?;
    ensure!(rss < SESSION_MAX_KIB, "{} has {rss} KiB", process.name());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_that_lies_ends_its_session() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for (lie, words) in Lie::ALL {
        let (main, id) = attacked.session().await?;
        let channel = main.open("VMSERVICE", 1, Opening::New).await?;
        let mark = attacked.agent.mark();
        let came = match lie {
            // The server holds the stream open, whatever we end.
            Lie::Overrun | Lie::DataAfterEof | Lie::EofTwice => {
                main.data(channel, STALL).await?;
                0
            }
            Lie::Hoards => {
                main.data(channel, source(200 * 1024 * 1024)).await?;
                0
            }
            _ => {
                main.data(channel, source(100)).await?;
                main.bytes(channel, 0, 100).await?.len() as u64
            }
        };
        lie.say(&main, 1, channel, came).await?;
        ends_the_session(&main, &attacked.agent, mark, words).await.with_context(|| format!("{lie:?}"))?;
        is_over(&attacked, &id).await.with_context(|| format!("{lie:?}"))?;
        println!("{lie:?}: RSS {} KiB, peak {}", attacked.agent.rss_kib()?, attacked.agent.peak_kib()?);
    }
    ensure!(attacked.agent.peak_kib()? < SESSION_MAX_KIB, "peak {} KiB", attacked.agent.peak_kib()?);
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_that_lies_in_a_resume_ends_its_session() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let granted = u64::from(CREDIT);
    for (received, words) in [
        (0, "has said 100 before"),
        (99, "has said 100 before"),
        (102, "it has received 102 bytes"),
        (u64::MAX, "it has received 18446744073709551615 bytes"),
    ] {
        for again in [false, true] {
            let (main, id) = attacked.session().await?;
            let channel = main.open("VMSERVICE", 1, Opening::New).await?;
            // No EOF comes, for the server waits for us to close.
            main.data(channel, [1, 0, 0, 0, 0, 0, 0, 0]).await?;
            main.data(channel, [7; 100]).await?;
            main.bytes(channel, 0, 100).await?;
            main.position(1, Position { received: 100, granted }).await?;
            main.settles().await?;
            let next = attacked.resumed("main", &id, &[1]).await?;
            let mark = attacked.agent.mark();
            let position = Position { received, granted };
            let opening = if again { Opening::Again(position) } else { Opening::Resume(position) };
            next.ask("VMSERVICE", 1, opening).await?;
            let case = || format!("{opening}\n{}", attacked.agent.log());
            ends_the_session(&next, &attacked.agent, mark, words).await.with_context(case)?;
            is_over(&attacked, &id).await.with_context(case)?;
        }
    }
    attacked.serves_sessions().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_adaptor_may_say_changes_nothing() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let mut echo = Echo::open(&main, 1).await?;
    echo.echoes(&main, b"a first message").await?;
    let position = echo.position();
    // Of streams that neither end has: they crossed a close. Older ones: they were said before. The other form of credit.
    for stream in [0, 2, 3, u32::MAX] {
        main.position(stream, Position { received: u64::MAX, granted: u64::MAX }).await?;
    }
    for older in
        [Position::default(), Position { received: 0, ..position }, Position { granted: 0, ..position }]
    {
        main.position(1, older).await?;
    }
    main.say(Control::Credit(secure_comms_protocol::Credit { stream: 1, bytes: u32::MAX })).await?;
    for message in said_by_a_lane(&id).into_iter().take(3) {
        main.say(message).await?;
    }
    echo.echoes(&main, b"a second one").await.with_context(|| attacked.agent.log())?;
    attacked.serves_sessions().await
}

/// First messages of a channel on which a stream goes on that are no position, or none that can be.
fn wrong_first_messages() -> Vec<(&'static str, Vec<u8>)> {
    let far = Position { received: 1 << 40, granted: u64::from(CREDIT) };
    vec![
        ("no bytes", Vec::new()),
        ("a byte less", vec![0; 15]),
        ("a byte more", vec![0; 17]),
        ("a whole message", vec![0; MESSAGE_MAX]),
        ("beyond what was sent", far.to_bytes().to_vec()),
    ]
}

/// A client of the agent's `NODESERVICE`, whose stream the agent has asked for on `peer` and the adaptor has not answered.
async fn unanswered_client(attacked: &AttackedAgent, peer: &RawPeer) -> Result<TcpStream> {
    peer.offer("NODESERVICE").await?;
    let mut local = client(attacked.scene.node_inbound).await?;
    local.write_all(b"hello").await?;
    peer.asked(|asked| asked.tunnel == "NODESERVICE" && asked.originator == Opening::New.to_string()).await?;
    Ok(local)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_that_answers_with_no_position_ends_its_session() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for (case, first) in wrong_first_messages() {
        let (main, id) = attacked.session().await?;
        let _local = unanswered_client(&attacked, &main).await.context(case)?;
        let next = attacked.resumed_with("main", &id, &[], "NODESERVICE").await?;
        let again = next.asked(|asked| asked.originator.starts_with("again ")).await.context(case)?;
        let mark = attacked.agent.mark();
        let channel = next.accept(&again).await?;
        next.data(channel, &first).await?;
        let words = if first.len() == 16 { "it has received" } else { "not its position" };
        ends_the_session(&next, &attacked.agent, mark, words).await.context(case)?;
        is_over(&attacked, &id).await.context(case)?;
    }
    attacked.serves_sessions().await
}

/// The stream waits; all others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_never_comes_holds_up_its_stream_only() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let local = unanswered_client(&attacked, &main).await?;
    let next = attacked.resumed_with("main", &id, &[], "NODESERVICE").await?;
    let again = next.asked(|asked| asked.originator.starts_with("again ")).await?;
    let channel = next.accept(&again).await?;
    let mut echo = Echo::open(&next, 1).await?;
    for _ in 0..10 {
        echo.echoes(&next, b"another stream").await.with_context(|| attacked.agent.log())?;
    }
    // Not before the position, for the agent does not know from where on.
    ensure!(next.seen(|seen| seen.channels[&channel.ours].messages.is_empty()), "bytes before the position");
    let granted = u64::from(CREDIT);
    next.data(channel, Position { received: 0, granted }.to_bytes()).await?;
    ensure!(next.bytes(channel, 0, 5).await? == b"hello");
    drop(local);
    attacked.serves_sessions().await
}

// Peers that never acknowledge.

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_that_never_acknowledges_takes_bounded_memory() -> Result<()> {
    const STREAMS: u32 = 300;
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    let before = attacked.agent.rss_kib()?;
    let mut channels = Vec::new();
    for number in 0..STREAMS {
        let channel = main.open("VMSERVICE", 2 * number + 3, Opening::New).await?;
        main.data(channel, source(1 << 20)).await?;
        channels.push(channel);
    }
    // Each stream is sent to the end of its credit, and no further.
    for channel in &channels {
        main.bytes(*channel, 0, CREDIT as usize / 2).await?;
    }
    let mut echo = Echo::open(&main, 1).await?;
    echo.echoes(&main, b"another stream").await?;
    main.settles().await?;
    let kept = attacked.agent.rss_kib()?;
    for channel in &channels {
        let came = main.seen(|seen| seen.channels[&channel.ours].messages.concat().len());
        ensure!(came <= CREDIT as usize, "{came} bytes came on a credit of {CREDIT}");
    }
    // More credit without an acknowledgement, up to what one end must keep.
    let each = LIMITS.held_max() as u64 * 3 / 4 / u64::from(STREAMS);
    for number in 0..STREAMS {
        main.position(2 * number + 3, Position { received: 0, granted: each }).await?;
    }
    for channel in &channels {
        main.bytes(*channel, 0, each as usize * 3 / 4).await?;
    }
    let most = attacked.agent.rss_kib()?;
    echo.echoes(&main, b"and still").await?;
    // A new lane changes nothing: what is kept is not kept twice.
    let next = attacked
        .resumed("main", &id, &(0..=STREAMS).map(|number| 2 * number + 1).collect::<Vec<_>>())
        .await?;
    echo.resume(&next).await?;
    for number in 0..STREAMS {
        next.ask("VMSERVICE", 2 * number + 3, Opening::Resume(Position { received: 0, granted: each }))
            .await?;
    }
    next.settles().await?;
    echo.echoes(&next, b"on a new lane").await?;
    let again = attacked.agent.rss_kib()?;
    println!(
        "{STREAMS} streams never acknowledged: RSS {before} KiB before, {kept} with the initial credit, {most} with {} MiB \
         granted, {again} after a resume; peak {}",
        (each * u64::from(STREAMS)) >> 20,
        attacked.agent.peak_kib()?
    );
    ensure!(attacked.agent.peak_kib()? < SESSION_MAX_KIB, "peak {} KiB", attacked.agent.peak_kib()?);
    ensure!(again < SESSION_MAX_KIB, "{again} KiB");
    drop(next);
    attacked.serves_sessions().await
}

// An agent that lies to the real adaptor. It holds the pod's key: a VM that was taken over.

fn id(number: u128) -> String {
    SessionId::from_random(number).to_string()
}

/// A client of the kata agent's tunnel at the adaptor, which has sent these bytes.
async fn runtime(forged: &ForgedAgent, bytes: &[u8]) -> Result<TcpStream> {
    let mut local = client(endpoint(&forged.adaptor, "KATAAGENT").await?).await?;
    local.write_all(bytes).await?;
    Ok(local)
}

/// The stream of the only client, accepted.
async fn accepted(peer: &RawPeer) -> Result<(u32, Opened)> {
    let asked = peer.asked(|asked| asked.tunnel == "KATAAGENT").await?;
    Ok((asked.stream, peer.accept(&asked).await?))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_lies_ends_its_session() -> Result<()> {
    let forged = ForgedAgent::new(|_| ()).await?;
    for (number, (lie, words)) in (1..).zip(Lie::ALL) {
        let case = || format!("{lie:?}\n{}", forged.adaptor.log());
        let (main, _) = forged.session(&id(number)).await.with_context(case)?;
        let mut local = runtime(&forged, &[7; 100]).await?;
        let (stream, channel) = accepted(&main).await.with_context(case)?;
        main.bytes(channel, 0, 100).await.with_context(case)?;
        let mark = forged.adaptor.mark();
        // It goes on until the adaptor resets the stream.
        let floods = async {
            while lie == Lie::Hoards && local.write_all(&[7; 65536]).await.is_ok() {}
            local
        };
        let lies = async {
            lie.say(&main, stream, channel, 100).await?;
            ends_the_session(&main, &forged.adaptor, mark, words).await
        };
        let (mut local, lied) =
            timeout(PATIENCE, async { tokio::join!(floods, lies) }).await.with_context(case)?;
        lied.with_context(case)?;
        // The client sees its stream end: by a reset, or by an end.
        let mut rest = Vec::new();
        drop(
            timeout(PATIENCE, local.read_to_end(&mut rest))
                .await
                .context("the client waits")
                .with_context(case)?,
        );
        println!("{lie:?}: RSS {} KiB, peak {}", forged.adaptor.rss_kib()?, forged.adaptor.peak_kib()?);
    }
    let peak = forged.adaptor.peak_kib()?;
    ensure!(peak < SESSION_MAX_KIB, "peak {peak} KiB");
    forged.serves_the_next_session(&id(99)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_answers_with_no_position_ends_its_session() -> Result<()> {
    let forged = ForgedAgent::new(|_| ()).await?;
    for (number, (case, first)) in (1..).zip(wrong_first_messages()) {
        let case = || format!("{case}\n{}", forged.adaptor.log());
        let (main, _) = forged.session(&id(number)).await.with_context(case)?;
        let _local = runtime(&forged, &[7; 100]).await?;
        let (stream, channel) = accepted(&main).await.with_context(case)?;
        main.bytes(channel, 0, 100).await.with_context(case)?;
        drop(main);
        let (next, known) = forged.resumed("main").await.with_context(case)?;
        ensure!(known == [stream], "it knows {known:?}");
        let asked = next.asked(|asked| asked.originator.starts_with("resume ")).await.with_context(case)?;
        ensure!(asked.stream == stream && asked.originator == format!("resume 0 {CREDIT}"), "{asked:?}");
        let mark = forged.adaptor.mark();
        let channel = next.accept(&asked).await?;
        next.data(channel, &first).await?;
        let words = if first.len() == 16 { "it has received" } else { "not its position" };
        ends_the_session(&next, &forged.adaptor, mark, words).await.with_context(case)?;
    }
    forged.serves_the_next_session(&id(99)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_may_not_resume_by_itself() -> Result<()> {
    let forged = ForgedAgent::new(|_| ()).await?;
    let (main, _) = forged.session(&id(1)).await?;
    let mut local = runtime(&forged, b"one").await?;
    let (stream, channel) = accepted(&main).await?;
    main.bytes(channel, 0, 3).await?;
    let position = Position { received: 3, granted: CREDIT.into() };
    for (tunnel, of) in [("NODESERVICE", 2), ("NODESERVICE", stream), ("KATAAGENT", stream), ("KATAAGENT", 2)]
    {
        let refusal = main.refused(tunnel, of, Opening::Resume(position)).await?;
        println!("an agent's resume of {of} of {tunnel}: {refusal}");
    }
    // What is only for the adaptor to say, and lanes that it does not know or has.
    main.streams(&[stream, 2, 4]).await?;
    for name in ["main", "data", "network", "", &"x".repeat(10_000)] {
        for _ in 0..100 {
            main.say(Control::Lane(WantedLane { name: name.to_owned() })).await?;
        }
    }
    let (data, hello) = forged.next(Some("data")).await?;
    ensure!(hello.session == Some(id(1)), "{hello:?}");
    data.say(Control::Session(SessionReply { id: id(1), resumed: true })).await?;
    main.say(Control::Session(SessionReply { id: id(2), resumed: false })).await?;
    main.position(stream, position).await?;
    main.data(channel, b"answer").await?;
    let mut answer = [0; 6];
    timeout(PATIENCE, local.read_exact(&mut answer))
        .await
        .context("no answer")
        .with_context(|| forged.adaptor.log())??;
    ensure!(&answer == b"answer");
    data.lives().await?;
    main.lives().await?;
    Ok(())
}

/// The adaptor takes none of these for its session, survives them, and its operator reads why.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_names_a_wrong_session_is_given_up() -> Result<()> {
    let forged = ForgedAgent::new(|_| ()).await?;
    for (case, reply_id) in
        [("not an id", "Z".repeat(32)), ("a long one", "0".repeat(60_000)), ("none", String::new())]
    {
        let case = || format!("{case}\n{}", forged.adaptor.log());
        let (peer, _) = forged.next(Some("main")).await.with_context(case)?;
        peer.say(Control::Session(SessionReply { id: reply_id, resumed: false })).await?;
        peer.ends().await.with_context(case)?;
        ensure!(forged.adaptor.rss_kib()? < SESSION_MAX_KIB);
    }
    let log = forged.adaptor.log();
    ensure!(log.lines().all(|line| line.len() < 2000), "a long id is in the log\n{log}");
    // Another session than the one that the adaptor names.
    let (main, _) = forged.session(&id(1)).await.with_context(|| forged.adaptor.log())?;
    let mut local = runtime(&forged, b"one").await?;
    let (_, channel) = accepted(&main).await?;
    main.bytes(channel, 0, 3).await?;
    drop(main);
    let (next, hello) = forged.next(Some("main")).await?;
    ensure!(hello.session == Some(id(1)), "{hello:?}");
    next.say(Control::Session(SessionReply { id: id(2), resumed: false })).await?;
    // The stream of the lost session is reset, and the client knows at once.
    let mut rest = Vec::new();
    drop(timeout(PATIENCE, local.read_to_end(&mut rest)).await.context("the client waits")?);
    let mut local = runtime(&forged, b"two").await?;
    let (_, channel) = accepted(&next).await.with_context(|| forged.adaptor.log())?;
    ensure!(next.bytes(channel, 0, 3).await? == b"two");
    next.data(channel, b"answer").await?;
    let mut answer = [0; 6];
    timeout(PATIENCE, local.read_exact(&mut answer)).await.context("no answer")??;
    ensure!(&answer == b"answer");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_acknowledges_takes_bounded_memory() -> Result<()> {
    const CLIENTS: usize = 200;
    let forged = ForgedAgent::new(|_| ()).await?;
    let (main, _) = forged.session(&id(1)).await?;
    says(&forged.adaptor, "kubernetes phase up").await?;
    let before = forged.adaptor.rss_kib()?;
    let kata = endpoint(&forged.adaptor, "KATAAGENT").await?;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(async move {
            if let Ok(mut local) = client(kata).await {
                // It writes as much as it may.
                while local.write_all(&[7; 65536]).await.is_ok() {}
            }
        });
    }
    let asked =
        main.until("all streams", |seen| (seen.opens.len() >= CLIENTS).then(|| seen.opens.clone())).await?;
    let mut channels = Vec::new();
    for asked in &asked {
        channels.push(main.accept(asked).await?);
    }
    for channel in &channels {
        main.bytes(*channel, 0, CREDIT as usize / 2).await?;
    }
    main.settles().await?;
    let kept = forged.adaptor.rss_kib()?;
    for channel in &channels {
        let came = main.seen(|seen| seen.channels[&channel.ours].messages.concat().len());
        ensure!(came <= CREDIT as usize, "{came} bytes came on a credit of {CREDIT}");
    }
    println!("{CLIENTS} clients, never acknowledged: RSS {before} KiB before, {kept} after");
    ensure!(kept < SESSION_MAX_KIB, "{kept} KiB");
    // Another stream goes on.
    let mut local = runtime(&forged, b"one more").await?;
    let one_more = main.until("one more", |seen| seen.opens.get(CLIENTS).cloned()).await?;
    let channel = main.accept(&one_more).await?;
    ensure!(main.bytes(channel, 0, 8).await? == b"one more");
    main.data(channel, b"served").await?;
    let mut answer = [0; 6];
    timeout(PATIENCE, local.read_exact(&mut answer)).await.context("no answer")??;
    ensure!(&answer == b"served");
    clients.shutdown().await;
    Ok(())
}
