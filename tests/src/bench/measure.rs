//! The measurements of one contender in one round.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::contender::{Contender, Prepared, Who};
use super::load::{self, Load, Moved, Span};
use super::place::Place;

/// Figures of one round, by the names that [`super::groups`] gives them.
pub(super) type Figures = BTreeMap<&'static str, f64>;

const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;
/// Streams of the measurements with many streams.
const MANY: usize = 16;
/// Open streams of the memory measurement.
const OPEN: u64 = 300;

/// Bulk data in MiB/s, and their cost at each end.
///
/// # Errors
/// If a byte is wrong, or there is no progress.
pub(super) async fn bulk(place: &Place, contender: &Contender, span: Span) -> Result<Figures> {
    let mut figures = Figures::new();
    for (load, speed, vm, node) in [
        (Load::Up, "up 1", "up vm cpu", "up node cpu"),
        (Load::Down, "down 1", "down vm cpu", "down node cpu"),
    ] {
        let before = (contender.vm.cpu()?, contender.node.cpu()?);
        let moved = streams(place, contender, load, 1, span).await?;
        let gib = moved.total as f64 / GIB;
        figures.insert(speed, rate(moved, span));
        figures.insert(vm, (contender.vm.cpu()? - before.0).as_secs_f64() / gib);
        figures.insert(node, (contender.node.cpu()? - before.1).as_secs_f64() / gib);
    }
    for (load, speed) in [(Load::Up, "up 16"), (Load::Down, "down 16"), (Load::Both, "both 16")] {
        figures.insert(speed, rate(streams(place, contender, load, MANY, span).await?, span));
    }
    Ok(figures)
}

/// Bulk data over one stream, in MiB/s, over a link with a long round trip.
///
/// # Errors
/// As [`bulk`].
pub(super) async fn distance(
    place: &Place,
    contender: &Contender,
    span: Span,
    requests: u64,
) -> Result<Figures> {
    let mut figures = Figures::new();
    for (load, name) in [(Load::Up, "up 1"), (Load::Down, "down 1")] {
        figures.insert(name, rate(streams(place, contender, load, 1, span).await?, span));
    }
    latency_of(place, (contender.inbound, Load::Echo), ["p50", "p99"], requests, &mut figures).await?;
    Ok(figures)
}

/// Small requests in microseconds: alone, during bulk data in either direction of the same tunnel and of another one,
/// with a stalled reader.
///
/// # Errors
/// If an answer is wrong, or none comes.
pub(super) async fn latency(place: &Place, contender: &Contender, requests: u64) -> Result<Figures> {
    let mut figures = Figures::new();
    let inbound = contender.inbound;
    latency_of(place, (inbound, Load::Echo), ["alone p50", "alone p99"], requests, &mut figures).await?;
    for (load, same, other) in [
        (Load::Up, ["with up p50", "with up p99"], ["kata with up p50", "kata with up p99"]),
        (Load::Down, ["with down p50", "with down p99"], ["kata with down p50", "kata with down p99"]),
    ] {
        let neighbour = Neighbour::busy(place, contender, load).await?;
        latency_of(place, (inbound, Load::Echo), same, requests, &mut figures).await?;
        latency_of(place, (contender.kata_inbound, Load::Calls), other, requests, &mut figures).await?;
        neighbour.end()?;
    }
    // A stream that is not read; it is full when the requests begin, or they fill it up.
    let stalled = place.at_node(move || load::open(inbound, Load::Down)).await?;
    latency_of(place, (inbound, Load::Echo), ["stalled p50", "stalled p99"], requests, &mut figures).await?;
    drop(stalled);
    Ok(figures)
}

/// Time from the start of the client's process, and from its TCP connect, to the first byte through a tunnel, and
///  from a new client of a tunnel to its first answer; in milliseconds.
///
/// # Errors
/// If it does not come up.
pub(super) async fn setup(who: Who, target: SocketAddr) -> Result<Figures> {
    let place = Place::Here;
    let prepared = Prepared::new(who, &place, target).await?;
    let (address, accepted) = witness(prepared.ssh())?;
    let (contender, start) = prepared.connect(&place, address).await?;
    let connect = accepted.join().map_err(|_| anyhow!("the witness died"))??;
    let inbound = contender.inbound;
    let stream = place
        .at_node(move || {
            let began = Instant::now();
            load::echo(&mut load::open(inbound, Load::Echo)?, 1)?;
            Ok(began.elapsed())
        })
        .await?;
    Ok(Figures::from([
        ("process", milliseconds(start.end - start.start)),
        ("connect", milliseconds(start.end - connect)),
        ("stream", milliseconds(stream)),
    ]))
}

/// Resident memory in KiB, of fresh processes: connected, with many streams open, and its peak during bulk data.
///
/// # Errors
/// As the other measurements.
pub(super) async fn memory(who: Who, target: SocketAddr, span: Span) -> Result<Figures> {
    let place = Place::Here;
    let mut figures = Figures::new();
    let prepared = Prepared::new(who, &place, target).await?;
    let address = prepared.ssh();
    let (contender, _) = prepared.connect(&place, address).await?;
    figures.insert("vm connected", contender.vm.memory("VmRSS")? as f64);
    figures.insert("node connected", contender.node.memory("VmRSS")? as f64);
    let inbound = contender.inbound;
    let open = place
        .at_node(move || {
            let open = |number| {
                let mut stream = load::open(inbound, Load::Echo)?;
                load::echo(&mut stream, number).with_context(|| format!("stream {number}"))?;
                anyhow::Ok(stream)
            };
            (0..OPEN).map(open).collect::<Result<Vec<_>>>()
        })
        .await?;
    figures.insert("vm 300", contender.vm.memory("VmRSS")? as f64);
    figures.insert("node 300", contender.node.memory("VmRSS")? as f64);
    drop((open, contender));
    let prepared = Prepared::new(who, &place, target).await?;
    let address = prepared.ssh();
    let (contender, _) = prepared.connect(&place, address).await?;
    streams(&place, &contender, Load::Both, MANY, span).await?;
    figures.insert("vm peak", contender.vm.memory("VmHWM")? as f64);
    figures.insert("node peak", contender.node.memory("VmHWM")? as f64);
    Ok(figures)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn rate(moved: Moved, span: Span) -> f64 {
    moved.counted as f64 / MIB / span.counted.as_secs_f64()
}

/// Moves bulk data over several streams at once.
async fn streams(
    place: &Place,
    contender: &Contender,
    load: Load,
    count: usize,
    span: Span,
) -> Result<Moved> {
    let inbound = contender.inbound;
    place
        .at_node(move || {
            let open = (0..count).map(|_| load::open(inbound, load)).collect::<Result<Vec<_>>>()?;
            let begin = |stream| thread::spawn(move || load::bulk(stream, load, span));
            let running: Vec<_> = open.into_iter().map(begin).collect();
            let mut all = Moved::default();
            for stream in running {
                let moved = stream.join().map_err(|_| anyhow!("a client died"))??;
                all.counted += moved.counted;
                all.total += moved.total;
            }
            Ok(all)
        })
        .await
}

async fn latency_of(
    place: &Place,
    (inbound, load): (SocketAddr, Load),
    [p50, p99]: [&'static str; 2],
    requests: u64,
    figures: &mut Figures,
) -> Result<()> {
    let mut times = place
        .at_node(move || {
            let mut stream = load::open(inbound, load)?;
            (0..requests).map(|number| load::echo(&mut stream, number)).collect::<Result<Vec<_>>>()
        })
        .await?;
    times.sort_unstable();
    let at =
        |share: usize| times.get(times.len() * share / 100).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6);
    figures.insert(p50, at(50));
    figures.insert(p99, at(99));
    Ok(())
}

/// A stream that moves bulk data until it is stopped.
struct Neighbour {
    stream: TcpStream,
    running: thread::JoinHandle<Result<Moved>>,
}

impl Neighbour {
    /// Starts it, and waits until its windows have grown.
    async fn busy(place: &Place, contender: &Contender, load: Load) -> Result<Self> {
        let inbound = contender.inbound;
        let stream = place.at_node(move || load::open(inbound, load)).await?;
        let moving = stream.try_clone()?;
        let endless = Span { warm_up: Duration::ZERO, counted: Duration::from_secs(3600) };
        let running = thread::spawn(move || load::bulk(moving, load, endless));
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(Self { stream, running })
    }

    /// Resets the connection; that it has moved data until then is proven by its still being open.
    fn end(self) -> Result<()> {
        if self.running.is_finished() {
            let ended = self.running.join().map_err(|_| anyhow!("the neighbour died"))?;
            return Err(ended.err().unwrap_or_else(|| anyhow!("it ended"))).context("the busy neighbour");
        }
        self.stream.shutdown(Shutdown::Both)?;
        // The error is the expected result of the reset.
        drop(self.running.join().map_err(|_| anyhow!("the neighbour died"))?);
        Ok(())
    }
}

/// An address that is relayed to `server` for one connection, and the time of that connection.
fn witness(server: SocketAddr) -> Result<(SocketAddr, thread::JoinHandle<Result<Instant>>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let waiting = thread::spawn(move || {
        let (client, _) = listener.accept().context("no client connected")?;
        let accepted = Instant::now();
        let server = TcpStream::connect(server)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
        }
        for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            // Either end closes when it is done; the measurement is complete by then.
            thread::spawn(move || std::io::copy(&mut from, &mut to).and_then(|_| to.flush()));
        }
        Ok(accepted)
    });
    Ok((address, waiting))
}
