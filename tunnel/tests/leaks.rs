//! No end of a stream leaks a resource. This is a binary of its own, because it counts the descriptors of the process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use harness::{Connection, FIXED, quiet, tcp, unix, within};
use secure_comms_tunnel::Sender;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn every_end_of_a_stream_frees_descriptors_and_room() {
    within(async {
        let connection = Connection::new(FIXED);
        let dies = Connection::new(FIXED);
        quiet(descriptors).await;
        let before = descriptors();
        for _ in 0..20 {
            let ((mut client, near), (mut server, far)) = (tcp().await, unix());
            let (_, near, far) = connection.join(near, far).await;
            client.write_all(b"x").await.unwrap();
            server.read_exact(&mut [0]).await.unwrap();
            client.shutdown().await.unwrap();
            server.shutdown().await.unwrap();
            near.await.unwrap().unwrap();
            far.await.unwrap().unwrap();

            let ((client, near), (_server, far)) = (tcp().await, tcp().await);
            let (_, near, far) = connection.join(near, far).await;
            client.set_zero_linger().unwrap();
            drop(client);
            assert!(near.await.unwrap().is_err() && far.await.unwrap().is_err());

            let (_client, socket) = tcp().await;
            let (relay, raw) = connection.raw(socket).await;
            raw.sender.close().await.unwrap();
            assert!(relay.await.unwrap().is_err());

            let (_client, socket) = tcp().await;
            let (relay, _raw) = connection.raw(socket).await;
            relay.abort();
            assert!(relay.await.unwrap_err().is_cancelled());
        }
        let (_client, socket) = tcp().await;
        let (relay, _raw) = dies.raw(socket).await;
        dies.kill();
        assert!(relay.await.unwrap().is_err());
        drop(_client);
        quiet(descriptors).await;
        assert_eq!(descriptors(), before);
        assert_eq!(connection.adaptor.credits.open_streams() + connection.agent.credits.open_streams(), 0);
    })
    .await;
}
