//! The server behind the tunnels and its clients, in plain threads, so that they cost little compared with what is measured.
//!
//! A connection begins with a byte that names the load. Bulk data repeat one block, and the reader compares every
//! byte.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Bytes of a small request, and of its answer.
pub(super) const SMALL: usize = 200;
/// Beginning of each: the header of a ttrpc data frame (length, stream, type, flags), without which nothing passes the
/// tunnel to the kata agent.
const HEADER: [u8; 10] = [0, 0, 0, (SMALL - 10) as u8, 0, 0, 0, 1, 3, 0];
/// Bytes of one write or read of bulk data.
const CHUNK: usize = 256 * 1024;
/// A connection without progress for this long has failed.
const STUCK: Duration = Duration::from_secs(60);

/// Load of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// The client sends bulk data; at the end the server answers how much arrived.
    Up,
    /// The server sends bulk data until the client has enough.
    Down,
    /// Both directions at once.
    Both,
    /// Small requests and answers, one after the other.
    Echo,
    /// The same through the tunnel to the kata agent: the first request says so itself.
    Calls,
}

impl Load {
    fn byte(self) -> u8 {
        match self {
            Self::Up => b'u',
            Self::Down => b'd',
            Self::Both => b'b',
            Self::Echo => b'e',
            Self::Calls => HEADER[0],
        }
    }

    fn of(byte: u8) -> Option<Self> {
        [Self::Up, Self::Down, Self::Both, Self::Echo, Self::Calls]
            .into_iter()
            .find(|load| load.byte() == byte)
    }
}

/// Serves the listener until the process ends.
pub(super) fn serve(listener: TcpListener) {
    thread::spawn(move || {
        // Runs as long as the process; the clients notice if the listener fails.
        while let Ok((stream, _)) = listener.accept() {
            thread::spawn(move || {
                if let Err(error) = answer(stream)
                    && !gone(&error)
                {
                    eprintln!("bench: the server: {error}");
                }
            });
        }
    });
}

/// A client leaves once it has enough, and so may the tunnel.
fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof)
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match Load::of(kind[0]) {
        Some(Load::Up) => {
            let mut received = Received::default();
            while received.some(&mut stream)? > 0 {}
            stream.write_all(&received.total.to_be_bytes())
        }
        Some(Load::Down) => send(&mut stream, || true).map(drop),
        Some(Load::Both) => {
            let mut back = stream.try_clone()?;
            // The end shows here too: the client closes both directions.
            thread::spawn(move || send(&mut back, || true));
            let mut received = Received::default();
            while received.some(&mut stream)? > 0 {}
            Ok(())
        }
        Some(Load::Echo) => echoes(stream),
        Some(Load::Calls) => {
            let mut first = [0; SMALL];
            stream.read_exact(first.get_mut(kind.len()..).unwrap_or_default())?;
            stream.write_all(&first)?;
            echoes(stream)
        }
        None => Err(io::Error::other("a connection for nothing we know")),
    }
}

fn echoes(mut stream: TcpStream) -> io::Result<()> {
    let mut message = [0; SMALL];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

/// The block that bulk data repeat; it has no long repetition in itself.
fn block() -> &'static [u8] {
    static BLOCK: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BLOCK.get_or_init(|| {
        // xorshift64 (Marsaglia 2003), used only because it does not repeat.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.take(4 * CHUNK / 8).flatten().collect()
    })
}

/// Sends the block repeatedly while `more` returns true; returns the number of bytes.
fn send(stream: &mut impl Write, mut more: impl FnMut() -> bool) -> io::Result<u64> {
    let mut total = 0;
    for chunk in block().chunks(CHUNK).cycle() {
        if !more() {
            break;
        }
        stream.write_all(chunk)?;
        total += chunk.len() as u64;
    }
    Ok(total)
}

/// Bytes that have arrived, each compared.
#[derive(Debug, Default)]
struct Received {
    total: u64,
    buffer: Vec<u8>,
}

impl Received {
    /// Reads what is available; returns the number of bytes, 0 at the end.
    fn some(&mut self, stream: &mut impl Read) -> io::Result<usize> {
        self.buffer.resize(CHUNK, 0);
        let read = stream.read(&mut self.buffer)?;
        let mut data = self.buffer.get(..read).unwrap_or_default();
        while !data.is_empty() {
            let at = usize::try_from(self.total % block().len() as u64).unwrap_or_default();
            let expected = block().get(at..).unwrap_or_default();
            let len = data.len().min(expected.len());
            if data.get(..len) != expected.get(..len) {
                return Err(io::Error::other(format!("wrong data after {} bytes", self.total)));
            }
            data = data.get(len..).unwrap_or_default();
            self.total += len as u64;
        }
        Ok(read)
    }
}

/// Connects for a load; nothing has been sent yet.
///
/// # Errors
/// If the connection is refused.
pub(super) fn open(address: SocketAddr, load: Load) -> Result<TcpStream> {
    begin(TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?, load)
}

/// Sends the byte that names the load.
///
/// # Errors
/// If the connection is gone.
pub(super) fn begin(mut stream: TcpStream, load: Load) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    stream.set_write_timeout(Some(STUCK))?;
    if load != Load::Calls {
        stream.write_all(&[load.byte()]).context("saying what the connection is for")?;
    }
    Ok(stream)
}

/// Durations of a bulk transfer: warm-up, because windows grow with use, then the time that counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// Warm-up.
    pub warm_up: Duration,
    /// Time that counts.
    pub counted: Duration,
}

/// Bytes of a bulk transfer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    /// In the time that counts.
    pub counted: u64,
    /// In total.
    pub total: u64,
}

/// Times at which counting begins and ends.
struct Clock {
    span: Span,
    began: Instant,
    before: u64,
}

impl Clock {
    fn start(span: Span) -> Self {
        Self { span, began: Instant::now(), before: 0 }
    }

    /// Records that `total` bytes have been moved; returns whether to continue.
    fn more(&mut self, total: u64) -> bool {
        let elapsed = self.began.elapsed();
        if elapsed < self.span.warm_up {
            self.before = total;
        }
        elapsed < self.span.warm_up + self.span.counted
    }
}

/// Moves bulk data over a stream that was opened for it; in both directions for [`Load::Both`].
///
/// # Errors
/// If a byte is wrong or missing, or there is no progress.
pub(super) fn bulk(mut stream: TcpStream, load: Load, span: Span) -> Result<Moved> {
    let mut clock = Clock::start(span);
    match load {
        Load::Up => {
            let sent = up(&mut stream, &mut clock)?;
            stream.shutdown(Shutdown::Write)?;
            let mut reply = [0; 8];
            stream.read_exact(&mut reply).context("the server does not say what arrived")?;
            let arrived = u64::from_be_bytes(reply);
            ensure!(arrived == sent, "{sent} bytes were sent, {arrived} arrived");
            Ok(Moved { counted: sent - clock.before, total: sent })
        }
        Load::Down => down(&mut stream, clock),
        Load::Both => {
            let mut back = stream.try_clone()?;
            let down = thread::spawn(move || down(&mut back, Clock::start(span)));
            let sent = up(&mut stream, &mut clock)?;
            let down = down.join().map_err(|_| anyhow::anyhow!("the reader died"))??;
            Ok(Moved { counted: sent - clock.before + down.counted, total: sent + down.total })
        }
        Load::Echo | Load::Calls => anyhow::bail!("that is no bulk load"),
    }
}

fn up(stream: &mut TcpStream, clock: &mut Clock) -> Result<u64> {
    let mut total = 0;
    let more = || {
        let more = clock.more(total);
        total += CHUNK as u64;
        more
    };
    send(stream, more).context("sending")
}

fn down(stream: &mut TcpStream, mut clock: Clock) -> Result<Moved> {
    let mut received = Received::default();
    while clock.more(received.total) {
        ensure!(received.some(stream).context("receiving")? > 0, "it ended early");
    }
    Ok(Moved { counted: received.total - clock.before, total: received.total })
}

/// Sends a small request and reads its answer; returns the time that took.
///
/// # Errors
/// If the answer is wrong, or none comes.
pub(super) fn echo(stream: &mut TcpStream, number: u64) -> Result<Duration> {
    let mut message = [0x5a; SMALL];
    for (to, from) in message.iter_mut().zip(HEADER.into_iter().chain(number.to_be_bytes())) {
        *to = from;
    }
    let mut answer = [0; SMALL];
    let began = Instant::now();
    stream.write_all(&message).context("sending a request")?;
    stream.read_exact(&mut answer).context("waiting for an answer")?;
    let took = began.elapsed();
    ensure!(answer == message, "an answer is not what was sent");
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Span = Span { warm_up: Duration::from_millis(1), counted: Duration::from_millis(20) };

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener);
        address
    }

    #[test]
    fn every_load_moves_bytes_and_counts_them() {
        let server = server();
        for load in [Load::Up, Load::Down, Load::Both] {
            let mut span = SHORT;
            // On a busy machine nothing may move within a short span.
            let moved = loop {
                let moved = bulk(open(server, load).unwrap(), load, span).unwrap();
                if moved.counted > 0 {
                    break moved;
                }
                span.counted *= 2;
                assert!(span.counted < STUCK, "{load:?}: {moved:?}");
            };
            assert!(moved.total >= moved.counted, "{load:?}: {moved:?}");
        }
        for load in [Load::Echo, Load::Calls] {
            let mut stream = open(server, load).unwrap();
            for number in 0..3 {
                echo(&mut stream, number).unwrap();
            }
        }
    }

    #[test]
    fn a_wrong_byte_is_found() {
        let mut data = block().to_vec();
        data.extend_from_slice(block());
        assert_eq!(Received::default().some(&mut data.as_slice()).unwrap(), CHUNK);
        data[CHUNK - 1] ^= 1;
        assert!(Received::default().some(&mut data.as_slice()).is_err());
    }
}
