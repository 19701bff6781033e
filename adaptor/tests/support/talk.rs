//! Clients of tunnels to the echo server, and a network between adaptor and agent that can stand still.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::PATIENCE;

/// A conversation with the echo server behind a tunnel.
#[derive(Debug)]
pub struct Talk {
    socket: TcpStream,
    said: u8,
}

impl Talk {
    pub async fn new(local: &str) -> Self {
        let mut talk = Self { socket: TcpStream::connect(local).await.unwrap(), said: 0 };
        talk.say().await;
        talk
    }

    /// Says something that was not said before, and hears it.
    pub async fn say(&mut self) {
        self.send().await;
        self.hear().await;
    }

    fn words(&self) -> Vec<u8> {
        (0..5000_u32).map(|n| (n % 251) as u8 ^ self.said).collect()
    }

    pub async fn send(&mut self) {
        self.said += 1;
        let words = self.words();
        self.socket.write_all(&words).await.unwrap();
    }

    pub async fn hear(&mut self) {
        let mut heard = vec![0; self.words().len()];
        timeout(PATIENCE, self.socket.read_exact(&mut heard)).await.unwrap().unwrap();
        assert!(heard == self.words(), "other bytes");
    }

    /// Ends it in good order, and hears nothing more.
    pub async fn end(mut self) {
        self.socket.shutdown().await.unwrap();
        let rest = timeout(PATIENCE, self.socket.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(rest.unwrap(), 0);
    }

    pub async fn ends_with_a_reset(mut self) {
        let end = timeout(PATIENCE, self.socket.read_to_end(&mut Vec::new())).await.unwrap();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

/// A network whose connections can stand still.
#[derive(Clone, Debug)]
pub struct Network {
    pub address: SocketAddr,
    stands: Arc<Mutex<watch::Sender<bool>>>,
    blocked: watch::Sender<bool>,
}

impl Network {
    pub fn before(agent: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let stands = Arc::new(Mutex::new(watch::Sender::new(false)));
        let network = Self { address, stands, blocked: watch::Sender::new(false) };
        let (listener, own) = (TcpListener::from_std(listener).unwrap(), network.clone());
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let stands = own.stands.lock().unwrap().subscribe();
                let stops = Stops { stands, blocked: own.blocked.subscribe() };
                tokio::spawn(carry(near, agent, stops));
            }
        });
        network
    }

    /// Whether no connection carries anything, also no new one.
    pub fn block(&self, blocked: bool) {
        self.blocked.send_replace(blocked);
    }

    /// Stops the connections that exist; the returned value lets them go on.
    pub fn stop(&self) -> watch::Sender<bool> {
        let stopped = std::mem::replace(&mut *self.stands.lock().unwrap(), watch::Sender::new(false));
        stopped.send_replace(true);
        stopped
    }
}

/// What makes a connection stand still.
#[derive(Clone)]
struct Stops {
    stands: watch::Receiver<bool>,
    blocked: watch::Receiver<bool>,
}

async fn carry(near: TcpStream, to: SocketAddr, stops: Stops) {
    let far = TcpStream::connect(to).await.unwrap();
    let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = flow(from_near, to_far, stops.clone()) => {}
        () = flow(from_far, to_near, stops) => {}
    }
}

async fn flow(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut stops: Stops) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        // An error: the connection can't be stopped any more.
        drop(stops.stands.wait_for(|stands| !stands).await);
        drop(stops.blocked.wait_for(|blocked| !blocked).await);
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}
