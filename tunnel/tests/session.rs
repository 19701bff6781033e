//! Sessions over connections in memory: streams of real sockets go on whenever and wherever a connection is cut.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use harness::lanes::{Sessions, open};
use harness::{BULK, FIXED, Watchdog, check_end, check_pattern, unix, write_pattern};
use secure_comms_protocol::control::StreamPosition;
use secure_comms_protocol::{Lane, TunnelName};
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::{Link, relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The servers' ends of the streams that were accepted.
type Servers = mpsc::UnboundedReceiver<(TunnelName, UnixStream)>;

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

/// Where the connection is cut, by the number of a message.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Sent(usize),
    Arrived(usize),
    Never,
}

/// One stream with bytes in both directions. Returns how many messages were sent.
async fn one_stream(side: Side, name: TunnelName, cut: Cut) -> usize {
    let (sessions, mut servers) = connected(Duration::from_millis(30));
    match cut {
        Cut::Sent(at) => sessions.count.cut_sent.store(at, SeqCst),
        Cut::Arrived(at) => sessions.count.cut_arrived.store(at, SeqCst),
        Cut::Never => {}
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
    timeout(LONG, work).await.unwrap_or_else(|_| panic!("{side:?} {name} {cut:?} {}", reasons(&sessions)));
    sessions.sent()
}

/// Why the session has ended, at both ends.
fn reasons(sessions: &Sessions) -> String {
    format!("{:?}", [sessions.adaptor.end_reason(), sessions.agent.end_reason()])
}

/// A small stream with bytes in both directions, to its end.
async fn transfer(sessions: &Arc<Sessions>, mut servers: Servers, side: Side) {
    let client = open(sessions, side, &TunnelName::kbs()).await;
    let (_, server) = servers.recv().await.unwrap();
    tokio::join!(exchange(client, (1, 10_000), (2, 40_000)), exchange(server, (2, 40_000), (1, 10_000)));
    settled(sessions).await;
}

async fn every_cut(side: Side, name: TunnelName) {
    let _watchdog = Watchdog::new();
    let sent = one_stream(side, name.clone(), Cut::Never).await;
    assert!(sent > 20, "{sent} messages");
    for at in 1..=sent {
        one_stream(side, name.clone(), Cut::Sent(at)).await;
        one_stream(side, name.clone(), Cut::Arrived(at)).await;
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

/// Connects both lanes, and again when they are cut.
fn connected(connecting: Duration) -> (Arc<Sessions>, Servers) {
    let (sessions, servers) = Sessions::new(FIXED, connecting);
    for lane in Lane::ALL {
        sessions.connect(lane);
        tokio::spawn(sessions.clone().keep_connected(lane, Duration::from_millis(300)));
    }
    (sessions, servers)
}

#[tokio::test(start_paused = true)]
async fn a_stream_survives_any_two_cuts_one_after_the_other() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for first in 1..40 {
            for second in first + 1..first + 14 {
                let (sessions, servers) = connected(Duration::from_millis(30));
                sessions.count.cut_sent.store(first, SeqCst);
                let again = async {
                    while sessions.sent() < first {
                        sleep(Duration::from_millis(1)).await;
                    }
                    sessions.count.cut_sent.store(second, SeqCst);
                    pending().await
                };
                tokio::select! {
                    done = timeout(LONG, transfer(&sessions, servers, side)) => {
                        done.unwrap_or_else(|_| panic!("{side:?}, cut after {first} and {second}"));
                    }
                    () = again => {}
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_survives_a_failover_at_any_time() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for at in 0..80 {
            for old_lives in [0, 15, 35, 60] {
                let (sessions, servers) = connected(Duration::from_millis(70));
                let replaced = async {
                    sleep(Duration::from_millis(5 * at)).await;
                    sessions.replace(Lane::Data, Duration::from_millis(old_lives));
                    pending().await
                };
                tokio::select! {
                    done = timeout(LONG, transfer(&sessions, servers, side)) => {
                        done.unwrap_or_else(|_| panic!("{side:?}, after {} ms, {old_lives} ms", 5 * at));
                    }
                    () = replaced => {}
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_may_take_long_to_connect_to_while_connections_are_cut() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        let (sessions, servers) = connected(Duration::from_secs(100));
        let cuts = async {
            for _ in 0..3 {
                sleep(Duration::from_secs(15)).await;
                sessions.wire(Lane::Data).unwrap().cut();
            }
            pending().await
        };
        tokio::select! {
            done = timeout(LONG, transfer(&sessions, servers, side)) => {
                done.unwrap_or_else(|_| panic!("{side:?}: {:?}", sessions.adaptor.end_reason()));
            }
            () = cuts => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn credit_given_back_while_a_stream_resumes_is_not_lost() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for reads_at in (0..60).step_by(4) {
            let (sessions, mut servers) = connected(Duration::from_millis(30));
            let client = open(&sessions, side, &TunnelName::kbs()).await;
            let (_, server) = servers.recv().await.unwrap();
            for (writes, reads) in [(client, server)] {
                let (mut reader, mut writer) = (reads, writes);
                // Both kernel buffers and the window are full.
                let write = tokio::spawn(async move {
                    write_pattern(&mut writer, 1, BULK / 16, 50_000).await;
                    writer.shutdown().await.unwrap();
                    writer
                });
                sleep(Duration::from_secs(3)).await;
                sessions.wire(Lane::Data).unwrap().cut();
                // The new connection is made after 300 ms; the position is under way from then on.
                sleep(Duration::from_millis(299 + reads_at)).await;
                timeout(LONG, check_pattern(&mut reader, 1, BULK / 16))
                    .await
                    .unwrap_or_else(|_| panic!("{side:?}: no credit after {reads_at} ms"));
                check_end(&mut reader).await;
                reader.shutdown().await.unwrap();
                drop(write.await.unwrap());
            }
            timeout(LONG, settled(&sessions)).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn streams_fall_back_to_the_main_lane() {
    let _watchdog = Watchdog::new();
    // The time after which the agent notices, too.
    for notices in [0, 10, 40_000] {
        let (sessions, mut servers) = Sessions::new(FIXED, Duration::ZERO);
        Lane::ALL.into_iter().for_each(|lane| sessions.connect(lane));
        let mut streams = JoinSet::new();
        for (at, side) in [(0, Side::Adaptor), (1, Side::Agent)] {
            let client = open(&sessions, side, &TunnelName::kbs()).await;
            let (_, server) = servers.recv().await.unwrap();
            let wire = sessions.wire(Lane::Data).unwrap();
            streams.spawn(async move {
                let (out, back) = ((at, 400_000), (at + 10, 300_000));
                tokio::join!(exchange(client, out, back), exchange(server, back, out));
                drop(wire);
            });
        }
        let (data, main) = (sessions.wire(Lane::Data).unwrap(), sessions.wire(Lane::Main).unwrap());
        sleep(Duration::from_millis(100)).await;
        data.cut_for(Side::Adaptor);
        tokio::spawn(async move {
            sleep(Duration::from_millis(notices)).await;
            data.cut_for(Side::Agent);
        });
        sleep(Duration::from_millis(5)).await;
        assert_eq!(sessions.fall_back().await, 2);
        let done =
            timeout(LONG, async { while streams.join_next().await.is_some_and(|ended| ended.is_ok()) {} });
        done.await.unwrap_or_else(|_| panic!("{notices} ms: {}", reasons(&sessions)));
        timeout(LONG, settled(&sessions)).await.unwrap();
        assert!(!main.is_dead(Side::Adaptor));
    }
}

/// The next of some numbers without an order.
fn scramble(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Cuts lanes at times without an order, at both ends at once or at one first.
async fn cut_often(sessions: Arc<Sessions>, mut seed: u64) {
    loop {
        sleep(Duration::from_millis(scramble(&mut seed) % 900)).await;
        let lane = Lane::ALL[usize::from(scramble(&mut seed).is_multiple_of(2))];
        let wire = sessions.wire(lane).unwrap();
        match scramble(&mut seed) % 3 {
            0 => wire.cut(),
            1 => wire.cut_for(Side::Adaptor),
            _ => sessions.replace(lane, Duration::from_millis(scramble(&mut seed) % 60)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn many_streams_and_a_stalled_reader_survive_many_cuts() {
    let _watchdog = Watchdog::new();
    for seed in 0..6 {
        let (sessions, mut servers) = connected(Duration::from_millis(25));
        let (stalled, stalled_near) = {
            let mut client = open(&sessions, Side::Agent, &TunnelName::kbs()).await;
            let (_, server) = servers.recv().await.unwrap();
            let writes = tokio::spawn(async move {
                write_pattern(&mut client, 99, BULK / 16, 40_000).await;
                client.shutdown().await.unwrap();
                client
            });
            (server, writes)
        };
        let cuts = tokio::spawn(cut_often(sessions.clone(), seed));
        let mut streams = JoinSet::new();
        for at in 0..12 {
            let (side, name) = match at % 3 {
                0 => (Side::Adaptor, TunnelName::kata_agent()),
                1 => (Side::Adaptor, TunnelName::kbs()),
                _ => (Side::Agent, TunnelName::kbs()),
            };
            // One after the other: a server is that of the client before it.
            let client = open(&sessions, side, &name).await;
            let (_, server) = servers.recv().await.unwrap();
            let (out, back) = ((at, 30_000 * at as usize), (at + 50, 500_000 - 30_000 * at as usize));
            streams
                .spawn(async move { tokio::join!(exchange(client, out, back), exchange(server, back, out)) });
        }
        let rest = async {
            while let Some(ended) = streams.join_next().await {
                ended.unwrap();
            }
            let mut stalled = stalled;
            check_pattern(&mut stalled, 99, BULK / 16).await;
            check_end(&mut stalled).await;
            drop((stalled, stalled_near.await.unwrap()));
            settled(&sessions).await;
        };
        timeout(LONG, rest).await.unwrap_or_else(|_| panic!("seed {seed}: {}", reasons(&sessions)));
        cuts.abort();
        assert!(sessions.connections() > 6, "{} connections", sessions.connections());
    }
}

#[tokio::test(start_paused = true)]
async fn a_program_that_leaves_at_any_time_ends_the_stream_at_both_ends() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for cut_at in (1..60).step_by(2) {
            for leaves_at in [40, 90, 350, 420] {
                let (sessions, mut servers) = connected(Duration::from_millis(30));
                sessions.count.cut_sent.store(cut_at, SeqCst);
                let client = open(&sessions, side, &TunnelName::kbs()).await;
                let (_, mut server) = servers.recv().await.unwrap();
                let writes = tokio::spawn(async move {
                    let (mut read, mut write) = server.split();
                    // Either fails once the other end is gone.
                    let (mut bytes, mut sink) = (tokio::io::repeat(7).take(2_000_000), tokio::io::sink());
                    let sent = tokio::io::copy(&mut bytes, &mut write);
                    let drained = tokio::io::copy(&mut read, &mut sink);
                    drop(tokio::join!(sent, drained));
                });
                sleep(Duration::from_millis(leaves_at)).await;
                drop(client);
                let ends = async {
                    writes.await.unwrap();
                    settled(&sessions).await;
                };
                let context = || panic!("{side:?}, cut after {cut_at}, left after {leaves_at} ms");
                timeout(LONG, ends).await.unwrap_or_else(|_| context());
                assert_eq!(reasons(&sessions), "[None, None]");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_before_the_answer_leaves_nothing() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for cut_at in [5, 30, 60, 200, 390, 410] {
            for leaves_at in [10, 35, 80, 230, 370, 500, 690] {
                let (sessions, mut servers) = connected(Duration::from_millis(700));
                let wire = sessions.wire(Lane::Data).unwrap();
                tokio::spawn(async move {
                    sleep(Duration::from_millis(cut_at)).await;
                    wire.cut();
                });
                let name = TunnelName::kbs();
                let opens = open(&sessions, side, &name);
                assert!(timeout(Duration::from_millis(leaves_at), opens).await.is_err());
                // The server's side of what was accepted all the same sees an end.
                let ends = async {
                    sleep(Duration::from_secs(2)).await;
                    while let Ok((_, mut server)) = servers.try_recv() {
                        assert_eq!(server.read(&mut [0; 16]).await.unwrap_or(0), 0);
                    }
                    settled(&sessions).await;
                };
                let context = || panic!("{side:?}, cut after {cut_at} ms, left after {leaves_at} ms");
                timeout(LONG, ends).await.unwrap_or_else(|_| context());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_session_resets_its_streams() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        for is_cut in [false, true] {
            let (sessions, mut servers) = connected(Duration::ZERO);
            let mut client = open(&sessions, side, &TunnelName::kbs()).await;
            let (_, mut server) = servers.recv().await.unwrap();
            write_pattern(&mut client, 1, 1000, 1000).await;
            check_pattern(&mut server, 1, 1000).await;
            if is_cut {
                sessions.wire(Lane::Data).unwrap().cut();
            }
            sessions.adaptor.end("a test");
            sessions.agent.end("its other end");
            // A unix socket has no reset: its reader sees an end.
            check_end(&mut client).await;
            check_end(&mut server).await;
            timeout(LONG, settled(&sessions)).await.unwrap();
            assert_eq!(sessions.adaptor.ended().await, "a test");
            assert!(sessions.adaptor.link().is_gone());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_relay_that_is_dropped_ends_its_stream_at_the_other_end() {
    let _watchdog = Watchdog::new();
    for side in [Side::Adaptor, Side::Agent] {
        let (sessions, mut servers) = connected(Duration::ZERO);
        let (mut client, socket) = unix();
        let stream = sessions.session(side).link().open(&TunnelName::kbs()).await.unwrap();
        let relay = tokio::spawn(relay(socket, stream));
        let (_, mut server) = servers.recv().await.unwrap();
        write_pattern(&mut client, 1, 1000, 1000).await;
        check_pattern(&mut server, 1, 1000).await;
        relay.abort();
        timeout(LONG, check_end(&mut server)).await.unwrap();
        timeout(LONG, settled(&sessions)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_wants_the_lane_of_streams_that_the_adaptor_has_not_heard_of() {
    let _watchdog = Watchdog::new();
    for cut_at in [10, 30, 50, 90, 130] {
        let (sessions, servers) = Sessions::new(FIXED, Duration::from_millis(60));
        Lane::ALL.into_iter().for_each(|lane| sessions.connect(lane));
        let connects = sessions.clone();
        let lanes = tokio::spawn(async move {
            sleep(Duration::from_millis(cut_at)).await;
            connects.wire(Lane::Data).unwrap().cut();
            let lane = connects.agent.lane_wanted().await;
            assert_eq!(lane, Lane::Data);
            connects.connect(lane);
        });
        let done = timeout(LONG, transfer(&sessions, servers, Side::Agent)).await;
        done.unwrap_or_else(|_| panic!("cut after {cut_at} ms"));
        lanes.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_younger_than_a_list_survives_it() {
    let _watchdog = Watchdog::new();
    let (sessions, mut servers) = connected(Duration::ZERO);
    let data = sessions.wire(Lane::Data).unwrap();
    // A slow connection: its list arrives after the stream, and after the stream's connection has ended for the agent.
    *sessions.latency.lock().unwrap() = Duration::from_millis(200);
    sessions.connect(Lane::Main);
    let client = open(&sessions, Side::Adaptor, &TunnelName::kbs()).await;
    let (_, server) = servers.recv().await.unwrap();
    data.cut_for(Side::Agent);
    sleep(Duration::from_millis(300)).await;
    data.cut();
    let (out, back) = ((1, 50_000), (2, 50_000));
    let done = async {
        tokio::join!(exchange(client, out, back), exchange(server, back, out));
        settled(&sessions).await;
    };
    timeout(LONG, done).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lie_about_a_position_ends_the_session() {
    let _watchdog = Watchdog::new();
    for (received, what) in
        [(501, "it has received 501 bytes of 500"), (7, "7 bytes, which is inside a message")]
    {
        let (sessions, mut servers) = connected(Duration::ZERO);
        let mut client = open(&sessions, Side::Adaptor, &TunnelName::kbs()).await;
        let (_, mut server) = servers.recv().await.unwrap();
        write_pattern(&mut client, 1, 500, 500).await;
        check_pattern(&mut server, 1, 500).await;
        let said = StreamPosition { stream: 1, received, granted: 1 };
        let reason = sessions.adaptor.on_position(said).unwrap_err();
        assert!(reason.contains(what), "{reason}");
        assert_eq!(sessions.adaptor.ended().await, reason);
        check_end(&mut client).await;
        // Of a stream that is gone, or never was, any position is ignored.
        assert_eq!(sessions.agent.on_position(StreamPosition { stream: 99, ..said }), Ok(()));
    }
}
