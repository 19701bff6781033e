//! Sessions over connections in memory: streams of real sockets go on whenever and wherever a connection is cut.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use harness::lanes::{Sessions, open};
use harness::{FIXED, Watchdog, check_end, check_pattern, write_pattern};
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::flow::Side;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// Longer than anything takes, of paused time.
const LONG: Duration = Duration::from_secs(600);

/// A program at one end: sends its bytes and its end, and expects those of the other.
async fn exchange(mut socket: UnixStream, out: (u64, usize), back: (u64, usize)) {
    let (mut read, mut write) = socket.split();
    let send = async {
        write_pattern(&mut write, out.0, out.1, 3_000).await;
        write.shutdown().await.unwrap();
    };
    let receive = async {
        check_pattern(&mut read, back.0, back.1).await;
        check_end(&mut read).await;
    };
    tokio::join!(send, receive);
}

/// Waits until both ends have forgotten all streams.
async fn settled(sessions: &Sessions) {
    let open = || [&sessions.adaptor, &sessions.agent].map(|end| end.credits().open_streams());
    while open() != [0, 0] {
        sleep(Duration::from_millis(10)).await;
    }
    let waiting = [&sessions.adaptor, &sessions.agent].map(|end| end.waiting_streams());
    assert_eq!(waiting, [0, 0], "a stream without a place is kept");
}

/// One stream with bytes in both directions, with a cut when `cut_at` messages were sent. Returns how many were.
async fn one_stream(side: Side, name: TunnelName, cut_at: usize) -> usize {
    let (sessions, mut servers) = Sessions::new(FIXED, Duration::from_millis(30));
    sessions.cut_at.store(cut_at, SeqCst);
    for lane in Lane::ALL {
        sessions.connect(lane);
        tokio::spawn(sessions.clone().keep_connected(lane, Duration::from_millis(300)));
    }
    let work = async {
        let client = open(&sessions, side, &name).await;
        let (served, server) = servers.recv().await.unwrap();
        assert_eq!(served, name);
        tokio::join!(
            exchange(client, (1, 100_000), (2, 300_000)),
            exchange(server, (2, 300_000), (1, 100_000))
        );
        settled(&sessions).await;
    };
    let done = timeout(LONG, work).await;
    done.unwrap_or_else(|_| {
        panic!(
            "{side:?} {name}, cut after {cut_at}: {:?} {:?}",
            sessions.adaptor.end_reason(),
            sessions.agent.end_reason()
        )
    });
    sessions.sent()
}

async fn every_cut(side: Side, name: TunnelName) {
    let _watchdog = Watchdog::new();
    let sent = one_stream(side, name.clone(), usize::MAX).await;
    assert!(sent > 20, "{sent} messages");
    for cut_at in 1..=sent {
        one_stream(side, name.clone(), cut_at).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_the_adaptor_survives_a_cut_at_any_message() {
    every_cut(Side::Adaptor, TunnelName::kata_agent()).await;
    every_cut(Side::Adaptor, TunnelName::kbs()).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_the_agent_survives_a_cut_at_any_message() {
    every_cut(Side::Agent, TunnelName::kbs()).await;
}
