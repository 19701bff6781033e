//! The port of cloud-api-adaptor's dials when there is no free file descriptor. A process of its own: they are all one
//! table. Needs root and nft.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "caa_front/scene.rs"]
#[allow(dead_code, reason = "shared with the tests of the port, which use all of it")]
mod scene;

use std::fs::File;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpStream;

use scene::{Keys, Scene, VM, in_namespace};

#[test]
fn dials_wait_for_a_free_descriptor() {
    in_namespace(|| async {
        let (mut scene, keys) = (Scene::new().await, Keys::new());
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard, "the limit was raised");
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).unwrap();
        // Without a pause for the port: the kernel connects, and the descriptors are gone before it accepts.
        let dial = std::net::TcpStream::connect(VM).unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        dial.set_nonblocking(true).unwrap();
        let handshake = tokio::spawn(keys.client().handshake(TcpStream::from_std(dial).unwrap()));
        // accept(2) fails while the client's hello goes out.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(scene.held.try_recv().is_err());
        drop(taken);
        scene.held().await.finish(&keys.server).await.unwrap();
        handshake.await.unwrap().unwrap();
    });
}
