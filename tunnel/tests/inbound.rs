//! Inbounds hold their clients until there is a link, and drop clients that leave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod harness;

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use harness::lanes::Sessions;
use harness::{
    Connection, FIXED, MemLink, Watchdog, accept, check_end, check_pattern, quiet, tunnel, within,
    write_pattern,
};
use secure_comms_protocol::limits::{CreditLimits, INBOUND_WAIT};
use secure_comms_protocol::tag::parse_list;
use secure_comms_protocol::{InboundTag, Kubernetes, Lane, OutboundTag};
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::{Event, Inbound, Link, Outbounds, Receiver, Sender};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

fn inbound_tag(text: &str) -> InboundTag {
    parse_list::<InboundTag>(text).unwrap().remove(0)
}

fn outbounds(list: &str) -> Outbounds<Kubernetes> {
    Outbounds::new(&parse_list::<OutboundTag>(list).unwrap())
}

/// A serving inbound `T` on any port.
struct Served<L> {
    local: String,
    links: watch::Sender<Option<L>>,
    task: JoinHandle<()>,
}

impl Served<MemLink> {
    async fn new(bind: &str) -> Self {
        Self::of_links(bind).await
    }
}

impl<L: Link> Served<L> {
    async fn of_links(bind: &str) -> Self {
        let inbound = Inbound::bind(&inbound_tag(&format!("KUBERNETES_PHASE:T:{bind}"))).await.unwrap();
        let (links, links_seen) = watch::channel(None);
        Self { local: inbound.local().to_owned(), links, task: tokio::spawn(inbound.serve(links_seen)) }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.local).await.unwrap()
    }

    /// Number of clients: each holds a clone of the watch, and the inbound holds one.
    fn clients(&self) -> usize {
        self.links.receiver_count() - 1
    }

    /// Waits until the inbound serves this many clients.
    async fn until_clients(&self, count: usize) {
        while self.clients() != count {
            tokio::task::yield_now().await;
        }
    }
}

/// Starts a server that reads to the end and sends the same bytes back; returns its address.
async fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            });
        }
    });
    format!("KUBERNETES_PHASE:T:{port}")
}

#[tokio::test]
async fn a_client_waits_for_a_link_even_after_a_half_close() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds(&echo().await));
        let mut client = served.connect().await;
        client.write_all(b"early").await.unwrap();
        client.shutdown().await.unwrap();
        served.until_clients(1).await;
        quiet(|| served.clients()).await;
        assert_eq!(served.clients(), 1, "it still waits for its answer");
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"early");
    })
    .await;
}

#[tokio::test]
async fn many_clients_are_served_at_a_time() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(CreditLimits::KUBERNETES);
        connection.serve(outbounds(&echo().await));
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut clients = tokio::task::JoinSet::new();
        for seed in 0..100 {
            let mut client = served.connect().await;
            clients.spawn(async move {
                write_pattern(&mut client, seed, 100_000, 10_000).await;
                client.shutdown().await.unwrap();
                check_pattern(&mut client, seed, 100_000).await;
                check_end(&mut client).await;
            });
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
        served.until_clients(0).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_frees_its_place() {
    within(async {
        let served = Served::new("0").await;
        let (closes, mut resets, stays) =
            (served.connect().await, served.connect().await, served.connect().await);
        resets.write_all(b"never mind").await.unwrap();
        served.until_clients(3).await;
        drop(closes);
        served.until_clients(2).await;
        resets.set_zero_linger().unwrap();
        drop(resets);
        served.until_clients(1).await;
        drop(stays);
        served.until_clients(0).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_resets_during_the_open_frees_its_place() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        let mut asks = connection.take_asks();
        served.links.send_replace(Some(connection.adaptor.clone()));
        let client = served.connect().await;
        let ask = asks.recv().await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        served.until_clients(0).await;
        assert_eq!(connection.adaptor.credits.open_streams(), 0);
        drop(ask);
    })
    .await;
}

#[tokio::test]
async fn a_link_that_dies_before_it_answers_is_followed_by_the_next() {
    within(async {
        let served = Served::new("0").await;
        let mut dies = Connection::new(FIXED);
        let mut asks = dies.take_asks();
        served.links.send_replace(Some(dies.adaptor.clone()));
        let mut client = served.connect().await;
        client.write_all(b"again").await.unwrap();
        client.shutdown().await.unwrap();
        let unanswered = asks.recv().await.unwrap();
        dies.kill();
        let mut lives = Connection::new(FIXED);
        lives.serve(outbounds(&echo().await));
        served.links.send_replace(Some(lives.adaptor.clone()));
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"again");
        drop(unanswered);
    })
    .await;
}

#[tokio::test]
async fn a_dead_link_that_looks_alive_does_not_keep_the_thread() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        // Every open fails at once, and the link never reports that it is gone.
        drop(connection.take_asks());
        served.links.send_replace(Some(connection.adaptor.clone()));
        let client = served.connect().await;
        served.until_clients(1).await;
        assert!(!connection.adaptor.credits.is_gone());
        drop(client);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_refused_sees_a_reset() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds("KUBERNETES_PHASE:OTHER:1"));
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut client = served.connect().await;
        assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        served.until_clients(0).await;
    })
    .await;
}

/// Places for one stream, and who has it.
#[derive(Clone, Copy)]
enum FullAt {
    Here,
    There,
}

async fn a_client_gets_the_place_that_another_frees(full: FullAt) {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(CreditLimits { streams: 1, ..FIXED });
        connection.serve(outbounds(&echo().await));
        let taken = match full {
            FullAt::Here => connection.adaptor.credits.open(&tunnel()).await.unwrap(),
            FullAt::There => accept(&connection.agent.credits, 1).await.unwrap(),
        };
        served.links.send_replace(Some(connection.adaptor.clone()));
        let leaves = served.connect().await;
        served.until_clients(1).await;
        quiet(|| served.clients()).await;
        drop(leaves);
        served.until_clients(0).await;
        let mut client = served.connect().await;
        client.write_all(b"patient").await.unwrap();
        client.shutdown().await.unwrap();
        served.until_clients(1).await;
        drop(taken);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"patient");
        served.until_clients(0).await;
        while connection.adaptor.credits.open_streams() + connection.agent.credits.open_streams() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_gets_the_place_that_another_frees_at_this_end() {
    a_client_gets_the_place_that_another_frees(FullAt::Here).await;
}

#[tokio::test]
async fn a_client_gets_the_place_that_another_frees_at_the_other_end() {
    a_client_gets_the_place_that_another_frees(FullAt::There).await;
}

#[tokio::test]
async fn clients_that_come_later_take_no_place_that_one_waits_for() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(CreditLimits { streams: 1, ..FIXED });
        let mut asks = connection.take_asks();
        let taken = connection.adaptor.credits.open(&tunnel()).await.unwrap();
        served.links.send_replace(Some(connection.adaptor.clone()));
        let first = served.connect().await;
        served.until_clients(1).await;
        quiet(|| served.clients()).await;
        let later = served.connect().await;
        quiet(|| served.clients()).await;
        assert_eq!(served.clients(), 1, "the later one is not accepted yet");
        drop(taken);
        let asked = asks.recv().await.unwrap();
        // The next one is accepted, and waits in its place.
        served.until_clients(2).await;
        first.set_zero_linger().unwrap();
        drop(first);
        drop(asked);
        asks.recv().await.unwrap();
        served.until_clients(1).await;
        drop(later);
    })
    .await;
}

/// A client that has been accepted is reset once it has waited as long as it may. The time stands still afterwards.
async fn is_closed_after_its_wait(client: &mut TcpStream) {
    tokio::time::pause();
    let start = Instant::now();
    assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(start.elapsed() + std::time::Duration::from_secs(1) > INBOUND_WAIT, "{:?}", start.elapsed());
    assert!(start.elapsed() < 2 * INBOUND_WAIT, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_client_without_a_place_is_closed_after_its_timeout() {
    let _watchdog = Watchdog::new();
    let served = Served::new("0").await;
    let mut connection = Connection::new(CreditLimits { streams: 1, ..FIXED });
    connection.serve(outbounds(&echo().await));
    let _taken = accept(&connection.agent.credits, 1).await.unwrap();
    served.links.send_replace(Some(connection.adaptor.clone()));
    let mut client = served.connect().await;
    client.write_all(b"anyone?").await.unwrap();
    served.until_clients(1).await;
    is_closed_after_its_wait(&mut client).await;
    served.until_clients(0).await;
    assert_eq!(connection.adaptor.credits.open_streams(), 0);
}

#[tokio::test]
async fn a_client_without_a_link_is_closed_after_its_timeout() {
    let _watchdog = Watchdog::new();
    let served = Served::new("0").await;
    let mut client = served.connect().await;
    client.write_all(b"anyone?").await.unwrap();
    served.until_clients(1).await;
    is_closed_after_its_wait(&mut client).await;
    served.until_clients(0).await;
}

#[tokio::test]
async fn a_client_of_a_session_without_a_connection_waits_as_without_a_link() {
    let _watchdog = Watchdog::new();
    let (sessions, mut servers) = Sessions::new(FIXED, std::time::Duration::ZERO);
    let served = Served::of_links("0").await;
    served.links.send_replace(Some(sessions.session(Side::Adaptor).link()));
    // It ends in good order, as a health check does.
    let leaves = served.connect().await;
    let mut client = served.connect().await;
    client.write_all(b"anyone?").await.unwrap();
    served.until_clients(2).await;
    drop(leaves);
    served.until_clients(1).await;
    is_closed_after_its_wait(&mut client).await;
    served.until_clients(0).await;
    tokio::time::resume();
    let mut client = served.connect().await;
    client.write_all(b"now").await.unwrap();
    served.until_clients(1).await;
    sessions.connect(Lane::Main);
    let (_, mut server) = servers.recv().await.unwrap();
    server.read_exact(&mut [0; 3]).await.unwrap();
}

#[tokio::test]
async fn a_dropped_inbound_closes_its_listener_and_its_clients() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds(&echo().await));
        let mut waits = served.connect().await;
        served.until_clients(1).await;
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut speaks = served.connect().await;
        speaks.write_all(b"x").await.unwrap();
        served.until_clients(2).await;
        served.task.abort();
        for client in [&mut waits, &mut speaks] {
            assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        assert_eq!(TcpStream::connect(&served.local).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_is_an_error_that_names_the_tag() {
    within(async {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let text = format!("KUBERNETES_PHASE:T:{}", taken.local_addr().unwrap().port());
        let error = Inbound::bind(&inbound_tag(&text)).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("inbound {text}: listening: Address already in use")), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_unix_inbound_is_private_and_removed_when_dropped() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let served = Served::new(path.to_str().unwrap()).await;
        assert_eq!(served.local, path.to_str().unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut connection = Connection::new(FIXED);
        connection.serve(outbounds(&echo().await));
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"hello");
        served.task.abort();
        assert!(served.task.await.unwrap_err().is_cancelled());
        assert!(!path.exists());
    })
    .await;
}

#[tokio::test]
async fn a_unix_inbound_replaces_only_a_stale_socket() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let bind = |name: &str| {
            let path = dir.path().join(name);
            let tag = inbound_tag(&format!("KUBERNETES_PHASE:T:{}", path.display()));
            (path, tag)
        };
        let (path, tag) = bind("left-over");
        // Dropping a listener leaves its path behind.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let inbound = Inbound::bind(&tag).await.unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        drop(inbound);
        assert!(!path.exists());

        let (path, tag) = bind("in-use");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(Inbound::bind(&tag).await.unwrap_err().to_string().contains("Address already in use"));
        assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());

        let (path, tag) = bind("a-file");
        std::fs::write(&path, "precious").unwrap();
        assert!(Inbound::bind(&tag).await.unwrap_err().to_string().contains("Address already in use"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    })
    .await;
}

/// The tag of an inbound at `path`.
fn at(path: &Path) -> InboundTag {
    inbound_tag(&format!("KUBERNETES_PHASE:T:{}", path.display()))
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// A user that is neither root nor, where the tests run as one, this one.
const OTHER_USER: u32 = 65_533;

#[tokio::test]
async fn a_directory_where_others_may_replace_the_socket_is_refused() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let (shared, deep) = (dir.path().join("shared"), dir.path().join("shared/deep"));
        std::fs::create_dir_all(&deep).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&deep, &link).unwrap();
        for (mode, owner) in
            [(0o777, 0), (0o770, 0), (0o775, 0), (0o757, 0), (0o755, OTHER_USER), (0o1777, OTHER_USER)]
        {
            set_mode(&shared, mode);
            std::os::unix::fs::chown(&shared, Some(owner), None).expect("this test needs root");
            for place in [&shared, &deep, &link] {
                let path = place.join("socket");
                let error = Inbound::bind(&at(&path)).await.unwrap_err().to_string();
                let named =
                    format!("the directory {} has mode {mode:04o} and owner {owner};", shared.display());
                assert!(error.contains(&named), "{error}");
                assert!(!path.exists());
            }
        }
        // As /tmp.
        set_mode(&shared, 0o1777);
        std::os::unix::fs::chown(&shared, Some(0), None).unwrap();
        for place in [&shared, &deep, &link] {
            let path = place.join("socket");
            let inbound = Inbound::bind(&at(&path)).await.unwrap();
            assert_eq!(inbound.local(), path.to_str().unwrap());
            drop(inbound);
            assert!(!path.exists());
        }
    })
    .await;
}

#[tokio::test]
async fn a_left_over_of_another_user_is_not_removed() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        set_mode(dir.path(), 0o1777);
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        std::os::unix::fs::lchown(&path, Some(OTHER_USER), None).expect("this test needs root");
        let error = Inbound::bind(&at(&path)).await.unwrap_err().to_string();
        assert!(error.contains("another file or another user's: choose another path"), "{error}");
        assert!(path.exists());
        // Nor what a link leads to.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Inbound::bind(&at(&link)).await.unwrap_err().to_string().contains("Address already in use"));
        assert!(path.exists() && link.is_symlink());
    })
    .await;
}

#[tokio::test]
async fn the_end_of_an_inbound_removes_its_own_socket_only() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let inbound = Inbound::bind(&at(&path)).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(inbound);
        UnixStream::connect(&path).await.unwrap();
        std::fs::remove_file(&path).unwrap();

        let inbound = Inbound::bind(&at(&path)).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(inbound);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    })
    .await;
}

#[tokio::test]
async fn a_unix_listener_with_a_full_backlog_is_not_stale() {
    within(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("busy");
        let socket = tokio::net::UnixSocket::new_stream().unwrap();
        socket.bind(&path).unwrap();
        let _busy = socket.listen(1).unwrap();
        let mut waiting = Vec::new();
        while let Ok(client) = UnixStream::connect(&path).await {
            waiting.push(client);
        }
        let tag = inbound_tag(&format!("KUBERNETES_PHASE:T:{}", path.display()));
        assert!(Inbound::bind(&tag).await.unwrap_err().to_string().contains("Address already in use"));
        assert!(path.exists());
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_an_inbound_carries_eof_and_close_to_a_raw_peer() {
    within(async {
        let served = Served::new("0").await;
        let mut connection = Connection::new(FIXED);
        let mut asks = connection.take_asks();
        served.links.send_replace(Some(connection.adaptor.clone()));
        let mut client = served.connect().await;
        let ask = asks.recv().await.unwrap();
        assert_eq!((ask.name.as_str(), ask.id), ("T", 1));
        let (mut receiver, sender) = secure_comms_tunnel::Incoming::accept(ask.incoming).await;
        client.write_all(b"x").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(receiver.recv().await, Some(Event::Data("x".into())));
        assert_eq!(receiver.recv().await, Some(Event::Eof));
        sender.eof().await.unwrap();
        assert_eq!(receiver.recv().await, Some(Event::Close));
        check_end(&mut client).await;
    })
    .await;
}
