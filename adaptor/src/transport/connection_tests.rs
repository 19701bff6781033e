//! One connection to a simulated agent: whom it trusts, what it refuses, and that its end frees everything.

use std::net::SocketAddr;

use crate::support::agent::{Agent, Mode};
use crate::support::{PATIENCE, pod};
use crate::transport::agent_connection::{AgentConnection, EndCause, Tunnels};
use crate::transport::ssh::{self, Admission, AuthHold, AuthLock, ConnectError, Dial, Flag};
use secure_comms_keys::{PodKey, WorkerNodeKey};
use secure_comms_protocol::control::{Bye, LogLine};
use secure_comms_protocol::limits::{LOG_TEXT_MAX, REKEY_BYTES, TCP_CONNECT};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{Attestation, Control, Kubernetes, Phase, PhaseName, TunnelName};
use secure_comms_ssh::profile::KeyExchange;
use secure_comms_tunnel::{Account, Link};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

fn dial(address: SocketAddr, node_key: &WorkerNodeKey) -> Dial {
    Dial {
        address,
        node_key: node_key.clone(),
        rekey_bytes: REKEY_BYTES,
        kex: KeyExchange::Any,
        hold: AuthHold::default(),
        answered: Flag::default(),
        account: Account::unlimited(),
        admission: Admission::default(),
        connected: Flag::default(),
        tcp_timeout: TCP_CONNECT,
    }
}

fn tunnels<P: Phase>(outbounds: &str) -> Tunnels<P> {
    Tunnels::new(&parse_list("KUBERNETES_PHASE:KATAAGENT:0").unwrap(), &parse_list(outbounds).unwrap(), true)
}

async fn kubernetes_agent() -> (Agent, WorkerNodeKey, PodKey) {
    let (node, host) = (WorkerNodeKey::generate().unwrap(), PodKey::generate().unwrap());
    (Agent::start(Mode::kubernetes(host.clone(), node.public().unwrap())).await, node, host)
}

async fn checked(outbounds: &str) -> (Agent, AgentConnection<Kubernetes>) {
    let (agent, connection) = unchecked(outbounds).await;
    connection.serve_streams();
    (agent, connection)
}

/// A connection whose agent was not checked yet.
async fn unchecked(outbounds: &str) -> (Agent, AgentConnection<Kubernetes>) {
    let (agent, node, host) = kubernetes_agent().await;
    let tunnels = tunnels(outbounds);
    let (dial, host) = (dial(agent.address, &node), host.public().unwrap());
    let connection =
        ssh::connect_kubernetes(&dial, host, AuthLock::default(), tunnels.outbounds()).await.unwrap();
    let connection = AgentConnection::establish(connection, &pod(), &tunnels, None).await.unwrap();
    (agent, connection)
}

#[tokio::test]
async fn a_wrong_host_key_is_an_error_and_nothing_more_is_sent() {
    let (agent, node, _) = kubernetes_agent().await;
    let other = PodKey::generate().unwrap().public().unwrap();
    let error = ssh::connect_kubernetes(
        &dial(agent.address, &node),
        other,
        AuthLock::default(),
        tunnels("").outbounds(),
    )
    .await
    .unwrap_err();
    assert!(
        matches!(&error, ConnectError::WrongHostKey { shown } if shown.starts_with("SHA256:")),
        "{error}"
    );
    agent.seen.wait("gone", 1).await;
    // Not even the service that a user would authenticate to was asked for.
    assert_eq!(agent.seen.all(), ["connection", "gone"]);
}

#[tokio::test]
async fn the_attestation_phase_is_entered_without_proof() {
    let agent = Agent::start(Mode::attestation()).await;
    let tunnels = tunnels::<Attestation>("");
    let node = WorkerNodeKey::generate().unwrap();
    let connection =
        ssh::connect_attestation(&dial(agent.address, &node), tunnels.outbounds()).await.unwrap();
    let connection = AgentConnection::establish(connection, &pod(), &tunnels, None).await.unwrap();
    connection.serve_streams();
    assert_eq!(connection.agent().phase, Some(PhaseName::Attestation));
    assert_eq!(agent.seen.all(), ["connection", "service", "auth attestation none", "hello pod-1 out []"]);
}

#[tokio::test]
async fn an_agent_that_insists_on_a_key_gets_the_worker_nodes() {
    let node = WorkerNodeKey::generate().unwrap();
    let mode = Mode { worker: Some(node.public().unwrap()), ..Mode::attestation() };
    let agent = Agent::start(mode).await;
    ssh::connect_attestation(&dial(agent.address, &node), tunnels("").outbounds()).await.unwrap();
    assert_eq!(agent.seen.count("auth attestation proves a key"), 1);
}

#[tokio::test]
async fn a_refusal_names_the_phase_of_the_agent() {
    let (agent, node, _) = kubernetes_agent().await;
    let error =
        ssh::connect_attestation(&dial(agent.address, &node), tunnels("").outbounds()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "user 'attestation' refused (it says: Secure Comms agent in the Kubernetes phase)"
    );
    assert_eq!(error.hint(), Some(PhaseName::Kubernetes));
}

#[tokio::test]
async fn a_rejected_key_is_a_refusal_and_a_break_is_not() {
    let (agent, node, host) = kubernetes_agent().await;
    let other = WorkerNodeKey::generate().unwrap();
    let connect = |node| {
        let (dial, host) = (dial(agent.address, node), host.public().unwrap());
        async move {
            ssh::connect_kubernetes(&dial, host, AuthLock::default(), tunnels("").outbounds())
                .await
                .unwrap_err()
        }
    };
    assert!(matches!(connect(&other).await, ConnectError::Refused { phase: PhaseName::Kubernetes, .. }));
    let mode = Mode { hangs_up: true, ..Mode::kubernetes(host.clone(), node.public().unwrap()) };
    agent.become_(mode);
    let error = connect(&node).await;
    assert!(matches!(error, ConnectError::Protocol("authenticate", _)), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_ssh_fails_the_handshake() {
    let node = WorkerNodeKey::generate().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || async {
        ssh::connect_attestation(&dial(address, &node), tunnels("").outbounds()).await.unwrap_err()
    };
    let long = [b"220 ".as_slice(), &[b'x'; 5000], b"\r\n"].concat();
    let cases: [(&[u8], &str); 9] = [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "this is not an SSH server (it said 'HTTP/1.1 400 Bad Request')",
        ),
        (b"\x15\x03\x03\x00\x02\x02\x46", "this is not an SSH server (it speaks TLS)"),
        (b"220 mail ESMTP\r\n", "this is not an SSH server (it said '220 mail ESMTP')"),
        (b"\x05\xff", "this is not an SSH server (it said '\\x05\\xff')"),
        (b"\x1b[2Jforged", "this is not an SSH server (it said '\\x1b[2Jforged')"),
        (&long, "this is not an SSH server (it said '220 xxxx"),
        (
            b"SSH-1.5-OpenSSH_2.9\r\n",
            "this SSH server does not speak version 2 (it said 'SSH-1.5-OpenSSH_2.9'): update it",
        ),
        (b"", "SSH handshake: the other end closed the connection"),
        (b"SSH-2.0-x\r\n", "SSH handshake: the other end closed the connection"),
    ];
    for (said, expected) in cases {
        let server = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(said).await.unwrap();
            socket.shutdown().await.unwrap();
            // Unread bytes would make the end a reset.
            drop(tokio::io::copy(&mut socket, &mut tokio::io::sink()).await);
        };
        let (error, ()) = tokio::join!(connect(), server);
        let error = error.to_string();
        assert!(error.starts_with(expected) && error.len() < 200, "{}: {error}", said.escape_ascii());
        assert!(!error.contains("CVE"), "{error}");
    }
    drop(listener);
    let error = connect().await;
    assert!(
        matches!(error, ConnectError::Unreachable(_)) && error.to_string().contains("refused"),
        "{error}"
    );
}

#[tokio::test]
async fn an_agent_without_a_hello_times_out() {
    let node = WorkerNodeKey::generate().unwrap();
    let agent = Agent::start(Mode { hello: false, ..Mode::attestation() }).await;
    let tunnels = tunnels::<Attestation>("");
    let connection =
        ssh::connect_attestation(&dial(agent.address, &node), tunnels.outbounds()).await.unwrap();
    let established = timeout(PATIENCE, AgentConnection::establish(connection, &pod(), &tunnels, None)).await;
    let error = established.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "no answer within 5 s while waiting for the agent's hello");
    agent.seen.wait("gone", 1).await;
}

#[tokio::test]
async fn only_requested_streams_are_served() {
    let echo = crate::support::echo().await;
    let (agent, connection) = checked(&format!(
        "KUBERNETES_PHASE:up:{echo},KUBERNETES_PHASE:refused:{echo},ATTESTATION_PHASE:early:{echo}"
    ))
    .await;
    assert_eq!(agent.seen.count("forward "), 2);
    assert!(connection.tunnel_mismatches().is_some_and(|line| {
        line.contains("tunnel refused, Kubernetes phase: the agent refuses to forward its streams")
    }));
    let (handle, credits) = agent.newest();
    for name in ["early", "other", "refused", "", "127.0.0.1", "a\nb"] {
        let flow = credits.open(&TunnelName::kbs()).await.unwrap();
        let opened = handle.channel_open_forwarded_tcpip(name, 1, "127.0.0.1", flow.id()).await;
        assert!(matches!(opened, Err(russh::Error::ChannelOpenFailure(_))), "{name:?}");
    }
    let flow = credits.open(&TunnelName::kbs()).await.unwrap();
    let mut channel = handle.channel_open_forwarded_tcpip("UP", 1, "127.0.0.1", flow.id()).await.unwrap();
    channel.data_bytes("hello").await.unwrap();
    let back = timeout(PATIENCE, channel.wait()).await.unwrap();
    assert!(matches!(&back, Some(russh::ChannelMsg::Data { data }) if &data[..] == b"hello"), "{back:?}");
}

#[tokio::test]
async fn every_other_channel_of_the_agent_is_refused() {
    let (agent, connection) = checked("").await;
    let (handle, _) = agent.newest();
    let refused = |opened: Result<_, _>| matches!(opened, Err(russh::Error::ChannelOpenFailure(_)));
    assert!(refused(handle.channel_open_session().await), "session");
    assert!(refused(handle.channel_open_agent().await), "agent");
    assert!(refused(handle.channel_open_x11("127.0.0.1", 1).await), "x11");
    assert!(refused(handle.channel_open_direct_tcpip("KATAAGENT", 1, "127.0.0.1", 2).await), "direct-tcpip");
    assert!(refused(handle.channel_open_direct_streamlocal("/run/x").await), "direct-streamlocal");
    assert!(refused(handle.channel_open_forwarded_streamlocal("/run/x").await), "forwarded-streamlocal");
    assert!(!connection.link().is_gone());
}

#[tokio::test]
async fn a_dropped_connection_frees_everything() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (agent, connection) = checked(&format!("KUBERNETES_PHASE:up:{}", server.local_addr().unwrap())).await;
    let (handle, credits) = agent.newest();
    let flow = credits.open(&TunnelName::kbs()).await.unwrap();
    let opened = handle.channel_open_forwarded_tcpip("up", 1, "127.0.0.1", flow.id());
    let (channel, accepted) = tokio::join!(opened, server.accept());
    let (_channel, (mut socket, _)) = (channel.unwrap(), accepted.unwrap());
    let link = connection.link();
    drop(connection);
    // Half a stream must not look like a whole one.
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, socket.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert!(link.is_gone());
    agent.seen.wait("gone", 1).await;
}

#[tokio::test]
async fn a_bye_ends_the_connection_with_its_reason() {
    let (agent, connection) = checked("").await;
    agent.say(&Control::Bye(Bye { reason: "tired\n".into(), ..Bye::default() }));
    let why = timeout(PATIENCE, connection.ended()).await.unwrap().to_string();
    assert_eq!(why, "the agent said bye: tired\\n");
    connection.close("bye").await;
    agent.seen.wait("gone", 1).await;
}

#[tokio::test]
async fn a_proven_agents_log_arrives_as_short_lines() {
    let (agent, mut connection) = checked("").await;
    let text = format!("a\nforged: \u{1b}[2J\u{202e}{}", "x".repeat(10_000));
    agent.say(&Control::Log(LogLine { seq: 7, age: 12, level: "warning".into(), text }));
    let mut log = connection.take_log().unwrap();
    let line = timeout(PATIENCE, log.recv()).await.unwrap().unwrap();
    assert!(line.text.starts_with("a\\nforged: \\u{1b}[2J\\u{202e}xxx"), "{line:?}");
    assert!(line.text.ends_with("bytes more)") && line.text.len() < LOG_TEXT_MAX + 60, "{line:?}");
    assert_eq!((line.seq, line.age, line.level.as_str()), (7, 12, "warning"));
    // More than anyone reads takes bounded memory, and the connection goes on.
    for seq in 8..1000 {
        agent.say(&Control::Log(LogLine { seq, ..LogLine::default() }));
        tokio::task::yield_now().await;
    }
    agent.say(&Control::Bye(Bye { reason: "done".into(), ..Bye::default() }));
    timeout(PATIENCE, connection.ended()).await.unwrap();
    let mut kept = 0;
    while log.recv().await.is_some() {
        kept += 1;
    }
    assert!(kept <= 64, "{kept}");
}

#[tokio::test]
async fn an_unproven_agent_can_log_nothing_here() {
    let agent = Agent::start(Mode::attestation()).await;
    let tunnels = tunnels::<Attestation>("");
    let node = WorkerNodeKey::generate().unwrap();
    let connection =
        ssh::connect_attestation(&dial(agent.address, &node), tunnels.outbounds()).await.unwrap();
    let mut connection = AgentConnection::establish(connection, &pod(), &tunnels, None).await.unwrap();
    connection.serve_streams();
    agent.say(&Control::Log(LogLine { seq: 1, text: "advertisement".into(), ..LogLine::default() }));
    agent.say(&Control::Bye(Bye { reason: "done".into(), ..Bye::default() }));
    timeout(PATIENCE, connection.ended()).await.unwrap();
    assert_eq!(connection.take_log().unwrap().recv().await, None);
}

#[tokio::test]
async fn the_agents_reason_is_named_wherever_it_disconnects() {
    let (agent, connection) = checked("").await;
    let (handle, _) = agent.newest();
    let reason = "replaced\nby \u{1b}[2J".to_owned() + &"x".repeat(1000);
    handle.disconnect(russh::Disconnect::ByApplication, reason, "en".into()).await.unwrap();
    let why = timeout(PATIENCE, connection.ended()).await.unwrap().to_string();
    assert!(
        why.starts_with("the agent disconnected: replaced\\nby \\u{1b}[2Jxxx") && why.len() < 400,
        "{why}"
    );
}

#[tokio::test]
async fn a_session_that_ends_does_so_also_with_a_disconnect() {
    for ends_session in [false, true] {
        let (agent, connection) = checked("").await;
        let (handle, _) = agent.newest();
        agent.say(&Control::Bye(Bye { reason: "stops".into(), ends_session }));
        agent.said_bye().await;
        handle.disconnect(russh::Disconnect::ByApplication, "stops".into(), "en".into()).await.unwrap();
        let end = timeout(PATIENCE, connection.ended()).await.unwrap();
        let cause = if ends_session { EndCause::AgentWithSession } else { EndCause::Agent };
        assert_eq!(end.cause, cause, "{end}");
    }
}

#[tokio::test]
async fn an_agent_that_breaks_the_protocol_receives_the_reason() {
    let (agent, connection) = checked("").await;
    agent.say(&Control::Hello(secure_comms_protocol::Hello { credit: Some(1), ..Default::default() }));
    let why = timeout(PATIENCE, connection.ended()).await.unwrap().to_string();
    assert!(why.contains("grants less credit than a message costs"), "{why}");
    agent.seen.wait("hello came too late, or grants less credit", 1).await;
}

#[tokio::test]
async fn a_stream_that_comes_before_the_check_of_the_agent_waits() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (agent, connection) =
        unchecked(&format!("KUBERNETES_PHASE:OUT:{}", server.local_addr().unwrap())).await;
    let (handle, credits) = agent.newest();
    let (early, other) =
        (credits.open(&TunnelName::kbs()).await.unwrap(), credits.open(&TunnelName::kbs()).await.unwrap());
    let early = handle.channel_open_forwarded_tcpip("OUT", 1, "127.0.0.1", early.id());
    tokio::pin!(early);
    // The answer to the second stream shows that the first one has arrived.
    let second = async {
        let refused = handle.channel_open_forwarded_tcpip("other", 1, "127.0.0.1", other.id()).await;
        assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(_))));
    };
    tokio::select! {
        biased;
        _ = &mut early => panic!("the stream was opened before the agent was checked"),
        _ = server.accept() => panic!("the server was reached before the agent was checked"),
        () = second => {}
    }
    connection.serve_streams();
    let (opened, accepted) = tokio::join!(early, server.accept());
    opened.unwrap();
    accepted.unwrap();
}
