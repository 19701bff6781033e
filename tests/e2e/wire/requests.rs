//! Global requests of every kind (RFC 4254 4 and 7.1).

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Packet, Raw, message};

fn request(name: &str, reply: bool) -> Packet {
    Packet::new(message::GLOBAL_REQUEST).string(name).byte(reply.into())
}

/// Reply to one request: whether it was granted.
async fn granted(raw: &mut Raw, packet: &Packet) -> Result<bool> {
    raw.send(packet).await?;
    let answers = [message::REQUEST_SUCCESS, message::REQUEST_FAILURE];
    let answer = raw.expect(&answers).await.with_context(|| format!("{packet:?}"))?;
    Ok(answer[0] == message::REQUEST_SUCCESS)
}

#[tokio::test(flavor = "multi_thread")]
async fn forwards_are_granted_for_inbounds_of_the_phase_only() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    let forward = |name: &[u8], port| request("tcpip-forward", true).string(name).uint(port);
    let cancel = |name: &[u8], port| request("cancel-tcpip-forward", true).string(name).uint(port);
    let long = [b'K'; 200_000];
    for name in [
        b"NODESERVICE".as_slice(),
        b"KATAAGENT",
        b"VMSERVICE",
        b"",
        b" KBS",
        b"KBS ",
        b"KBS\0",
        b"KBS\n",
        b"KBSS",
        b"../KBS",
        b"*",
        b"0.0.0.0",
        b"127.0.0.1",
        b"localhost",
        b"/run/x.sock",
        &long,
    ] {
        for port in [0, 1, 22, u32::MAX] {
            ensure!(!granted(&mut raw, &forward(name, port)).await?, "{} granted", name.escape_ascii());
            ensure!(!granted(&mut raw, &cancel(name, port)).await?, "{} cancelled", name.escape_ascii());
        }
    }
    // Cancelled before it was requested; requested twice; cancelled twice; with any case and port.
    for (packet, expected) in [
        (cancel(b"KBS", 1), false),
        (forward(b"KBS", 1), true),
        (forward(b"kbs", u32::MAX), true),
        (cancel(b"Kbs", 77), true),
        (cancel(b"KBS", 1), false),
        (forward(b"KBS", 0), true),
    ] {
        ensure!(granted(&mut raw, &packet).await? == expected, "{packet:?}");
    }
    for _ in 0..5000 {
        raw.send(&request("tcpip-forward", false).string("KBS").uint(1)).await?;
        raw.send(&request("cancel-tcpip-forward", false).string("KBS").uint(1)).await?;
    }
    answers(&mut raw).await?;
    drop(raw);
    // Names that are not text end the connection, as other malformed fields do.
    for name in [b"\xff\xfe".as_slice(), b"KBS\x80", b"\xc3\x28"] {
        let mut raw = Raw::attestation(attacked.scene.ssh).await?;
        raw.send(&forward(name, 1)).await?;
        raw.ends().await?;
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_global_requests_are_refused_or_ignored() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    let kinds: [(&str, Packet); 12] = [
        ("keepalive@openssh.com", Packet::whole(vec![])),
        ("no-more-sessions@openssh.com", Packet::whole(vec![])),
        ("hostkeys-00@openssh.com", Packet::whole(vec![]).string([0; 51])),
        ("hostkeys-prove-00@openssh.com", Packet::whole(vec![]).string([0; 51])),
        ("streamlocal-forward@openssh.com", Packet::whole(vec![]).string("/run/x.sock")),
        ("cancel-streamlocal-forward@openssh.com", Packet::whole(vec![]).string("/run/x.sock")),
        ("elevation", Packet::whole(vec![]).byte(1)),
        ("session-open@openssh.com", Packet::whole(vec![0xa5; 1000])),
        ("", Packet::whole(vec![])),
        ("\0", Packet::whole(vec![0; 10])),
        ("ünheard-of", Packet::whole(vec![255; 200_000])),
        ("tcpip-forward ", Packet::whole(vec![]).string("KBS").uint(1)),
    ];
    for (name, fields) in &kinds {
        let with = |reply| request(name, reply).bytes(fields.payload());
        ensure!(!granted(&mut raw, &with(true)).await?, "{name:?} was granted");
        // As many replies as requests that want one.
        for _ in 0..10 {
            raw.send(&with(false)).await?;
        }
        raw.send(&Packet::open("unheard-of", 5)).await?;
        let next = raw.expect(&[message::REQUEST_FAILURE, message::CHANNEL_OPEN_FAILURE]).await?;
        ensure!(next[0] == message::CHANNEL_OPEN_FAILURE, "{name:?}: an answer to no question");
    }
    // Replies to requests that the agent did not make, and more than it made.
    for _ in 0..1000 {
        raw.send(&Packet::new(message::REQUEST_SUCCESS).uint(7)).await?;
        raw.send(&Packet::new(message::REQUEST_FAILURE)).await?;
    }
    answers(&mut raw).await?;
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_node_too_forwards_nothing_but_inbounds() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    drop(attacked.comes_up().await?);
    let mut raw = attacked.node().await?;
    for (name, expected) in
        [("NODESERVICE", true), ("KBS", true), ("KATAAGENT", false), ("VMSERVICE", false), ("NOPE", false)]
    {
        let forward = request("tcpip-forward", true).string(name).uint(1);
        ensure!(granted(&mut raw, &forward).await? == expected, "{name}");
    }
    drop(raw);
    attacked.comes_up().await.map(drop)
}
