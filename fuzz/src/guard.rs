//! Properties of a guarded socket for any bytes of the peer and any order of reads, writes and arrivals: reads return
//! the bytes that were sent, read-ahead keeps its limit, and only peers with strict key exchange pass.

use secure_comms_ssh::guard::{Guard, Guarded, Peer};
use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Limits in bytes: read-ahead for an unauthenticated peer, read-ahead in addition to credit for an authenticated one, and
///  the excess of a single read over either.
const UNAUTHENTICATED: usize = 256 * 1024;
const SLACK: usize = 1024 * 1024;
const READ: usize = 64 * 1024;
/// Bytes that are inspected for the first packet.
const FIRST_MAX: usize = 64 * 1024;
/// Most bytes of one move.
const ARRIVES_MAX: usize = 310_000;
/// Moves of a script; the rest of the input is what the peer sends.
const MOVES: usize = 24;

/// A peer, with the bytes that it sent and that were taken so far.
struct Sent<'a> {
    /// Bytes from the fuzzer.
    data: &'a [u8],
    /// Bytes after those; each differs from its neighbours, so that positions can be told apart.
    filler: &'static [u8],
    arrived: usize,
    taken: usize,
    takes_writes: bool,
}

impl Sent<'_> {
    /// The part of this range that is in one piece.
    fn piece(&self, from: usize, to: usize) -> &[u8] {
        match self.data.get(from..to.min(self.data.len())) {
            Some(piece) if !piece.is_empty() => piece,
            _ => &self.filler[from..to],
        }
    }
}

struct Socket<'a>(&'a RefCell<Sent<'a>>);

impl AsyncRead for Socket<'_> {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut sent = self.0.borrow_mut();
        let to = sent.arrived.min(sent.taken + out.remaining());
        if to == sent.taken {
            return Poll::Pending;
        }
        let piece = sent.piece(sent.taken, to);
        out.put_slice(piece);
        let taken = piece.len();
        sent.taken += taken;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.0.borrow().takes_writes { Poll::Ready(Ok(data.len())) } else { Poll::Pending }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The first byte selects the peer's role, moves follow, the rest is what the peer sends.
pub(crate) fn exercise(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else { return };
    let Some((moves, data)) = rest.split_at_checked(MOVES) else { return };
    let (peer, marker): (_, &[u8]) = match which & 1 {
        0 => (Peer::Client, b"kex-strict-c-v00@openssh.com"),
        _ => (Peer::Server, b"kex-strict-s-v00@openssh.com"),
    };
    static FILLER: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..=250).cycle().take(MOVES * ARRIVES_MAX).collect());
    let sent = RefCell::new(Sent { data, filler: &FILLER, arrived: 0, taken: 0, takes_writes: false });
    let first: Vec<u8> =
        data.iter().chain(FILLER.get(data.len()..).unwrap_or_default()).take(FIRST_MAX).copied().collect();
    let mut offers = None;
    let (mut guarded, guard) = Guarded::new(Socket(&sent), peer);
    let (mut read, mut bound) = (0, UNAUTHENTICATED);
    for step in moves {
        let outcome = make(*step, &sent, &mut guarded, &guard, &mut read, &mut bound);
        let sent = sent.borrow();
        let seen = &first[..sent.taken.min(FIRST_MAX)];
        offers = offers.or_else(|| strict(seen, marker));
        let is_refused = offers.map_or(seen.len() == FIRST_MAX, |offers| !offers);
        if let Err(error) = outcome {
            assert!(is_refused, "an honest peer is refused: {error}");
            return;
        }
        assert!(!is_refused, "a peer without strict key exchange goes on");
        assert!(sent.taken - read <= bound + READ, "{} read ahead", sent.taken - read);
    }
    guard.cut();
    let mut buffer = [0; 16];
    let cut = poll_read(&mut guarded, &mut ReadBuf::new(&mut buffer));
    assert!(matches!(cut, Poll::Ready(Err(_))), "a connection that is cut goes on");
}

/// Three bits select the move, the others its size.
fn make(
    step: u8,
    sent: &RefCell<Sent<'_>>,
    guarded: &mut Guarded<Socket<'_>>,
    guard: &Guard,
    read: &mut usize,
    bound: &mut usize,
) -> io::Result<()> {
    let much = usize::from(step >> 3);
    match step & 7 {
        0..=2 => sent.borrow_mut().arrived += arrives(step),
        3 => {
            // The read-ahead limit never shrinks.
            *bound = (*bound).max(much * 10_000 + SLACK);
            guard.set_read_ahead_limit(*bound - SLACK);
        }
        4 | 5 => {
            sent.borrow_mut().takes_writes = step & 1 == 1;
            let written = Pin::new(guarded).poll_write(&mut context(), b"data");
            if let Poll::Ready(written) = written {
                assert!(written? == 4 && step & 1 == 1);
            }
        }
        _ => {
            let mut buffer = vec![0; if step & 1 == 0 { much + 1 } else { (much + 1) * 5000 }];
            let mut out = ReadBuf::new(&mut buffer);
            match poll_read(guarded, &mut out) {
                Poll::Ready(result) => result?,
                Poll::Pending => assert_eq!(*read, sent.borrow().arrived, "it waits, and there is something"),
            }
            let mut filled = out.filled();
            while !filled.is_empty() {
                let sent = sent.borrow();
                let piece = sent.piece(*read, *read + filled.len());
                assert!(filled.starts_with(piece), "other bytes than were sent");
                filled = &filled[piece.len()..];
                *read += piece.len();
            }
        }
    }
    Ok(())
}

/// Bytes that arrive in one move.
fn arrives(step: u8) -> usize {
    let much = usize::from(step >> 3);
    match step & 7 {
        0 => much,
        1 => much * 500,
        2 => much * (ARRIVES_MAX / 31),
        _ => 0,
    }
}

fn poll_read(guarded: &mut Guarded<Socket<'_>>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    Pin::new(guarded).poll_read(&mut context(), out)
}

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// Whether the peer's first packet, if complete, has the marker of strict key exchange: RFC 4253 4.2, 5.1, 6 and 7.1,
///  implemented independently of the guard. Ambiguous lines before the packet count as no offer.
fn strict(seen: &[u8], marker: &[u8]) -> Option<bool> {
    let mut packet = &[][..];
    let lines = seen.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let mut used = 0;
    for line in lines {
        used += line.len();
        let line = line.strip_suffix(b"\r\n").unwrap_or(&line[..line.len() - 1]);
        if line.is_empty() || line.iter().any(|byte| *byte != b' ' && !byte.is_ascii_graphic()) {
            return Some(false);
        }
        let Some(version) = line.strip_prefix(b"SSH-") else { continue };
        if ![&b"2.0-"[..], b"1.99-"].iter().any(|known| version.starts_with(known)) {
            return Some(false);
        }
        packet = &seen[used..];
        break;
    }
    // Length, padding, message number, cookie, length of the first name list, and the list.
    let (_, packet) = packet.split_at_checked(5)?;
    let (message, packet) = packet.split_first()?;
    if *message != 20 {
        return Some(false);
    }
    let (_, packet) = packet.split_at_checked(16)?;
    let (length, packet) = packet.split_first_chunk()?;
    let names = packet.get(..u32::from_be_bytes(*length) as usize)?;
    Some(names.split(|byte| *byte == b',').any(|name| name == marker))
}
