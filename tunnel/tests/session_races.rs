//! Sessions whose two lanes say things at the same time: whatever crosses on the way, each stream goes on over one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::lanes::{LATENCY, Sessions, open};
use harness::{FIXED, Watchdog, check_pattern, write_pattern};
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::flow::Side;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

/// Longer than anything takes, of paused time.
const LONG: Duration = Duration::from_secs(600);

/// Both ends of a stream carry bytes in both directions.
async fn carries(client: &mut UnixStream, server: &mut UnixStream, sessions: &Sessions) {
    let both = async {
        write_pattern(client, 1, 20_000, 3_000).await;
        check_pattern(server, 1, 20_000).await;
        write_pattern(server, 2, 20_000, 3_000).await;
        check_pattern(client, 2, 20_000).await;
    };
    let done = timeout(LONG, both).await;
    done.unwrap_or_else(|_| {
        panic!("{:?} {:?}", sessions.adaptor.end_reason(), sessions.agent.end_reason());
    });
}

/// The list was made before the stream, and came later, on another connection.
#[tokio::test(start_paused = true)]
async fn an_older_list_of_streams_ends_no_stream_that_is_asked_for() {
    let _watchdog = Watchdog::new();
    let connecting = Duration::from_secs(1);
    let (sessions, mut servers) = Sessions::new(FIXED, connecting);
    sessions.connect(Lane::Main);
    sessions.connect(Lane::Data);
    let opening = tokio::spawn({
        let sessions = Arc::clone(&sessions);
        async move { open(&sessions, Side::Adaptor, &TunnelName::kata_agent()).await }
    });
    // The agent has been asked, and connects to its server.
    sleep(connecting / 2).await;
    sessions.agent.peer_knows(&[], sessions.number(Lane::Data).unwrap());
    let mut client = timeout(LONG, opening).await.unwrap().unwrap();
    let (_, mut server) = servers.recv().await.unwrap();
    // Nor one that is open.
    sessions.agent.peer_knows(&[], sessions.number(Lane::Data).unwrap());
    carries(&mut client, &mut server, &sessions).await;
}

/// The adaptor gives the data lane up for the main one, and has it again before the agent's answer.
#[tokio::test(start_paused = true)]
async fn a_stream_that_falls_back_while_its_lane_returns_goes_on() {
    let _watchdog = Watchdog::new();
    for returns_after in [0, 5, 15, 25, 35, 45, 60, 80, 120] {
        let (sessions, mut servers) = Sessions::new(FIXED, Duration::ZERO);
        sessions.connect(Lane::Main);
        sessions.connect(Lane::Data);
        let mut client = open(&sessions, Side::Adaptor, &TunnelName::kbs()).await;
        let (_, mut server) = servers.recv().await.unwrap();
        carries(&mut client, &mut server, &sessions).await;
        sessions.wire(Lane::Data).unwrap().cut();
        sleep(LATENCY).await;
        let main = sessions.number(Lane::Main).unwrap();
        // As in the adaptor: the attempt is dropped when the lane is there.
        let fall_back = sessions.adaptor.resume(Lane::Data, main);
        let returns = Duration::from_millis(returns_after);
        drop(timeout(returns, fall_back).await);
        sessions.connect(Lane::Data);
        carries(&mut client, &mut server, &sessions).await;
        // And once more, wherever it is now.
        sleep(4 * LATENCY).await;
        carries(&mut client, &mut server, &sessions).await;
        for lane in Lane::ALL {
            sessions.connect(lane);
        }
        carries(&mut client, &mut server, &sessions).await;
    }
}
