//! Measures russh without Secure Comms: a client and a server, compared with TCP without SSH, alternating, in one run of
//!  about 20 s.
//!
//! `cargo run --release --bin bare_russh`; docs/BENCHMARKS.md discusses the result. The configuration is that of agent
//!  and adaptor, with one thread per end.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use russh::client::{self, Handle};
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::{PrivateKey, PublicKeyOrCertificate};
use russh::server::{self, Auth, ChannelOpenHandle, Msg, Session};
use russh::{Channel, ChannelMsg};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{MESSAGE_MAX, REKEY_BYTES};
use secure_comms_ssh::profile::{self, KeyExchange};
use secure_comms_tests::usage::is_help;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Duration of bulk data in a round.
const BULK: Duration = Duration::from_millis(1500);
const ROUNDS: usize = 5;
/// Requests in a round, one after the other, and the size in bytes of a request and of its answer.
const REQUESTS: u32 = 3000;
const REQUEST: usize = 200;
/// Marks the end of bulk data: a message, or write, of one byte.
const END: u8 = b'.';
const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;

fn main() -> ExitCode {
    if is_help("bare_russh: measures russh without Secure Comms, compared with TCP; about 20 s") {
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bare_russh: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (mut tcp, mut ssh) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        // The one that goes first in this round goes second in the next.
        for kind in if number % 2 == 0 { [Kind::Tcp, Kind::Ssh] } else { [Kind::Ssh, Kind::Tcp] } {
            let round = measure_kind(kind).with_context(|| format!("{kind:?}"))?;
            if kind == Kind::Tcp { tcp.push(round) } else { ssh.push(round) }
        }
    }
    println!("medians of {ROUNDS} rounds          TCP    russh");
    for (what, figure) in [
        ("bulk data, MiB/s", (|round| round.speed) as fn(&Round) -> f64),
        ("sending, CPU s/GiB", |round| round.sending),
        ("receiving, CPU s/GiB", |round| round.receiving),
        ("200 bytes and back, p50 us", |round| round.p50),
        ("200 bytes and back, p99 us", |round| round.p99),
    ] {
        println!("{what:27}{:9.2}{:9.2}", median(&tcp, figure), median(&ssh, figure));
    }
    Ok(())
}

fn median(turns: &[Round], figure: fn(&Round) -> f64) -> f64 {
    let mut figures: Vec<f64> = turns.iter().map(figure).collect();
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Ssh,
}

/// Figures of one round.
struct Round {
    speed: f64,
    sending: f64,
    receiving: f64,
    p50: f64,
    p99: f64,
}

/// Bytes of bulk data that the server has received, and the processor time it took.
#[derive(Clone, Copy)]
struct Received {
    bytes: u64,
    cpu: Duration,
}

fn measure_kind(kind: Kind) -> Result<Round> {
    let (address, addressed) = oneshot::channel();
    let server = thread::spawn(move || {
        on_this_thread(async {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            address.send(listener.local_addr()?).ok().context("no client connected")?;
            let (socket, _) = listener.accept().await?;
            socket.set_nodelay(true)?;
            match kind {
                Kind::Tcp => serve(Tcp(socket)).await,
                Kind::Ssh => serve_ssh(socket).await,
            }
        })
    });
    let round = on_this_thread(async {
        let socket = TcpStream::connect(addressed.await?).await?;
        socket.set_nodelay(true)?;
        match kind {
            Kind::Tcp => measure(Tcp(socket)).await,
            Kind::Ssh => {
                let config = Arc::new(profile::client(REKEY_BYTES, KeyExchange::Any));
                let mut handle: Handle<AnyServer> = client::connect_stream(config, socket, AnyServer).await?;
                ensure!(handle.authenticate_none("bare").await?.success(), "not let in");
                measure(handle.channel_open_session().await?).await
            }
        }
    })?;
    server.join().ok().context("the server panicked")??;
    Ok(round)
}

fn on_this_thread<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Messages in both directions: those of a channel, or the reads and writes of a socket.
trait Pipe {
    async fn send(&mut self, data: Bytes) -> Result<()>;
    async fn receive(&mut self) -> Result<Bytes>;

    async fn receive_exactly(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend_from_slice(&self.receive().await?);
        }
        ensure!(all.len() == length, "{} bytes instead of {length}", all.len());
        Ok(all)
    }
}

struct Tcp(TcpStream);

impl Pipe for Tcp {
    async fn send(&mut self, data: Bytes) -> Result<()> {
        Ok(self.0.write_all(&data).await?)
    }

    async fn receive(&mut self) -> Result<Bytes> {
        let mut buffer = Vec::with_capacity(MESSAGE_MAX);
        ensure!(self.0.read_buf(&mut buffer).await? > 0, "the other end is gone");
        Ok(buffer.into())
    }
}

impl<S: From<(russh::ChannelId, ChannelMsg)> + Send + Sync + 'static> Pipe for Channel<S> {
    async fn send(&mut self, data: Bytes) -> Result<()> {
        Ok(self.data_bytes(data).await?)
    }

    async fn receive(&mut self) -> Result<Bytes> {
        loop {
            match self.wait().await.context("the other end is gone")? {
                ChannelMsg::Data { data } => return Ok(data),
                _ => continue,
            }
        }
    }
}

async fn measure(mut pipe: impl Pipe) -> Result<Round> {
    let request = Bytes::from(vec![b'r'; REQUEST]);
    let mut times = Vec::new();
    for _ in 0..REQUESTS {
        let began = Instant::now();
        pipe.send(request.clone()).await?;
        ensure!(pipe.receive_exactly(REQUEST).await? == request, "another answer");
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let percentile = |percent: usize| times.get(times.len() * percent / 100).map_or(0.0, micros);
    let message = Bytes::from(vec![b'm'; MESSAGE_MAX]);
    let (began, cpu, mut sent) = (Instant::now(), cpu()?, 0_u64);
    while began.elapsed() < BULK {
        pipe.send(message.clone()).await?;
        sent += message.len() as u64;
    }
    pipe.send(Bytes::from_static(&[END])).await?;
    let received = Received::read(&pipe.receive_exactly(Received::SIZE).await?)?;
    let (took, cpu) = (began.elapsed(), self::cpu()? - cpu);
    ensure!(received.bytes == sent, "{} bytes of {sent} arrived", received.bytes);
    let gib = sent as f64 / GIB;
    Ok(Round {
        speed: sent as f64 / MIB / took.as_secs_f64(),
        sending: cpu.as_secs_f64() / gib,
        receiving: received.cpu.as_secs_f64() / gib,
        p50: percentile(50),
        p99: percentile(99),
    })
}

fn micros(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Answers the requests, then counts bulk data and reports how much it was.
async fn serve(mut pipe: impl Pipe) -> Result<()> {
    for _ in 0..REQUESTS {
        let request = pipe.receive_exactly(REQUEST).await?;
        pipe.send(request.into()).await?;
    }
    let mut received = Received { bytes: 0, cpu: cpu()? };
    loop {
        let data = pipe.receive().await?;
        received.bytes += data.len() as u64;
        if data.last() == Some(&END) {
            break;
        }
    }
    received.bytes -= 1;
    received.cpu = cpu()? - received.cpu;
    pipe.send(received.write()).await?;
    // The other end closes once it has read that.
    drop(pipe.receive().await);
    Ok(())
}

impl Received {
    const SIZE: usize = 16;

    fn write(self) -> Bytes {
        let nanoseconds = u64::try_from(self.cpu.as_nanos()).unwrap_or(u64::MAX);
        [self.bytes.to_be_bytes(), nanoseconds.to_be_bytes()].concat().into()
    }

    fn read(bytes: &[u8]) -> Result<Self> {
        let (count, rest) = bytes.split_first_chunk().context("cut short")?;
        let nanoseconds = u64::from_be_bytes(rest.try_into()?);
        Ok(Self { bytes: u64::from_be_bytes(*count), cpu: Duration::from_nanos(nanoseconds) })
    }
}

/// Processor time of this thread: the first figure of its schedstat (proc(5)).
fn cpu() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(Duration::from_nanos(text.split_whitespace().next().context("an empty schedstat")?.parse()?))
}

async fn serve_ssh(socket: TcpStream) -> Result<()> {
    let seed = std::array::from_fn(|at| at as u8);
    let key = PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed)), "")?;
    let config = Arc::new(profile::server(PhaseName::Kubernetes, key, REKEY_BYTES, KeyExchange::Any));
    let (opened, channel) = oneshot::channel();
    let session = tokio::spawn(server::run_stream(config, socket, AnyClient(Some(opened))).await?);
    serve(channel.await?).await?;
    session.abort();
    Ok(())
}

/// Accepts any client, and hands on the one channel that it opens.
struct AnyClient(Option<oneshot::Sender<Channel<Msg>>>);

impl server::Handler for AnyClient {
    type Error = russh::Error;

    async fn auth_none(&mut self, _: &str) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if let Some(opened) = self.0.take() {
            reply.accept().await;
            drop(opened.send(channel));
        }
        Ok(())
    }
}

struct AnyServer;

impl client::Handler for AnyServer {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}
