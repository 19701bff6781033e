//! Ends without sessions work as they did before sessions: those of version 1, those that name no lane, and stock OpenSSH.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::{Control, Hello, Opening};
use secure_comms_tests::attackers::attacked_agent::AttackedAgent;
use secure_comms_tests::attackers::by_hand::{CREDIT, Echo, ForgedAgent, adaptor_hello, source};
use secure_comms_tests::attackers::raw::{Opened, RawPeer};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, client, endpoint, free_port, says_after};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Adaptors without sessions: of version 1, of version 2 without a lane, and of version 1 with what only version 2 knows.
fn without_sessions(pod: &str) -> [(&'static str, Hello); 3] {
    [
        ("version 1", Hello { version: 1, ..adaptor_hello(pod, None, None) }),
        ("no lane", adaptor_hello(pod, None, None)),
        ("a session without a lane", adaptor_hello(pod, None, Some("0123456789abcdef0123456789abcdef"))),
    ]
}

/// The credit that an end gave back for a stream.
fn credit_for(peer: &RawPeer, stream: u32) -> u64 {
    let of = |message: &Control| match message {
        Control::Credit(credit) if credit.stream == stream => u64::from(credit.bytes),
        _ => 0,
    };
    peer.seen(|seen| seen.controls.iter().map(of).sum())
}

/// An end that has no session says nothing of sessions.
fn speaks_version_1(peer: &RawPeer) -> Result<()> {
    let of_sessions = |message: &&Control| {
        matches!(message, Control::Session(_) | Control::Position(_) | Control::Streams(_) | Control::Lane(_))
    };
    let said = peer.seen(|seen| seen.controls.iter().find(of_sessions).cloned());
    ensure!(said.is_none(), "it says {said:?}");
    Ok(())
}

/// Waits until the server in the VM has this many open connections. There is no event to await, so this polls.
async fn serves(attacked: &AttackedAgent, open: u64) -> Result<()> {
    let poll = async {
        while attacked.scene.vm_service.open() != open {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let polled = timeout(PATIENCE, poll).await;
    polled.with_context(|| format!("{} open connections instead of {open}", attacked.scene.vm_service.open()))
}

/// Sends 100 KiB to the echo, with the credit that comes back, and gives credit back for what it brings.
async fn echoes_with_credit(peer: &RawPeer, stream: u32) -> Result<Opened> {
    const MESSAGE: usize = 4096;
    const MESSAGES: usize = 25;
    let channel = peer.open("VMSERVICE", stream, Opening::New).await?;
    peer.data(channel, [1, 0, 0, 0, 0, 0, 0, 0]).await?;
    let mut spent = 512;
    for number in 1..=MESSAGES {
        spent += MESSAGE as u64;
        peer.until("credit", |_| (u64::from(CREDIT) + credit_for(peer, stream) >= spent).then_some(()))
            .await?;
        peer.data(channel, [number as u8; MESSAGE]).await?;
        let echoed = peer.bytes(channel, 0, number * MESSAGE).await?;
        ensure!(echoed[(number - 1) * MESSAGE..] == [number as u8; MESSAGE], "message {number} is another");
        peer.say(Control::Credit(secure_comms_protocol::Credit { stream, bytes: MESSAGE as u32 })).await?;
    }
    Ok(channel)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_without_sessions_works_as_before() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for (case, hello) in without_sessions(&attacked.scene.pod) {
        let context = || format!("{case}\n{}", attacked.agent.log());
        let peer = RawPeer::greet(attacked.node().await?, hello.clone()).await?;
        echoes_with_credit(&peer, 1).await.with_context(context)?;
        // Without credit from us, the agent sends no more than the initial credit.
        let channel = peer.open("VMSERVICE", 3, Opening::New).await?;
        peer.data(channel, source(1 << 20)).await?;
        peer.bytes(channel, 0, CREDIT as usize / 2).await?;
        peer.settles().await?;
        let came = peer.seen(|seen| seen.channels[&channel.ours].messages.concat().len());
        ensure!(came <= CREDIT as usize, "{case}: {came} bytes");
        // The agent's streams come without a lane's wait or a position.
        peer.offer("NODESERVICE").await?;
        let mut local = client(attacked.scene.node_inbound).await?;
        local.write_all(b"hello").await?;
        let asked = peer.asked(|asked| asked.tunnel == "NODESERVICE").await.with_context(context)?;
        let channel = peer.accept(&asked).await?;
        ensure!(peer.bytes(channel, 0, 5).await? == b"hello");
        peer.data(channel, b"served").await?;
        let mut answer = [0; 6];
        timeout(PATIENCE, local.read_exact(&mut answer)).await.context("no answer")??;
        ensure!(&answer == b"served");
        speaks_version_1(&peer).context(case)?;

        // Its streams end with their connection.
        drop(peer);
        let mut rest = Vec::new();
        drop(
            timeout(PATIENCE, local.read_to_end(&mut rest))
                .await
                .context("the client waits")
                .with_context(context)?,
        );
        serves(&attacked, 0).await.with_context(context)?;

        // Nothing of them can go on, and a newer login replaces an older one, with a reason.
        let older = RawPeer::greet(attacked.node().await?, hello.clone()).await?;
        echoes_with_credit(&older, 1).await.with_context(context)?;
        let newer = RawPeer::greet(attacked.node().await?, hello).await?;
        echoes_with_credit(&newer, 1).await.with_context(context)?;
        let reason = older.ends().await.with_context(context)?;
        ensure!(!reason.is_empty() && !older.session_is_ended(), "{case}: {reason}");
        drop(newer);
        serves(&attacked, 0).await.with_context(context)?;
    }
    attacked.serves_sessions().await
}

/// An id is nothing without a lane: the originator address of a plain adaptor's open may be any text.
#[tokio::test(flavor = "multi_thread")]
async fn a_resume_without_a_session_is_refused_or_new() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for (case, hello) in without_sessions(&attacked.scene.pod) {
        let peer = RawPeer::greet(attacked.node().await?, hello).await?;
        for (stream, originator) in
            [(1, "resume 8 32768"), (3, "again 0 0"), (5, "resume 18446744073709551615 0")]
        {
            let asked = peer.ask("VMSERVICE", stream, originator).await?;
            if let Ok(channel) = peer.answer(asked).await? {
                peer.data(channel, [1, 0, 0, 0, 0, 0, 0, 0]).await?;
                peer.data(channel, b"hello").await?;
                ensure!(peer.bytes(channel, 0, 5).await? == b"hello", "{case}: {originator}");
            }
        }
        peer.streams(&[1, 2, 3]).await?;
        peer.position(1, secure_comms_protocol::Position { received: u64::MAX, granted: u64::MAX }).await?;
        peer.lives().await.with_context(|| format!("{case}\n{}", attacked.agent.log()))?;
        speaks_version_1(&peer)?;
    }
    attacked.serves_sessions().await
}

/// An adaptor without sessions is a newer adaptor all the same: the session before it ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_adaptor_without_sessions_ends_a_session() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for (case, hello) in without_sessions(&attacked.scene.pod) {
        let context = || format!("{case}\n{}", attacked.agent.log());
        let (main, id) = attacked.session().await?;
        let mut echo = Echo::open(&main, 1).await?;
        echo.echoes(&main, b"in a session").await?;
        let plain = RawPeer::greet(attacked.node().await?, hello).await?;
        echoes_with_credit(&plain, 1).await.with_context(context)?;
        main.ends().await.with_context(context)?;
        ensure!(main.session_is_ended(), "the session goes on: {}", context());
        let later = attacked.lane("main", Some(&id)).await?.session().await?;
        ensure!(!later.resumed, "{case}: {later:?}");
    }
    attacked.serves_sessions().await
}

/// A client of the adaptor's `tunnel`, which has sent these bytes.
async fn local(forged: &ForgedAgent, tunnel: &str, bytes: &[u8]) -> Result<TcpStream> {
    let mut local = client(endpoint(&forged.adaptor, tunnel).await?).await?;
    local.write_all(bytes).await?;
    Ok(local)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_sessions_works_as_before() -> Result<()> {
    let forged = ForgedAgent::new(|hello| hello.version = 1).await?;
    let mut mark = 0;
    for round in 0..2 {
        let context = || format!("round {round}\n{}", forged.adaptor.log());
        // An adaptor of version 2 names its lane before it knows the agent's version.
        let (peer, hello) = forged.next(Some("main")).await?;
        ensure!(hello.session.is_none(), "it names a session that no agent began: {hello:?}");
        says_after(&forged.adaptor, mark, "kubernetes phase up").await.with_context(context)?;
        mark = forged.adaptor.mark();
        let mut clients = Vec::new();
        for (tunnel, bytes) in [("KATAAGENT", b"for the kata agent"), ("VMSERVICE", b"for the VM service")] {
            let mut local = local(&forged, tunnel, bytes).await?;
            // All on the one connection.
            let asked = peer.asked(|asked| asked.tunnel == tunnel).await.with_context(context)?;
            ensure!(asked.originator == Opening::New.to_string(), "{asked:?}");
            let channel = peer.accept(&asked).await?;
            ensure!(peer.bytes(channel, 0, bytes.len()).await? == bytes);
            // It gives credit back, once half of the window is used up.
            for number in 0..5_u8 {
                peer.data(channel, [number; 4096]).await?;
            }
            let mut came = vec![0; 5 * 4096];
            timeout(PATIENCE, local.read_exact(&mut came)).await.with_context(context)??;
            peer.until("credit", |_| (credit_for(&peer, asked.stream) > 0).then_some(()))
                .await
                .with_context(context)?;
            clients.push(local);
        }
        speaks_version_1(&peer)?;
        // The streams end with their connection, and clients know at once.
        drop(peer);
        for mut local in clients {
            let mut rest = Vec::new();
            drop(
                timeout(PATIENCE, local.read_to_end(&mut rest))
                    .await
                    .context("the client waits")
                    .with_context(context)?,
            );
            ensure!(rest.is_empty(), "{:?}", rest.escape_ascii().to_string());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_openssh_has_no_part_in_a_session_that_lingers() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    let (main, id) = attacked.session().await?;
    main.offer("NODESERVICE").await?;
    let mut echo = Echo::open(&main, 1).await?;
    echo.echoes(&main, b"before").await?;
    let files = attacked.agent.open_files()?;
    drop(main);
    // The session lingers: its stream is open, and no connection.
    attacked.agent.wait_for_files(files - 1, PATIENCE).await?;
    ensure!(attacked.scene.vm_service.open() == 1);

    let public = attacked.scene.pod_key().context("the pod has no key")?;
    let public = russh::keys::PrivateKey::from_openssh(public)?.public_key().to_openssh()?;
    let ssh = OpenSsh::new(attacked.scene.ssh)?
        .identity_file(attacked.scene.path("store").join("worker-node.key"))
        .host_key(&public)?;
    let status = ssh.command("kubernetes", &["-s"], &["secure-comms-status"]).output().await?;
    ensure!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    println!("status while a session lingers: {}", String::from_utf8_lossy(&status.stdout));

    // A guest with tunnels, in both directions. The agent's client waits for the session, and does not go to the guest.
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let reverse = format!("NODESERVICE:1:{}", server.local_addr()?);
    let forward = format!("{}:VMSERVICE:1", free_port()?);
    let options = ["-v", "-N", "-R", &reverse, "-L", &forward];
    let mut guest = Child::spawn("ssh", ssh.command("kubernetes", &options, &[]))?;
    guest.wait_for_text("remote forward success", PATIENCE).await?;
    let mut waits = client(attacked.scene.node_inbound).await?;
    waits.write_all(b"for the worker node").await?;

    let next = attacked.resumed_with("main", &id, &[1], "NODESERVICE").await;
    let next = next.with_context(|| attacked.agent.log())?;
    echo.resume(&next).await.with_context(|| attacked.agent.log())?;
    echo.echoes(&next, b"after").await.with_context(|| attacked.agent.log())?;
    let asked =
        next.asked(|asked| asked.tunnel == "NODESERVICE").await.with_context(|| attacked.agent.log())?;
    let channel = next.accept(&asked).await?;
    let skip = usize::from(asked.originator != Opening::New.to_string());
    if skip == 1 {
        next.data(
            channel,
            secure_comms_protocol::Position { received: 0, granted: CREDIT.into() }.to_bytes(),
        )
        .await?;
    }
    ensure!(next.bytes(channel, 0, 19).await? == b"for the worker node");
    ensure!(guest.rss_kib().is_ok(), "the guest has left: {}", guest.log());
    let reached = timeout(Duration::ZERO, server.accept()).await;
    ensure!(reached.is_err(), "a guest got a client of the session");
    guest.kill9().await?;
    attacked.serves_sessions().await
}
