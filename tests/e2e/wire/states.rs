//! Every message in every state of a connection.

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Offer, Packet, Raw, STATES, State, message};
use tokio::task::JoinSet;

/// Sends a message in a state and continues normally; returns an error if the agent does not.
async fn goes_on(agent: std::net::SocketAddr, state: State, wrong: &Packet) -> Result<()> {
    let mut raw = Raw::connect(agent).await?;
    raw.identify().await?;
    if state == State::Identified {
        raw.send(wrong).await?;
    }
    let exchange = raw.begin(Offer::default()).await?;
    if state == State::Begun {
        raw.send(wrong).await?;
    }
    let keys = raw.agree(exchange).await?;
    if state == State::Agreed {
        raw.send(wrong).await?;
    }
    raw.seal_with(&keys).await?;
    raw.open_with(&keys).await?;
    if state == State::Secured {
        raw.send(wrong).await?;
    }
    raw.ask_to_authenticate().await?;
    if state == State::Asked {
        raw.send(wrong).await?;
    }
    let attestation = Packet::authenticate("attestation", "none");
    ensure!(raw.authenticate(&attestation).await?, "not let in");
    if state == State::In {
        raw.send(wrong).await?;
    }
    answers(&mut raw).await
}

/// Messages that an agent ignores; any other ends the connection, or is refused.
fn is_ignored(state: State, number: u8, empty: bool) -> bool {
    use message::{
        CHANNEL_DATA, CHANNEL_EXTENDED_DATA, CHANNEL_OPEN, CHANNEL_REQUEST, DEBUG, DISCONNECT,
        GLOBAL_REQUEST, IGNORE, KEXINIT, REQUEST_FAILURE, SERVICE_REQUEST, UNIMPLEMENTED,
        USERAUTH_INFO_RESPONSE, USERAUTH_REQUEST,
    };
    match (state, number) {
        (State::Identified | State::Begun | State::Agreed, _) => false,
        (_, DISCONNECT | KEXINIT) => false,
        (_, IGNORE | UNIMPLEMENTED | DEBUG) => true,
        // Expected messages with malformed fields; a reply to no request is refused.
        (State::Secured, SERVICE_REQUEST) | (State::Asked, USERAUTH_REQUEST | USERAUTH_INFO_RESPONSE) => {
            false
        }
        (State::In, GLOBAL_REQUEST) => false,
        (State::In, REQUEST_FAILURE) => empty,
        // Messages for a channel that does not exist.
        (State::In, CHANNEL_DATA | CHANNEL_EXTENDED_DATA) => !empty,
        (State::In, CHANNEL_OPEN..=CHANNEL_REQUEST) => false,
        (State::Secured | State::Asked | State::In, _) => true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_is_ignored_or_ends_its_own_connection() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let (agent, mut wrong, mut surprises) = (attacked.scene.ssh, Vec::new(), Vec::new());
    for state in STATES {
        for number in 0..=u8::MAX {
            // RFC 4250: 0 and 255 are no messages; without fields, and with junk.
            for fields in [vec![], vec![0xa5; 40]] {
                // A message that is expected in this state is no fault.
                let belongs = matches!((state, number), (State::Identified, message::KEXINIT));
                if !belongs {
                    wrong.push((state, number, fields));
                }
            }
        }
    }
    let cases = wrong.len();
    // Few enough at a time that none is evicted.
    let mut wrong = wrong.into_iter().peekable();
    while wrong.peek().is_some() {
        let mut batch = JoinSet::new();
        for (state, number, fields) in wrong.by_ref().take(7) {
            batch.spawn(async move {
                let packet = Packet::new(number).bytes(&fields);
                let went = goes_on(agent, state, &packet).await;
                let ignored = is_ignored(state, number, fields.is_empty());
                (went.is_ok() != ignored).then(|| format!("{state:?}, {packet:?}: {went:?}"))
            });
        }
        while let Some(done) = batch.join_next().await {
            surprises.extend(done?);
        }
        attacked.holds()?;
    }
    ensure!(surprises.is_empty(), "{} of {cases}: {surprises:#?}", surprises.len());
    println!("{cases} messages where they do not belong");
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_lets_itself_in() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let forged = [
        Packet::new(message::USERAUTH_SUCCESS),
        Packet::new(message::SERVICE_ACCEPT).string("ssh-userauth"),
        Packet::new(message::SERVICE_ACCEPT).string("ssh-connection"),
        Packet::new(message::SERVICE_REQUEST).string("ssh-connection"),
        Packet::new(message::USERAUTH_PK_OK).string("ssh-ed25519").string([0; 51]),
        Packet::new(message::USERAUTH_INFO_RESPONSE).uint(0),
        Packet::new(message::EXT_INFO).uint(1).string("no-flow-control").string("p"),
    ];
    for packet in &forged {
        for asked in [false, true] {
            let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
            if asked {
                raw.ask_to_authenticate().await?;
            }
            raw.send(packet).await?;
            // These are for an authenticated client.
            raw.send(&Packet::open("session", 1)).await?;
            raw.send(&Packet::global("tcpip-forward").string("KBS").uint(1)).await?;
            raw.send(&Packet::new(message::IGNORE).string("x")).await?;
            if !asked {
                raw.ask_to_authenticate().await?;
            }
            // The next reply belongs to this request.
            raw.send(&Packet::authenticate("nobody", "none")).await?;
            loop {
                let answer = raw.receive().await.with_context(|| format!("{packet:?}"))?;
                match answer[0] {
                    message::USERAUTH_BANNER => {}
                    message::USERAUTH_FAILURE => break,
                    other => anyhow::bail!("{packet:?}: message {other} to an unknown user"),
                }
            }
        }
        attacked.holds_and_attests().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_after_the_login_changes_nothing() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let mut raw = attacked.node().await?;
    let again = attacked.node_key()?.login("kubernetes", raw.session());
    for packet in [
        again,
        Packet::authenticate("attestation", "none"),
        Packet::authenticate("root", "none"),
        Packet::new(message::SERVICE_REQUEST).string("ssh-userauth"),
    ] {
        raw.send(&packet).await?;
        // Neither success nor failure: the next reply belongs to the next request.
        raw.send(&Packet::global("are-you-there@example.org")).await?;
        let answer = loop {
            let answer = raw.receive().await?;
            if !matches!(answer[0], message::GLOBAL_REQUEST) {
                break answer;
            }
        };
        ensure!(answer == [message::REQUEST_FAILURE], "{packet:?}: {}", answer.escape_ascii());
    }
    drop(raw);
    attacked.comes_up().await.map(drop)
}
