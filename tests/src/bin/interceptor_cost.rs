//! Measures the cost of the interceptor: the same server, reached through `KATAAGENT` and through a tunnel of plain
//! bytes, alternating, in one run of the real agent and adaptor. About 20 s.
//!
//! `cargo run --release --bin interceptor_cost`; `SECURE_COMMS_BIN_DIR` selects the agent, as in the tests. Every byte
//! of every request and answer is compared; times are reported without a limit.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secure_comms_simulators::accept::Serving;
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, client, endpoint, up};
use secure_comms_tests::simulators::kata_api::api::agent::{
    ReadStreamRequest, ReadStreamResponse, StatsContainerRequest, WriteStreamRequest, WriteStreamResponse,
};
use secure_comms_tests::simulators::kata_api::protobuf::Message;
use secure_comms_tests::simulators::kata_api::server::output;
use secure_comms_tests::simulators::kata_api::ttrpc;
use secure_comms_tests::usage::is_help;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::{TcpStream, UnixListener};
use tokio::time::timeout;

const MIB: usize = 1 << 20;
/// Time in which rounds begin.
const RUN: Duration = Duration::from_secs(18);
/// Small requests per round, one after the other.
const SMALL: u32 = 400;
/// Frames of 1 MiB per round, each way.
const LARGE: u32 = 32;
/// Length, stream, type, flags.
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    if is_help("interceptor_cost: measures the cost of the interceptor of KATAAGENT; about 20 s") {
        return ExitCode::SUCCESS;
    }
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("interceptor_cost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let calls = Arc::new(Calls::new()?);
    let pod = Pod::up(calls.clone()).await?;
    let mut plain = Path::open("PLAIN", &pod, &calls).await?;
    let mut intercepted = Path::open("KATAAGENT", &pod, &calls).await?;
    let (mut rounds, began) = (Vec::new(), Instant::now());
    while began.elapsed() < RUN {
        // The one that goes first in this round goes second in the next.
        let round = if rounds.len() % 2 == 0 {
            let first = plain.round().await?;
            Round { plain: first, intercepted: intercepted.round().await? }
        } else {
            let first = intercepted.round().await?;
            Round { plain: plain.round().await?, intercepted: first }
        };
        rounds.push(round);
    }
    print(&rounds);
    Ok(())
}

/// A pod whose kata agent is reached through both tunnels.
struct Pod {
    adaptor: Child,
    _agent: Child,
    _server: Serving,
    _scene: Scene,
}

impl Pod {
    async fn up(calls: Arc<Calls>) -> Result<Self> {
        let mut scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        scene.kata_socket = scene.path("agent.sock");
        scene.inbounds = "KUBERNETES_PHASE:PLAIN:0".to_owned();
        scene.write_user_data().await?;
        let tag = format!("KUBERNETES_PHASE:PLAIN:{}", scene.kata_socket.display());
        scene.agent_outbounds = format!("{},{tag}", scene.agent_outbounds);
        scene.more_outbounds = format!(",{tag}");
        let listener = UnixListener::bind(&scene.kata_socket)?;
        let server = Serving::start(listener, move |stream| {
            let calls = calls.clone();
            async move {
                if let Err(error) = calls.serve(stream).await {
                    // The client notices the end of the connection, and fails.
                    eprintln!("interceptor_cost: the server: {error:#}");
                }
            }
        });
        let (agent, adaptor) = (scene.agent().await?, scene.adaptor()?);
        up(&adaptor).await?;
        Ok(Self { adaptor, _agent: agent, _server: server, _scene: scene })
    }
}

/// A request and its answer, as frames of stream 0.
struct Call {
    request: Vec<u8>,
    response: Vec<u8>,
}

/// All the calls that are made.
struct Calls {
    /// Some 200 bytes each way.
    small: Call,
    /// 1 MiB to the kata agent.
    write: Call,
    /// 1 MiB from it.
    read: Call,
}

impl Calls {
    fn new() -> Result<Self> {
        let (id, data) = ("0123456789abcdef".repeat(4), output("bulk", MIB));
        let stats = StatsContainerRequest { container_id: id.repeat(2), ..Default::default() };
        let stats_answer = ReadStreamResponse { data: output("stats", 190), ..Default::default() };
        let write = WriteStreamRequest { container_id: id.clone(), data: data.clone(), ..Default::default() };
        let written = WriteStreamResponse { len: u32::try_from(MIB)?, ..Default::default() };
        let read = ReadStreamRequest { container_id: id, len: u32::try_from(MIB)?, ..Default::default() };
        let read_answer = ReadStreamResponse { data, ..Default::default() };
        Ok(Self {
            small: Call::new("StatsContainer", &stats, &stats_answer)?,
            write: Call::new("WriteStdin", &write, &written)?,
            read: Call::new("ReadStdout", &read, &read_answer)?,
        })
    }

    /// Answers the calls of one connection, which must be among those above.
    async fn serve(&self, stream: impl AsyncRead + AsyncWrite) -> Result<()> {
        let (read, write) = tokio::io::split(stream);
        let (mut read, mut write) = (BufReader::new(read), BufWriter::new(write));
        let (mut frame, mut answer) = (Vec::new(), Vec::new());
        // Ends between two frames, when the client has closed.
        while !read.fill_buf().await?.is_empty() {
            let stream = read_frame(&mut read, &mut frame).await?;
            let mut calls = [&self.small, &self.write, &self.read].into_iter();
            let call = calls.find(|call| same(&frame, &call.request));
            let call = call.context("a request is not as it was sent")?;
            answer.clone_from(&call.response);
            set_stream(&mut answer, stream);
            write.write_all(&answer).await?;
            write.flush().await?;
        }
        Ok(())
    }
}

impl Call {
    fn new(method: &str, request: &impl Message, response: &impl Message) -> Result<Self> {
        let request = ttrpc::Request {
            service: "grpc.AgentService".into(),
            method: method.into(),
            payload: request.write_to_bytes()?,
            ..Default::default()
        };
        let response = ttrpc::Response { payload: response.write_to_bytes()?, ..Default::default() };
        Ok(Self {
            request: frame(REQUEST, &request.write_to_bytes()?)?,
            response: frame(RESPONSE, &response.write_to_bytes()?)?,
        })
    }
}

fn frame(kind: u8, data: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(data.len())?.to_be_bytes();
    Ok([&length[..], &[0; 4], &[kind, 0], data].concat())
}

fn set_stream(frame: &mut [u8], stream: u32) {
    if let Some(id) = frame.get_mut(4..8) {
        id.copy_from_slice(&stream.to_be_bytes());
    }
}

/// Whether two frames are equal except for their stream.
fn same(frame: &[u8], other: &[u8]) -> bool {
    frame.get(..4) == other.get(..4) && frame.get(8..) == other.get(8..)
}

/// Reads a whole frame; returns its stream.
async fn read_frame(read: &mut (impl AsyncRead + Unpin), frame: &mut Vec<u8>) -> Result<u32> {
    frame.resize(HEADER, 0);
    read.read_exact(frame).await.context("reading a header")?;
    let word = |at: usize| frame.get(at..).and_then(<[u8]>::first_chunk).copied().map(u32::from_be_bytes);
    let (length, stream) = word(0).zip(word(4)).context("a header is too short")?;
    let length = usize::try_from(length)?;
    ensure!(length <= 4 * MIB, "a frame of {length} bytes");
    frame.resize(HEADER + length, 0);
    read.read_exact(frame.get_mut(HEADER..).unwrap_or_default()).await.context("reading a frame")?;
    Ok(stream)
}

/// One of the two paths to the server.
struct Path {
    name: &'static str,
    read: BufReader<tokio::net::tcp::OwnedReadHalf>,
    write: tokio::net::tcp::OwnedWriteHalf,
    calls: Arc<Calls>,
    /// Stream of the next call.
    next: u32,
    frame: Vec<u8>,
}

/// Times of one round over one path.
struct Times {
    p50: f64,
    p99: f64,
    write: f64,
    read: f64,
}

struct Round {
    plain: Times,
    intercepted: Times,
}

impl Path {
    /// Connects, and makes one round that does not count: windows grow with use.
    async fn open(name: &'static str, pod: &Pod, calls: &Arc<Calls>) -> Result<Self> {
        let stream: TcpStream = client(endpoint(&pod.adaptor, name).await?).await?;
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        let read = BufReader::new(read);
        let mut path = Self { name, read, write, calls: calls.clone(), next: 1, frame: Vec::new() };
        path.round().await?;
        Ok(path)
    }

    async fn round(&mut self) -> Result<Times> {
        let name = self.name;
        let round = async {
            let calls = self.calls.clone();
            let mut small = Vec::new();
            for _ in 0..SMALL {
                small.push(self.calls(&calls.small, 1).await?);
            }
            small.sort_unstable_by(f64::total_cmp);
            let at = |share: usize| small.get(small.len() * share / 100).copied().unwrap_or_default();
            anyhow::Ok(Times {
                p50: at(50),
                p99: at(99),
                write: self.calls(&calls.write, LARGE).await?,
                read: self.calls(&calls.read, LARGE).await?,
            })
        };
        timeout(PATIENCE, round).await.with_context(|| format!("{name} hangs"))?.context(name)
    }

    /// Sends `call` `count` times without waiting between them; returns the seconds until all are answered.
    async fn calls(&mut self, call: &Call, count: u32) -> Result<f64> {
        let first = self.next;
        self.next += 2 * count;
        let mut request = call.request.clone();
        let began = Instant::now();
        let send = async {
            for stream in (first..self.next).step_by(2) {
                set_stream(&mut request, stream);
                self.write.write_all(&request).await.context("sending")?;
            }
            anyhow::Ok(())
        };
        let receive = async {
            for expected in (first..self.next).step_by(2) {
                let stream = read_frame(&mut self.read, &mut self.frame).await?;
                ensure!(stream == expected, "the answer on stream {stream} came where {expected}'s should");
                ensure!(same(&self.frame, &call.response), "an answer is not as it was sent");
            }
            Ok(())
        };
        tokio::try_join!(send, receive)?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// The median.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Medians over the rounds; a ratio is the median of the rounds' ratios, since a slow round slows both paths.
fn print(rounds: &[Round]) {
    let row = |name: &str, unit: &str, of: fn(&Times) -> f64| {
        let plain = median(rounds.iter().map(|round| of(&round.plain)));
        let intercepted = median(rounds.iter().map(|round| of(&round.intercepted)));
        let ratio = median(rounds.iter().map(|round| of(&round.intercepted) / of(&round.plain)));
        println!("{name:<28} {plain:>12.1} {intercepted:>12.1} {unit:<6} {ratio:>6.3}");
    };
    println!(
        "{} rounds; medians{:>22} {:>12} {:<6} {:>6}",
        rounds.len(),
        "plain",
        "intercepted",
        "",
        "ratio"
    );
    row("small call, p50", "us", |times| times.p50 * 1e6);
    row("small call, p99", "us", |times| times.p99 * 1e6);
    row("WriteStdin, 1 MiB frames", "MiB/s", |times| f64::from(LARGE) / times.write);
    row("ReadStdout, 1 MiB frames", "MiB/s", |times| f64::from(LARGE) / times.read);
}
