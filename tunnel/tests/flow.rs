//! Flow control: windows bound memory, a stalled stream affects no other stream, and no byte is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use harness::{
    BULK, Connection, FIXED, KERNEL, accept, check_end, check_pattern, quiet, tcp, tunnel, unix, within,
    write_pattern,
};
use secure_comms_protocol::Credit;
use secure_comms_protocol::limits::CreditLimits;
use secure_comms_tunnel::flow::{Overrun, PeerFlow, Side, StreamError};
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::relay::RelayError;
use secure_comms_tunnel::{Credits, MemoryBudget, Sender};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

#[tokio::test]
async fn a_stalled_reader_holds_one_window_and_loses_nothing() {
    within(async {
        let connection = Connection::new(FIXED);
        let ((mut client, near), (mut server, far)) = (unix(), unix());
        let (stalled, stalled_near, stalled_far) = connection.join(near, far).await;
        let writer = tokio::spawn(async move {
            write_pattern(&mut client, 1, BULK, 50_000).await;
            client.shutdown().await.unwrap();
            client
        });

        let ((mut client, near), (mut neighbour, far)) = (unix(), unix());
        connection.join(near, far).await;
        tokio::join!(
            write_pattern(&mut client, 2, 8 << 20, 50_000),
            check_pattern(&mut neighbour, 2, 8 << 20)
        );

        quiet(|| connection.meter(Side::Adaptor, stalled).bytes).await;
        let meter = connection.meter(Side::Adaptor, stalled);
        assert!(meter.least >= 0, "more than its window on its way: {meter:?}");
        assert!(meter.available < 4096, "not stalled: {meter:?}");
        assert!(meter.bytes < KERNEL, "{meter:?}");
        assert!(!writer.is_finished());

        check_pattern(&mut server, 1, BULK).await;
        check_end(&mut server).await;
        server.shutdown().await.unwrap();
        writer.await.unwrap();
        stalled_near.await.unwrap().unwrap();
        stalled_far.await.unwrap().unwrap();
    })
    .await;
}

async fn bulk(connection: Connection, tcp_streams: bool, len: usize) {
    let mut ends = JoinSet::new();
    for seed in 0..32 {
        let (a, b) = if tcp_streams {
            let ((a, near), (b, far)) = (tcp().await, tcp().await);
            connection.join(near, far).await;
            (tokio::io::split(Box::new(a) as Box<dyn harness::Io>), tokio::io::split(Box::new(b) as _))
        } else {
            let ((a, near), (b, far)) = (unix(), unix());
            connection.join(near, far).await;
            (tokio::io::split(Box::new(a) as Box<dyn harness::Io>), tokio::io::split(Box::new(b) as _))
        };
        for ((mut read, mut write), out, back) in [(a, seed, seed + 100), (b, seed + 100, seed)] {
            ends.spawn(async move {
                let send = async {
                    write_pattern(&mut write, out, len, 30_000).await;
                    write.shutdown().await.unwrap();
                };
                let receive = async {
                    check_pattern(&mut read, back, len).await;
                    check_end(&mut read).await;
                };
                tokio::join!(send, receive);
            });
        }
    }
    while let Some(end) = ends.join_next().await {
        end.unwrap();
    }
    for meter in connection.meters() {
        assert_eq!(meter.bytes, len as u64);
    }
    // The relays finish shortly after their clients.
    quiet(|| connection.adaptor.credits.open_streams() + connection.agent.credits.open_streams()).await;
    assert_eq!(connection.adaptor.credits.open_streams() + connection.agent.credits.open_streams(), 0);
}

#[tokio::test]
async fn thirty_two_bulk_streams_finish_with_every_byte() {
    within(bulk(Connection::new(FIXED), false, 1 << 20)).await;
}

#[tokio::test]
async fn thirty_two_bulk_streams_finish_with_growing_windows() {
    within(bulk(Connection::new(CreditLimits::KUBERNETES), true, 1 << 20)).await;
}

#[tokio::test]
async fn thirty_two_bulk_streams_finish_without_credits() {
    within(bulk(Connection::plain(FIXED), false, 1 << 20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn thirty_two_bulk_streams_finish_on_several_threads() {
    within(bulk(Connection::new(FIXED), true, 1 << 20)).await;
}

#[tokio::test]
async fn a_flood_of_small_messages_is_bounded_and_finishes() {
    within(async {
        let connection = Connection::new(FIXED);
        let (client, socket) = unix();
        let (_relay, raw) = connection.raw(socket).await;
        // An honest peer with one byte in each message may have 64 messages unread: each has the minimum cost.
        let id = raw.flow.id();
        let len = 200_000;
        let sender = tokio::spawn(async move {
            let mut sent = 0;
            while sent < len {
                raw.flow.ready().await;
                raw.flow.spend(1);
                raw.send(vec![5]).await;
                sent += 1;
            }
            raw
        });
        quiet(|| connection.meter(Side::Agent, id).messages).await;
        let meter = connection.meter(Side::Agent, id);
        assert!(meter.least >= 0 && meter.available < 4096 && meter.messages < 50_000, "{meter:?}");
        let mut client = client;
        let mut got = 0;
        let mut buffer = vec![0; 4096];
        while got < len {
            let read = tokio::io::AsyncReadExt::read(&mut client, &mut buffer).await.unwrap();
            assert!(read > 0 && buffer[..read].iter().all(|byte| *byte == 5));
            got += read;
        }
        sender.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn one_byte_writes_of_a_client_arrive() {
    within(async {
        let connection = Connection::new(FIXED);
        let ((mut client, near), (mut server, far)) = (unix(), unix());
        connection.join(near, far).await;
        tokio::join!(write_pattern(&mut client, 9, 200_000, 1), check_pattern(&mut server, 9, 200_000));
    })
    .await;
}

/// Moves many bytes over a new stream, and returns its window: more than half of it has been given back.
async fn grow(connection: &Connection) -> (i64, Box<dyn std::any::Any>) {
    let ((mut client, near), (mut server, far)) = (unix(), unix());
    let (id, ..) = connection.join(near, far).await;
    tokio::join!(write_pattern(&mut client, 4, 4 << 20, 50_000), check_pattern(&mut server, 4, 4 << 20));
    quiet(|| connection.meter(Side::Adaptor, id).available).await;
    let meter = connection.meter(Side::Adaptor, id);
    assert!(meter.least >= 0, "{meter:?}");
    (meter.available, Box::new((client, server)))
}

#[tokio::test]
async fn a_window_takes_its_growth_from_the_pool_and_returns_it() {
    within(async {
        let limits = CreditLimits {
            initial: 32 << 10,
            stream_soft_max: 128 << 10,
            stream_max: 128 << 10,
            growth_pool: 96 << 10,
            streams: 8,
            opener_streams: 8,
            reserved: 0,
        };
        let connection = Connection::new(limits);
        let (first, holds_pool) = grow(&connection).await;
        assert!(first > 64 << 10 && first <= 128 << 10, "{first}");
        let (second, holds_nothing) = grow(&connection).await;
        assert!(second <= 32 << 10, "the pool was empty: {second}");
        drop(holds_pool);
        quiet(|| connection.agent.credits.open_streams()).await;
        assert_eq!(connection.agent.credits.open_streams(), 1);
        let (third, _holds_pool) = grow(&connection).await;
        assert!(third > 64 << 10 && third <= 128 << 10, "the pool was full again: {third}");
        drop(holds_nothing);
    })
    .await;
}

#[tokio::test]
async fn peers_share_a_budget_and_all_of_them_finish() {
    const TOTAL: usize = 128 << 10;
    within(async {
        let limits = CreditLimits {
            initial: 32 << 10,
            stream_soft_max: 256 << 10,
            stream_max: 256 << 10,
            growth_pool: 1 << 20,
            streams: 8,
            opener_streams: 8,
            reserved: 0,
        };
        let budget = MemoryBudget::new(TOTAL);
        let accounts: Vec<_> = (0..6).map(|_| budget.account()).collect();
        let (mut held, mut windows) = (Vec::new(), Vec::new());
        for account in &accounts {
            let connection = Connection::charged_to(limits, account);
            let (window, streams) = grow(&connection).await;
            assert!(budget.used() <= TOTAL, "{}", budget.used());
            windows.push(window);
            held.push((connection, streams));
        }
        // The first has half of the budget, and the last its initial window and a little.
        assert!(accounts.iter().all(|account| account.held() <= TOTAL / 2), "{accounts:?}");
        assert!(windows.iter().all(|window| *window > 16 << 10), "{windows:?}");
        assert!(windows.iter().sum::<i64>() <= (TOTAL + 6 * (32 << 10)) as i64, "{windows:?}");
        let received = accounts.iter().map(|account| account.traffic().received);
        assert!(received.clone().all(|bytes| bytes == 4 << 20), "{:?}", received.collect::<Vec<_>>());
        let connections: Vec<_> = held.into_iter().map(|(connection, _streams)| connection).collect();
        for connection in &connections {
            quiet(|| connection.agent.credits.open_streams()).await;
        }
        assert_eq!(budget.used(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_overruns_its_credit_loses_its_connection() {
    within(async {
        let connection = Connection::new(FIXED);
        let (client, socket) = unix();
        let (relay, raw) = connection.raw(socket).await;
        // The client reads nothing. We may hold the kernel buffers, the window, and one message of slack.
        let mut sent = 0;
        while raw.sender.send(vec![1; 32 * 1024].into()).await.is_ok() {
            sent += 32 * 1024;
            assert!(sent < KERNEL, "the sender is never stopped");
        }
        let id = raw.flow.id();
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Overrun(Overrun(stream))) if stream == id));
        connection.adaptor.credits.gone().await;
        assert!(connection.adaptor.credits.open(&tunnel()).await.is_err());
        drop(client);
    })
    .await;
}

#[tokio::test]
async fn a_stalled_reader_holds_up_a_peer_without_credits() {
    within(async {
        let connection = Connection::plain(FIXED);
        let ((mut client, near), (mut server, far)) = (unix(), unix());
        let (id, ..) = connection.join(near, far).await;
        let writer = tokio::spawn(async move {
            write_pattern(&mut client, 1, BULK, 50_000).await;
            client.shutdown().await.unwrap();
            client
        });
        quiet(|| connection.meter(Side::Adaptor, id).bytes).await;
        assert!(
            connection.meter(Side::Adaptor, id).bytes < KERNEL,
            "{:?}",
            connection.meter(Side::Adaptor, id)
        );
        check_pattern(&mut server, 1, BULK).await;
        check_end(&mut server).await;
        writer.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_stalled_window_only_stream_ends_with_its_connection() {
    within(async {
        let connection = Connection::plain(FIXED);
        let (client, socket) = unix();
        let (relay, raw) = connection.raw(socket).await;
        let sender = tokio::spawn(async move {
            while raw.sender.send(vec![1; 32 * 1024].into()).await.is_ok() {}
            Gone
        });
        quiet(|| connection.meters().iter().map(|meter| meter.bytes).sum::<u64>()).await;
        assert!(!sender.is_finished());
        connection.kill();
        assert_eq!(sender.await.unwrap(), Gone);
        drop(client);
        assert!(relay.await.unwrap().is_err());
    })
    .await;
}

#[tokio::test]
async fn waiting_streams_of_both_directions_are_counted() {
    within(async {
        let credits = Credits::new(Side::Agent, CreditLimits { streams: 4, ..FIXED });
        let waiting: Vec<_> = [1, 3, 5]
            .map(|id| {
                let credits = credits.clone();
                tokio::spawn(async move { accept(&credits, id).await.unwrap() })
            })
            .into();
        quiet(|| credits.open_streams()).await;
        assert_eq!(accept(&credits, 7).await.unwrap_err(), StreamError::TooMany);
        credits.set_peer_mode(PeerFlow::Credits(32 << 10));
        let mut flows = Vec::new();
        for flow in waiting {
            flows.push(flow.await.unwrap());
        }
        // One tunnel may not take the last place; the other end may.
        let ours = credits.open(&tunnel()).await.unwrap();
        assert_eq!(ours.id(), 2);
        assert_eq!(credits.open(&tunnel()).await.unwrap_err(), StreamError::TooMany);
        flows.pop();
        assert_eq!(credits.open(&tunnel()).await.unwrap().id(), 4);
        assert_eq!(credits.open_streams(), 3);
    })
    .await;
}

#[tokio::test]
async fn a_dropped_open_before_hello_frees_its_room() {
    let credits = Credits::new(Side::Adaptor, CreditLimits { streams: 1, ..FIXED });
    let waiting = tokio::spawn({
        let credits = credits.clone();
        async move { credits.open(&tunnel()).await }
    });
    quiet(|| credits.open_streams()).await;
    assert_eq!(credits.open_streams(), 1);
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert_eq!(credits.open_streams(), 0);
}

#[tokio::test]
async fn a_stream_id_belongs_to_one_side_and_is_used_once() {
    within(async {
        let agent = Credits::new(Side::Agent, FIXED);
        agent.set_peer_mode(PeerFlow::Credits(32 << 10));
        let adaptor = Credits::new(Side::Adaptor, FIXED);
        adaptor.set_peer_mode(PeerFlow::Credits(32 << 10));
        let one = accept(&agent, 1).await.unwrap();
        for (credits, bad) in [(&agent, 1), (&agent, 2), (&agent, 0), (&adaptor, 1), (&adaptor, 0)] {
            assert_eq!(accept(credits, bad).await.unwrap_err(), StreamError::BadId(bad));
        }
        assert_eq!(agent.open_streams(), 1);
        drop(one);
        drop(accept(&agent, 1).await.unwrap());
        let (first, second) =
            (adaptor.open(&tunnel()).await.unwrap(), adaptor.open(&tunnel()).await.unwrap());
        assert_eq!((first.id(), second.id()), (1, 3));
        assert_eq!(agent.open(&tunnel()).await.unwrap().id(), 2);
    })
    .await;
}

#[tokio::test]
async fn unknown_or_excessive_credit_does_no_harm() {
    within(async {
        let credits = Credits::new(Side::Adaptor, FIXED);
        credits.set_peer_mode(PeerFlow::Credits(32 << 10));
        credits.granted(Credit { stream: 99, bytes: 5 });
        let flow = credits.open(&tunnel()).await.unwrap();
        for _ in 0..10 {
            credits.granted(Credit { stream: flow.id(), bytes: u32::MAX });
        }
        assert_eq!(flow.ready().await, 32 * 1024);
        credits.set_peer_mode(PeerFlow::WindowOnly);
        assert_eq!(credits.peer().await.unwrap(), PeerFlow::Credits(32 << 10), "the first word counts");
    })
    .await;
}

#[tokio::test]
async fn every_window_from_the_smallest_on_keeps_moving() {
    within(async {
        for initial in [512, 513, 600, 1023, 1025, 4096, 5000, 8191, 65_536, 1 << 20] {
            let limits = CreditLimits {
                initial,
                stream_soft_max: initial,
                stream_max: initial,
                growth_pool: 0,
                streams: 4,
                opener_streams: 4,
                reserved: 0,
            };
            let connection = Connection::new(limits);
            let ((mut client, near), (mut server, far)) = (unix(), unix());
            let (id, ..) = connection.join(near, far).await;
            let len = 300_000;
            tokio::join!(write_pattern(&mut client, 6, len, 999), check_pattern(&mut server, 6, len));
            assert!(connection.meter(Side::Adaptor, id).least >= 0, "window {initial}");
        }
    })
    .await;
}

#[tokio::test]
async fn waiting_for_hello_ends_with_the_connection() {
    within(async {
        let credits = Credits::new(Side::Adaptor, FIXED);
        let waiting = tokio::spawn({
            let credits = credits.clone();
            async move { credits.open(&tunnel()).await.map(|_| ()) }
        });
        quiet(|| credits.open_streams()).await;
        credits.end();
        assert_eq!(waiting.await.unwrap(), Err(StreamError::Gone));
    })
    .await;
}

#[tokio::test]
async fn window_only_streams_share_the_growth_pool() {
    within(async {
        let pool = BULK / 2;
        let limits = CreditLimits { growth_pool: u32::try_from(pool).unwrap(), ..FIXED };
        let connection = Connection::plain(limits);
        let mut streams = Vec::new();
        for seed in [1, 2] {
            let ((mut client, near), (server, far)) = (unix(), unix());
            let (id, ..) = connection.join(near, far).await;
            let writer = tokio::spawn(async move {
                write_pattern(&mut client, seed, BULK, 50_000).await;
                client.shutdown().await.unwrap();
                client
            });
            streams.push((seed, id, server, writer));
        }
        let taken = |id| connection.meter(Side::Adaptor, id).bytes;
        let total = || streams.iter().map(|(_, id, ..)| taken(*id)).sum::<u64>();
        quiet(total).await;
        let held = total();
        let pool = u64::try_from(pool).unwrap();
        assert!((pool..pool + KERNEL).contains(&held), "{held} of a pool of {pool}");
        for (seed, _, mut server, writer) in streams {
            check_pattern(&mut server, seed, BULK).await;
            check_end(&mut server).await;
            writer.await.unwrap();
        }
    })
    .await;
}
