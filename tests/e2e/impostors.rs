//! Packet-level attacks of a server that plays the agent to the real adaptor: the adaptor must not panic, hang, or hand a
//!  client to it, and must find the real agent afterwards.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_tests::attackers::attacked_agent::answers;
use secure_comms_tests::attackers::impostor::Impostor;
use secure_comms_tests::attackers::raw::{Key, Offer, Packet, Raw, STATES, State, message};
use secure_comms_tests::harness::scene::PATIENCE;
use tokio::time::timeout;

/// Sends a message in a state and continues normally; returns whether the adaptor opens its control channel.
async fn goes_on(raw: &mut Raw, key: &Key, state: State, wrong: &Packet) -> Result<()> {
    raw.identify().await?;
    if state == State::Identified {
        raw.send(wrong).await?;
    }
    let exchange = raw.begin(Offer::server()).await?;
    if state == State::Begun {
        raw.send(wrong).await?;
    }
    let keys = raw.agree_as(exchange, key).await?;
    if state == State::Agreed {
        raw.send(wrong).await?;
    }
    raw.seal_with(&keys).await?;
    raw.open_with(&keys).await?;
    if state == State::Secured {
        raw.send(wrong).await?;
    }
    raw.asked().await?;
    if state == State::Asked {
        raw.send(wrong).await?;
    }
    raw.send(&Packet::new(message::USERAUTH_SUCCESS)).await?;
    if state == State::In {
        raw.send(wrong).await?;
    }
    // The first channel is the control channel; no client's stream precedes it.
    raw.grant_control(0, 1).await?;
    answers(raw).await
}

/// Messages that an adaptor ignores; any other ends the connection.
fn is_ignored(state: State, number: u8) -> bool {
    use message::{
        CHANNEL_FAILURE, CHANNEL_OPEN, DEBUG, DISCONNECT, GLOBAL_REQUEST, IGNORE, KEXINIT, REQUEST_FAILURE,
        UNIMPLEMENTED, USERAUTH_PK_OK,
    };
    match (state, number) {
        (State::Identified | State::Begun | State::Agreed, _) => false,
        (_, IGNORE | UNIMPLEMENTED | DEBUG) => true,
        (State::Asked, USERAUTH_PK_OK) => true,
        // Known messages with malformed fields.
        (
            State::In,
            DISCONNECT | KEXINIT | GLOBAL_REQUEST | REQUEST_FAILURE | CHANNEL_OPEN..=CHANNEL_FAILURE,
        ) => false,
        (State::In, _) => true,
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_is_ignored_or_ends_the_connection() -> Result<()> {
    let impostor = Impostor::new(250).await?;
    let key = Key::generate()?;
    let mut cases = VecDeque::new();
    for state in STATES {
        for number in 0..=u8::MAX {
            // A message that is expected in this state is no fault.
            if (state, number) != (State::Identified, message::KEXINIT) {
                cases.push_back((state, Packet::new(number).bytes(&[0xa5; 40]), number));
            }
        }
    }
    let (count, mut surprises) = (cases.len(), Vec::new());
    while let Some((state, packet, number)) = cases.pop_front() {
        let mut raw = impostor.next().await?;
        let went = timeout(PATIENCE, goes_on(&mut raw, &key, state, &packet)).await.context("it hangs")?;
        if went.is_ok() != is_ignored(state, number) {
            surprises.push((state, number, went.is_ok()));
        }
        if number == 0 {
            impostor.holds()?;
        }
    }
    ensure!(surprises.is_empty(), "{} of {count}: {surprises:?}", surprises.len());
    println!("{count} messages where they do not belong");
    impostor.gives_way().await
}

/// The first connection on which the adaptor authenticates and opens a control channel, with its number at either end.
async fn controlled(impostor: &Impostor, key: &Key) -> Result<(Raw, u32)> {
    let mut raw = impostor.next().await?;
    raw.welcome(key).await?;
    let control = raw.grant_control(0, 1).await?;
    Ok((raw, control))
}

/// The same, without the connections that the adaptor closes: those of the Kubernetes phase, and the losers of a race.
async fn connected(impostor: &Impostor, key: &Key) -> Result<(Raw, u32)> {
    for _ in 0..50 {
        if let Ok(connected) = controlled(impostor, key).await {
            return Ok(connected);
        }
    }
    bail!("the adaptor opens no control channel\n{}", impostor.adaptor.log())
}

fn line(control: u32, text: impl AsRef<[u8]>) -> Packet {
    Packet::data(control, [text.as_ref(), b"\n"].concat())
}

/// The open request is refused; no stream of a client comes instead.
async fn refuses(raw: &mut Raw, open: &Packet) -> Result<()> {
    raw.send(open).await?;
    let answers = [message::CHANNEL_OPEN_CONFIRMATION, message::CHANNEL_OPEN_FAILURE, message::CHANNEL_OPEN];
    let answer = raw.expect(&answers).await?[0];
    ensure!(answer == message::CHANNEL_OPEN_FAILURE, "{open:?}: message {answer}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impostor_reaches_the_kbs_and_nothing_else() -> Result<()> {
    let impostor = Impostor::new(1).await?;
    let key = Key::generate()?;
    let (mut raw, control) = controlled(&impostor, &key).await?;
    let hello = r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"\u001b[2J","inbounds":["KBS"],"outbounds":["KATAAGENT"]}}"#;
    raw.send(&line(control, hello)).await?;
    let node = impostor.scene.node_service.addr().unwrap();
    for open in [
        Packet::open("session", 1),
        Packet::open("x11", 3).string("127.0.0.1").uint(6000),
        Packet::open("auth-agent@openssh.com", 4),
        Packet::open("direct-tcpip", 5).string("KBS").uint(1).string("127.0.0.1").uint(2),
        Packet::open("direct-streamlocal@openssh.com", 6).string("/run/docker.sock").string("").uint(0),
        Packet::open("forwarded-streamlocal@openssh.com", 7).string("/run/docker.sock").string(""),
        Packet::open("tun@openssh.com", 8).uint(1).uint(1),
        Packet::open("unheard-of", 9),
        // Names of the other phase, an empty name, and an address: the adaptor asked for none of them.
        Packet::open("forwarded-tcpip", 10).string("NODESERVICE").uint(1).string("127.0.0.1").uint(2),
        Packet::open("forwarded-tcpip", 11).string("KATAAGENT").uint(1).string("127.0.0.1").uint(4),
        Packet::open("forwarded-tcpip", 12).string("").uint(0).string("").uint(6),
        Packet::open("forwarded-tcpip", 13)
            .string(node.ip().to_string())
            .uint(node.port().into())
            .string("127.0.0.1")
            .uint(8),
        // A number that the impostor must not choose.
        Packet::open("forwarded-tcpip", 14).string("KBS").uint(1).string("127.0.0.1").uint(1),
    ] {
        refuses(&mut raw, &open).await.with_context(|| impostor.adaptor.log())?;
    }
    for request in ["tcpip-forward", "streamlocal-forward@openssh.com", "hostkeys-prove-00@openssh.com", ""] {
        raw.send(&Packet::global(request).string("KBS").uint(1)).await?;
        raw.expect(&[message::REQUEST_FAILURE]).await?;
    }
    // OpenSSH's request to announce new host keys, which the adaptor ignores.
    raw.send(
        &Packet::new(message::GLOBAL_REQUEST).string("hostkeys-00@openssh.com").byte(0).string(key.public()),
    )
    .await?;
    answers(&mut raw).await?;
    ensure!(impostor.scene.node_service.connections() == 0, "the node's service was reached");
    drop(raw);
    impostor.gives_way().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_control_line_keeps_the_adaptor_from_the_real_agent() -> Result<()> {
    let impostor = Impostor::new(8).await?;
    let key = Key::generate()?;
    let escape = r#"{"keys":{"attempt":1,"error":"\u001b[2J\nforged: all is well"}}"#;
    let hello = r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"x"}}"#;
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("no hello", vec![]),
        ("another phase", vec![br#"{"hello":{"version":1,"phase":"kubernetes"}}"#.to_vec()]),
        ("no phase that there is", vec![br#"{"hello":{"version":1,"phase":"root"}}"#.to_vec()]),
        ("too little credit", vec![br#"{"hello":{"version":1,"credit":1}}"#.to_vec()]),
        ("no JSON", vec![b"GET / HTTP/1.1".to_vec()]),
        ("a long line", vec![vec![b' '; 30_000], vec![b' '; 30_000], vec![b' '; 30_000]]),
        ("depth", vec![format!("{{\"hello\":{}", "[".repeat(30_000)).into_bytes()]),
        (
            "a forged line",
            vec![hello.into(), escape.into(), br#"{"bye":{"reason":"\u0007\u001b]0;x\u0007"}}"#.to_vec()],
        ),
        (
            "an upgrade before hello",
            vec![br#"{"upgrade":{}}"#.to_vec(), br#"{"bye":{"reason":""}}"#.to_vec()],
        ),
        ("an upgrade to nothing", vec![hello.into(), br#"{"upgrade":{}}"#.to_vec()]),
        ("thousands of keys", [vec![hello.into()], vec![escape.into(); 5000], vec![b"x".to_vec()]].concat()),
        (
            "thousands of pings",
            [vec![hello.into()], vec![br#"{"ping":7}"#.to_vec(); 5000], vec![b"x".to_vec()]].concat(),
        ),
        (
            "pongs to no ping",
            [vec![hello.into()], vec![br#"{"pong":7}"#.to_vec(); 500], vec![b"x".to_vec()]].concat(),
        ),
        (
            "credit without end",
            [
                vec![hello.into()],
                vec![br#"{"credit":{"stream":1,"bytes":4294967295}}"#.to_vec(); 5000],
                vec![b"x".to_vec()],
            ]
            .concat(),
        ),
    ];
    for (what, lines) in cases {
        let (mut raw, control) = connected(&impostor, &key).await.with_context(|| what.to_owned())?;
        for text in lines {
            if raw.send(&line(control, text)).await.is_err() {
                break;
            }
        }
        timeout(PATIENCE, raw.ends()).await.with_context(|| format!("{what}: the adaptor hangs"))??;
        impostor.holds().with_context(|| what.to_owned())?;
    }
    let log = impostor.adaptor.log();
    ensure!(!log.contains('\u{1b}') && !log.lines().any(|line| line.starts_with("forged")), "{log}");
    impostor.gives_way().await
}

/// A hello of almost 64 KiB, other than that of any other round: with as many names of inbounds as fit, or with as much of
/// what only a proven agent is asked for.
fn long_hello(round: usize) -> Vec<u8> {
    let begin = r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"x""#;
    let text = format!(r"{round}\u001b[2J\u2028{}", "a".repeat(15_000));
    let list = vec![format!("\"{round}.{}\"", "b".repeat(6)); 1500].join(",");
    match round % 3 {
        1 => return format!("{begin},\"init_data\":\"{text}{text}{text}{text}\"}}}}\n").into_bytes(),
        2 => {
            let lists = format!("\"worker_nodes\":[{list}],\"inbounds\":[{list}],\"outbounds\":[{list}]");
            let config = format!("\"config\":{{\"pod_id\":\"{round}\",\"user_data\":\"{text}\",{lists}}}");
            return format!("{begin},{config}}}}}\n").into_bytes();
        }
        _ => {}
    }
    let mut hello =
        r#"{"hello":{"version":1,"credit":32768,"phase":"attestation","instance":"x","inbounds":["kbs""#
            .to_owned();
    let mut names = 0;
    while hello.len() < 65_000 {
        hello.push_str(&format!(r#","{round}.{names:x}""#));
        names += 1;
    }
    hello.push_str("]}}\n");
    hello.into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_names_and_key_errors_are_a_few_short_lines() -> Result<()> {
    const ROUNDS: usize = 10;
    let impostor = Impostor::new(4).await?;
    let key = Key::generate()?;
    for round in 0..ROUNDS {
        let (mut raw, control) = connected(&impostor, &key).await?;
        for piece in long_hello(round).chunks(30_000) {
            raw.send(&Packet::data(control, piece)).await?;
        }
        if round == 0 {
            impostor
                .adaptor
                .wait_for_text("tunnels 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7 ... and ", PATIENCE)
                .await?;
        }
        for attempt in 0..500 {
            let keys =
                format!(r#"{{"keys":{{"attempt":{attempt},"error":"{attempt}\u2028{}"}}}}"#, "x".repeat(400));
            if raw.send(&line(control, keys)).await.is_err() {
                break;
            }
        }
        // No JSON: the adaptor ends the connection.
        raw.send(&line(control, "x")).await?;
        timeout(PATIENCE, raw.ends()).await.context("the adaptor hangs")??;
    }
    // Each event is a line on stdout and one on stderr.
    let log = impostor.adaptor.log();
    let shown: Vec<&str> = log.lines().filter(|line| !line.contains("DEBUG")).collect();
    let count = |part: &str| shown.iter().filter(|line| line.contains(part)).count();
    let (mismatches, keys) = (count("tunnels "), count("keys: attempt"));
    ensure!((2..=2 * 7).contains(&mismatches), "{mismatches} lines on tunnels\n{log}");
    ensure!(keys <= 2 * 2 * 30, "{keys} lines on keys\n{log}");
    let longest = shown.iter().map(|line| line.len()).max().unwrap_or_default();
    ensure!(longest < 1500 && !log.contains('\u{2028}'), "a line of {longest} bytes\n{log}");
    impostor.gives_way().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_ssh_is_named_as_such() -> Result<()> {
    let impostor = Impostor::new(2).await?;
    for _ in 0..2 {
        let mut raw = impostor.next().await?;
        raw.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await?;
        raw.ends().await?;
    }
    let line = impostor.adaptor.wait_for_text("not an SSH server", PATIENCE).await?;
    ensure!(line.contains("this is not an SSH server (it said 'HTTP/1.1 400 Bad Request')"), "{line}");
    ensure!(!impostor.adaptor.log().contains("CVE"), "{}", impostor.adaptor.log());
    impostor.gives_way().await
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_lines_do_not_disable_strict_key_exchange() -> Result<()> {
    let impostor = Impostor::new(8).await?;
    let key = Key::generate()?;
    let marked = |end: &[u8]| {
        [
            &[0, 0, 1, 0, 4, 20],
            [7; 16].as_slice(),
            &28_u32.to_be_bytes(),
            b"kex-strict-s-v00@openssh.com",
            end,
        ]
        .concat()
    };
    let lax = Offer { kex: "curve25519-sha256", ..Offer::server() };
    for before in [
        b"".to_vec(),
        // Each line is an identification to one parser and not to another; an invalid KEXINIT follows.
        [b"SSH-1.0-x\n".to_vec(), marked(b"\n")].concat(),
        [b"SSH-\n".to_vec(), marked(b"\n")].concat(),
        [b"\nSSH-2.0-x\n".to_vec(), marked(b"\n")].concat(),
        [b"SSH-2.0-\xff\n".to_vec(), marked(b"\n")].concat(),
        [b"SSH-2.0\n".to_vec(), marked(b"\n")].concat(),
        [b"SSH-1.99x\n".to_vec(), marked(b"\n")].concat(),
        [b"hello\nSSH-9\r\n".to_vec(), marked(b"\r\n")].concat(),
    ] {
        let mut raw = impostor.next().await?;
        raw.write(&before).await?;
        let secured = raw.secure(lax, &key).await;
        ensure!(secured.is_err(), "{}: keys without strict key exchange", before.escape_ascii());
        impostor.holds()?;
    }
    impostor.adaptor.wait_for_text("CVE-2023-48795", PATIENCE).await?;
    impostor.gives_way().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_key_that_is_shown_and_not_proven_gets_no_login() -> Result<()> {
    let impostor = Impostor::new(4).await?;
    let (pod, own) = (impostor.pod_key()?, Key::generate()?);
    // It claims the Kubernetes phase and shows the pod's public key, but has no signature.
    for _ in 0..2 {
        let mut raw = impostor.next().await?;
        raw.identify().await?;
        let exchange = raw.begin(Offer::server()).await?;
        raw.agree_signed_by(exchange, &pod.public(), &own).await?;
        raw.ends().await?;
        impostor.holds()?;
    }
    impostor.gives_way().await
}
