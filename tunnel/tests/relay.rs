//! Half-close, reset and cut on one side of a tunnel have the same effect on the other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::io::ErrorKind;

use bytes::Bytes;
use harness::{
    Connection, FIXED, Io, KERNEL, both_kinds, check_end, check_pattern, quiet, tcp, unix, within,
    write_pattern,
};
use secure_comms_protocol::limits::MESSAGE_MAX;
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::relay::RelayError;
use secure_comms_tunnel::{Event, Receiver, Sender, Socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const ANSWER: usize = 1 << 20;

/// `first` sends all its bytes, and receives the whole answer after its half-close.
async fn ask(first: &mut Box<dyn Io>, second: &mut Box<dyn Io>) {
    write_pattern(first, 1, 100_000, 7_000).await;
    first.shutdown().await.unwrap();
    check_pattern(second, 1, 100_000).await;
    check_end(second).await;
    let answer = async {
        write_pattern(second, 2, ANSWER, 10_000).await;
        second.shutdown().await.unwrap();
    };
    let hear = async {
        check_pattern(first, 2, ANSWER).await;
        check_end(first).await;
    };
    tokio::join!(answer, hear);
}

#[tokio::test]
async fn a_half_close_passes_both_ways_and_ends_one_direction() {
    for (opener_first, plain) in [(true, false), (false, false), (true, true), (false, true)] {
        for ((mut client, near), (mut server, far)) in both_kinds().await.into_iter().zip(both_kinds().await)
        {
            let connection = if plain { Connection::plain(FIXED) } else { Connection::new(FIXED) };
            within(async {
                let (_, near, far) = connection.join(near, far).await;
                if opener_first {
                    ask(&mut client, &mut server).await;
                } else {
                    ask(&mut server, &mut client).await;
                }
                near.await.unwrap().unwrap();
                far.await.unwrap().unwrap();
                assert_eq!(connection.adaptor.credits.open_streams(), 0);
                assert_eq!(connection.agent.credits.open_streams(), 0);
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    within(async {
        for adaptor_resets in [true, false] {
            let connection = Connection::new(FIXED);
            let ((mut client, near), (mut server, far)) = (tcp().await, tcp().await);
            let (_, near, far) = connection.join(near, far).await;
            client.write_all(b"x").await.unwrap();
            server.read_exact(&mut [0]).await.unwrap();
            server.write_all(b"y").await.unwrap();
            client.read_exact(&mut [0]).await.unwrap();
            let (goes, mut stays) = if adaptor_resets { (client, server) } else { (server, client) };
            goes.set_zero_linger().unwrap();
            drop(goes);
            assert_eq!(stays.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
            let (near, far) = (near.await.unwrap().unwrap_err(), far.await.unwrap().unwrap_err());
            let (resetter, other) = if adaptor_resets { (near, far) } else { (far, near) };
            assert!(matches!(resetter, RelayError::Socket(_)), "{resetter}");
            assert!(matches!(other, RelayError::Cut), "{other}");
            assert_eq!(
                connection.adaptor.credits.open_streams() + connection.agent.credits.open_streams(),
                0
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_close_without_eof_delivers_the_bytes_and_resets() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, raw) = connection.raw(socket).await;
        raw.send("half of").await;
        let mut got = [0; 7];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"half of");
        raw.sender.close().await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Cut)));
    })
    .await;
}

#[tokio::test]
async fn a_close_after_eof_takes_nothing_back() {
    within(async {
        for (mut client, socket) in both_kinds().await {
            let connection = Connection::new(FIXED);
            let (relay, mut raw) = connection.raw(socket).await;
            raw.send("all of it").await;
            raw.sender.eof().await.unwrap();
            raw.sender.close().await.unwrap();
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"all of it");
            relay.await.unwrap().unwrap();
            assert_eq!(raw.receive().await.1, Some(Event::Close));
        }
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_relay_resets_its_socket_and_closes() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, mut raw) = connection.raw(socket).await;
        client.write_all(b"x").await.unwrap();
        assert_eq!(raw.receiver.recv().await, Some(Event::Data("x".into())));
        relay.abort();
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(raw.receiver.recv().await, None);
        assert_eq!(connection.adaptor.credits.open_streams(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_dead_connection_resets_every_local_side() {
    within(async {
        let connection = Connection::new(FIXED);
        let ((mut client, near), (mut server, far)) = (tcp().await, tcp().await);
        let (_, near, far) = connection.join(near, far).await;
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        connection.kill();
        for side in [&mut client, &mut server] {
            assert_eq!(side.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        assert!(matches!(near.await.unwrap(), Err(RelayError::Cut)));
        assert!(matches!(far.await.unwrap(), Err(RelayError::Cut)));
    })
    .await;
}

/// A relay that waits for credit: its local side has sent more than the peer takes.
async fn stuck(
    connection: &Connection,
    socket: Socket,
    client: &mut (impl AsyncWriteExt + Unpin),
) -> harness::Relay {
    let (relay, mut raw) = connection.raw(socket).await;
    let id = raw.flow.id();
    client.write_all(&vec![7; 60_000]).await.unwrap();
    // Takes messages, and gives no credit back.
    tokio::spawn(async move {
        while raw.receiver.recv().await.is_some_and(|event| event != Event::Close) {}
        // Neither EOF nor close until the connection is gone.
        raw.flow.gone().await;
        drop(raw);
    });
    quiet(|| connection.meter(Side::Adaptor, id).bytes).await;
    let meter = connection.meter(Side::Adaptor, id);
    assert!(meter.bytes > 0 && meter.available < FIXED.initial.into() && meter.least >= 0, "{meter:?}");
    assert!(!relay.is_finished());
    relay
}

#[tokio::test]
async fn a_local_reset_is_noticed_while_the_sender_waits_for_credit() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let relay = stuck(&connection, socket, &mut client).await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Socket(_))));
        assert_eq!(connection.adaptor.credits.open_streams(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_sender_without_credit_wakes_when_the_connection_dies() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let relay = stuck(&connection, socket, &mut client).await;
        connection.kill();
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Cut)));
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn a_sender_without_credit_wakes_when_the_stream_closes() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, raw) = connection.raw(socket).await;
        let id = raw.flow.id();
        client.write_all(&vec![7; 60_000]).await.unwrap();
        let harness::Raw { sender, mut receiver, flow } = raw;
        let drained =
            tokio::spawn(async move { while !matches!(receiver.recv().await, None | Some(Event::Close)) {} });
        quiet(|| connection.meter(Side::Adaptor, id).bytes).await;
        assert!(!relay.is_finished());
        sender.close().await.unwrap();
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Cut)));
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        drained.await.unwrap();
        drop(flow);
    })
    .await;
}

#[tokio::test]
async fn a_reset_after_a_half_close_is_noticed_without_traffic() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, mut raw) = connection.raw(socket).await;
        client.shutdown().await.unwrap();
        assert_eq!(raw.receiver.recv().await, Some(Event::Eof));
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Socket(_))));
        assert_eq!(raw.receiver.recv().await, Some(Event::Close));
    })
    .await;
}

#[tokio::test]
async fn the_local_reset_does_not_wait_for_room_for_the_close() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, raw) = connection.raw(socket).await;
        // The test takes none of the relay's messages, so the channel is full and the close has no room.
        let id = raw.flow.id();
        for _ in 0..8 {
            client.write_all(b"x").await.unwrap();
            quiet(|| connection.meter(Side::Adaptor, id).bytes).await;
        }
        raw.sender.close().await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(!relay.is_finished());
        connection.kill();
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Cut)));
    })
    .await;
}

#[tokio::test]
async fn messages_are_taken_while_the_close_waits_for_room() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = tcp().await;
        let (relay, mut raw) = connection.raw(socket).await;
        for _ in 0..8 {
            client.write_all(b"x").await.unwrap();
            quiet(|| connection.meter(Side::Adaptor, raw.flow.id()).bytes).await;
        }
        // The relay can't send its close, because the test takes nothing. It must still take our messages (D1).
        client.set_zero_linger().unwrap();
        drop(client);
        for _ in 0..40 {
            raw.send("y").await;
        }
        let (_, end) = raw.receive().await;
        assert_eq!(end, Some(Event::Close));
        assert!(matches!(relay.await.unwrap(), Err(RelayError::Socket(_))));
    })
    .await;
}

#[tokio::test]
async fn messages_without_bytes_do_no_harm() {
    within(async {
        let connection = Connection::new(FIXED);
        let (mut client, socket) = unix();
        let (relay, raw) = connection.raw(socket).await;
        for _ in 0..1000 {
            raw.flow.ready().await;
            raw.flow.spend(0);
            raw.send(Bytes::new()).await;
        }
        raw.send("z").await;
        let mut got = [0];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"z");
        assert!(!relay.is_finished());
    })
    .await;
}

#[tokio::test]
async fn messages_are_large_but_within_the_limit() {
    within(async {
        let connection = Connection::new(FIXED);
        let ((mut client, near), (mut server, far)) = (unix(), unix());
        let (id, ..) = connection.join(near, far).await;
        let len = 4 * usize::try_from(KERNEL).unwrap();
        tokio::join!(write_pattern(&mut client, 3, len, 64 * 1024), check_pattern(&mut server, 3, len));
        let meter = connection.meter(Side::Adaptor, id);
        assert_eq!(meter.bytes, len as u64);
        let mean = meter.bytes / meter.messages;
        assert!(mean <= MESSAGE_MAX as u64 && mean >= 4096, "{mean} bytes a message");
    })
    .await;
}
