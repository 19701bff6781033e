//! Sessions whose two lanes say things at the same time: whatever crosses on the way, each stream goes on over one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::lanes::{LATENCY, Sessions, open};
use harness::{FIXED, Watchdog, check_end, check_pattern, write_pattern};
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::flow::Side;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Longer than anything takes, of paused time.
const LONG: Duration = Duration::from_secs(600);

/// Bytes that a client sends before it leaves.
const LAST: usize = 5_000;

/// The servers' ends of the streams that were accepted.
type Servers = mpsc::UnboundedReceiver<(TunnelName, UnixStream)>;

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

/// Streams of the runtime that come and go: each ends with a ping on the main lane.
async fn answer_pings_on_main(sessions: &Arc<Sessions>, servers: &mut Servers, pings: usize) {
    for _ in 0..pings {
        let client = open(sessions, Side::Adaptor, &TunnelName::kata_agent()).await;
        let (_, server) = servers.recv().await.unwrap();
        drop((client, server));
        settled(sessions).await;
    }
}

/// Waits until both ends have forgotten all streams. All sleeps of these tests are of the paused clock: it moves once every task
/// waits, so they wait for no processor.
async fn settled(sessions: &Sessions) {
    let open = || [&sessions.adaptor, &sessions.agent].map(|end| end.credits().open_streams());
    let ends = async {
        while open() != [0, 0] {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let done = timeout(LONG, ends).await;
    done.unwrap_or_else(|_| panic!("streams that are left at the two ends: {:?}", open()));
}

/// A stream of the data lane, whose client has left over a line that carries nothing any more. What it has sent last and
/// its close are with the adaptor. Returns the server's end.
async fn left_behind(sessions: &Arc<Sessions>, servers: &mut Servers) -> UnixStream {
    let mut client = open(sessions, Side::Adaptor, &TunnelName::kbs()).await;
    let (_, mut server) = servers.recv().await.unwrap();
    carries(&mut client, &mut server, sessions).await;
    server.shutdown().await.unwrap();
    check_end(&mut client).await;
    let data = sessions.wire(Lane::Data).unwrap();
    data.cut_for(Side::Agent);
    write_pattern(&mut client, 3, LAST, 3_000).await;
    // Both directions have ended: the relay closes.
    drop(client);
    // The relay has passed all of it to the connection that carries nothing.
    sleep(4 * LATENCY).await;
    data.cut_for(Side::Adaptor);
    sleep(LATENCY).await;
    server
}

/// The server has all that the client had sent before it left.
async fn has_the_last(mut server: UnixStream) {
    let all = async {
        check_pattern(&mut server, 3, LAST).await;
        check_end(&mut server).await;
    };
    timeout(LONG, all).await.expect("the server waits for what the client has sent last");
}

/// The main lane, onto which it falls back, has answered more pings than the lane that carried its close.
#[tokio::test(start_paused = true)]
async fn a_close_under_way_survives_a_fall_back_that_is_cut() {
    let _watchdog = Watchdog::new();
    for replaced_after in [1, 15, 25, 35, 45, 60, 80] {
        let (sessions, mut servers) = Sessions::new(FIXED, Duration::ZERO);
        sessions.connect(Lane::Main);
        answer_pings_on_main(&sessions, &mut servers, 3).await;
        sessions.connect(Lane::Data);
        let server = left_behind(&sessions, &mut servers).await;
        let fall_back = tokio::spawn({
            let sessions = Arc::clone(&sessions);
            async move { sessions.fall_back().await }
        });
        sleep(Duration::from_millis(replaced_after)).await;
        sessions.connect(Lane::Main);
        has_the_last(server).await;
        settled(&sessions).await;
        timeout(LONG, fall_back).await.unwrap().unwrap();
    }
}

/// A pong on the main lane answers no close that another lane has carried.
#[tokio::test(start_paused = true)]
async fn a_pong_during_a_fall_back_ends_no_stream() {
    let _watchdog = Watchdog::new();
    let (sessions, mut servers) = Sessions::new(FIXED, Duration::ZERO);
    sessions.connect(Lane::Main);
    answer_pings_on_main(&sessions, &mut servers, 3).await;
    sessions.connect(Lane::Data);
    let server = left_behind(&sessions, &mut servers).await;
    let main = sessions.number(Lane::Main).unwrap();
    let fall_back = tokio::spawn({
        let sessions = Arc::clone(&sessions);
        async move { sessions.fall_back().await }
    });
    // The agent has not confirmed it.
    sleep(LATENCY).await;
    sessions.adaptor.pinged(main);
    sessions.adaptor.ponged(main);
    has_the_last(server).await;
    settled(&sessions).await;
    assert_eq!(timeout(LONG, fall_back).await.unwrap().unwrap(), 1);
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
