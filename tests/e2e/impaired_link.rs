//! The impaired link of benchmarks and chaos does what its settings say, and nothing else.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::simulators::impaired_link::{DEVICE, ImpairedLink, Impairment, Rate, Traffic};
use secure_comms_tests::simulators::kata::client::{check_pattern, write_pattern};
use secure_comms_tunnel::netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;
const PORT: u16 = 7000;

/// A server at `b` and a connection to it from `a`.
async fn connection(link: &ImpairedLink) -> Result<(TcpStream, TcpStream)> {
    let listener = listener(link).await?;
    let (server, client) = tokio::join!(listener.accept(), connect(link));
    Ok((client?, server?.0))
}

async fn listener(link: &ImpairedLink) -> Result<TcpListener> {
    Ok(netns::listen(Some(&link.b.namespace()), SocketAddr::new(link.b.address, PORT)).await?)
}

async fn connect(link: &ImpairedLink) -> Result<TcpStream> {
    let to = SocketAddr::new(link.b.address, PORT);
    Ok(timeout(PATIENCE, netns::connect(Some(&link.a.namespace()), to)).await??)
}

/// Moves `bytes` and checks each; returns bytes per second.
async fn bulk(mut from: TcpStream, mut to: TcpStream, bytes: u64) -> Result<f64> {
    let began = Instant::now();
    let send = async {
        write_pattern(&mut from, bytes, 5).await?;
        Ok(from.shutdown().await?)
    };
    let moved = async { tokio::try_join!(send, check_pattern(&mut to, bytes, 5)) };
    timeout(PATIENCE, moved).await.context("the link hangs")??;
    Ok(bytes as f64 / began.elapsed().as_secs_f64())
}

fn loses(chance: f64) -> Impairment {
    Impairment { loss: chance, ..Impairment::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_trip_takes_the_delay_of_both_directions() -> Result<()> {
    let link = ImpairedLink::new(1, Impairment::round_trip(Duration::from_millis(80))).await?;
    let mut ping = link.a.netns.command("ping");
    ping.args(["-c", "5", "-i", "0.2", &link.b.address.to_string()]);
    let ping = Child::spawn("ping", ping)?;
    let statistics = ping.wait_for_text("rtt min/avg/max", PATIENCE).await?;
    let least: f64 = statistics.split(['=', '/']).nth(4).context("no least time")?.trim().parse()?;
    println!("{statistics}");
    ensure!(least >= 80.0, "{statistics}");
    Ok(())
}

/// The numbered packets, of 200, that arrive.
async fn survivors(seed: u64, impairment: Impairment) -> Result<Vec<u8>> {
    let link = ImpairedLink::new(seed, impairment).await?;
    let (from, to) = (SocketAddr::new(link.a.address, PORT), SocketAddr::new(link.b.address, PORT));
    let bind = |address| {
        move || {
            let socket = std::net::UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        }
    };
    let receiver = UdpSocket::from_std(link.b.namespace().run(bind(to)).await?)?;
    let sender = UdpSocket::from_std(link.a.namespace().run(bind(from)).await?)?;
    for number in 0..200 {
        sender.send_to(&[number], to).await?;
    }
    let decided = async {
        loop {
            let there = link.traffic().0;
            if there.passed + there.lost >= 200 {
                return there;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let traffic = timeout(PATIENCE, decided).await.context("packets are missing")?;
    let mut numbers = Vec::new();
    for _ in 0..traffic.passed {
        let mut number = [0];
        timeout(PATIENCE, receiver.recv(&mut number)).await??;
        numbers.push(number[0]);
    }
    Ok(numbers)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_decides_which_packets_are_lost() -> Result<()> {
    let first = survivors(7, loses(0.3)).await?;
    ensure!((100..180).contains(&first.len()), "{} of 200 packets arrived", first.len());
    ensure!(first == survivors(7, loses(0.3)).await?, "the same seed lost other packets");
    ensure!(first != survivors(8, loses(0.3)).await?, "another seed lost the same packets");
    ensure!(survivors(7, Impairment::default()).await?.len() == 200, "a good link lost packets");
    Ok(())
}

/// Waits for the counters from `a` to `b`. There is no event to await, so it polls.
async fn counts(link: &ImpairedLink, wanted: impl Fn(&Traffic) -> bool) -> Result<()> {
    let counted = async {
        while !wanted(&link.traffic().0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    Ok(timeout(PATIENCE, counted).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_outlives_a_blackhole() -> Result<()> {
    let link = ImpairedLink::new(1, Impairment::default()).await?;
    let (mut client, mut server) = connection(&link).await?;
    write_pattern(&mut client, 1000, 1).await?;
    check_pattern(&mut server, 1000, 1).await?;
    // A packet is counted after it was delivered, so the receiver may be ahead of the counter.
    counts(&link, |there| there.bytes >= 1000).await.context("what arrived is not counted")?;
    link.set_both(Impairment::blackhole());
    let passed = link.traffic().0.passed;
    write_pattern(&mut client, 1000, 2).await?;
    counts(&link, |there| there.swallowed >= 2).await.context("nothing came to the blackhole")?;
    ensure!(link.traffic().0.passed == passed, "a packet passed through the blackhole");
    link.set_both(Impairment::default());
    timeout(PATIENCE, check_pattern(&mut server, 1000, 2)).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_delivers_every_byte_in_order_over_an_impaired_link() -> Result<()> {
    let bad = Impairment {
        delay: Duration::from_millis(2),
        loss: 0.01,
        reorder: 0.05,
        reorder_delay: Duration::from_millis(3),
        duplicate: 0.05,
        ..Impairment::default()
    };
    let link = ImpairedLink::new(3, bad).await?;
    let (client, server) = connection(&link).await?;
    bulk(client, server, 4 * MIB).await?;
    let there = link.traffic().0;
    ensure!(there.lost > 0 && there.late > 0 && there.twice > 0, "nothing befell the packets: {there:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_goes_through_than_the_rate() -> Result<()> {
    let rate = Rate { bytes_per_second: 2_000_000, queue: 100_000 };
    let link = ImpairedLink::new(1, Impairment { rate: Some(rate), ..Impairment::default() }).await?;
    let (client, server) = connection(&link).await?;
    let measured = bulk(client, server, 2 * MIB).await?;
    ensure!(measured <= f64::from(rate.bytes_per_second), "{measured} bytes a second");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn small_packets_pass_where_the_mtu_is_small() -> Result<()> {
    let link = ImpairedLink::with_mtu(1, loses(0.001), 600).await?;
    let (client, server) = connection(&link).await?;
    bulk(client, server, MIB).await?;
    let there = link.traffic().0;
    ensure!(there.bytes / there.passed <= 600, "{there:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_was_pulled_out_or_moved_is_reached_again() -> Result<()> {
    let mut link = ImpairedLink::new(1, Impairment::default()).await?;
    link.b.netns.ip(["link", "set", DEVICE, "down"])?;
    link.b.netns.ip(["link", "set", DEVICE, "up"])?;
    let (client, server) = connection(&link).await?;
    bulk(client, server, MIB).await?;
    link.b.readdress(77)?;
    let (client, server) = connection(&link).await?;
    bulk(client, server, MIB).await?;
    let path = link.a.netns.path();
    drop(link);
    ensure!(!path.exists(), "the namespace is still there");
    Ok(())
}

/// Moves bytes at full speed, without checks; returns MiB per second.
async fn flood(mut from: TcpStream, mut to: TcpStream, bytes: u64) -> Result<f64> {
    let began = Instant::now();
    let send = async {
        tokio::io::copy(&mut tokio::io::repeat(0).take(bytes), &mut from).await?;
        Ok(from.shutdown().await?)
    };
    let mut buffer = vec![0; 256 * 1024];
    let receive = async {
        let mut received = 0;
        while let size @ 1.. = to.read(&mut buffer).await? {
            received += size as u64;
        }
        anyhow::Ok(received)
    };
    let ((), received) = timeout(PATIENCE, async { tokio::try_join!(send, receive) }).await??;
    ensure!(received == bytes, "{received} of {bytes} bytes arrived");
    Ok((bytes / MIB) as f64 / began.elapsed().as_secs_f64())
}

/// Prints the throughput of the link on this machine: an upper bound for measurements over it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_line_carries_all_that_is_sent() -> Result<()> {
    for milliseconds in [0, 20, 80] {
        let link = ImpairedLink::new(1, Impairment::round_trip(Duration::from_millis(milliseconds))).await?;
        let (client, server) = connection(&link).await?;
        let rate = flood(client, server, 512 * MIB).await?;
        println!("round trip {milliseconds} ms: {rate:.0} MiB/s; {:?}", link.traffic().0);
    }
    let lossy = Impairment { loss: 0.01, ..Impairment::round_trip(Duration::from_millis(20)) };
    let narrow = Rate { bytes_per_second: 1_000_000_000, queue: 100_000_000 };
    let narrow = Impairment { rate: Some(narrow), ..Impairment::default() };
    for (impairment, bytes) in [(lossy, 8 * MIB), (narrow, 128 * MIB)] {
        let link = ImpairedLink::new(1, impairment).await?;
        let (client, server) = connection(&link).await?;
        let rate = flood(client, server, bytes).await?;
        println!("{impairment:?}: {rate:.1} MiB/s; {:?}", link.traffic().0);
    }
    Ok(())
}
