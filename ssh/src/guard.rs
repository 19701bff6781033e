//! The socket of a russh session: it reads ahead while a write is pending, requires strict key exchange, and can be
//! cut.
//!
//! An SSH session does not read while it writes (D2), so two busy ones can deadlock. While a write is pending, the guarded
//! socket reads ahead into a bounded buffer. The bound is the number of bytes that the peer may have in flight, so the
//! writes of an honest peer always proceed. Bytes are charged to the SSH session's task, so that a connection with bulk
//! data does not keep the thread while others wait ([`secure_comms_tunnel::budget`]). An SSH session can't be stopped from
//! outside, because its task outlives every handle; cutting its socket ends it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use secure_comms_tunnel::{Account, budget};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;
use tokio::time::Instant;

pub use self::strict::Peer;
use self::strict::StrictKex;

mod strict;

/// Read-ahead limit before the peer has authenticated, in bytes.
const UNAUTHENTICATED_READ_AHEAD: usize = 256 * 1024;
/// Read-ahead that no account is charged for, in bytes.
const UNCHARGED_READ_AHEAD: usize = UNAUTHENTICATED_READ_AHEAD;
/// Most bytes of framing and channel messages, in addition to the data that credits count. A smaller limit gets a
/// quarter of its data instead, so that eight unproven peers that never read do not take 8 MiB.
const READ_AHEAD_SLACK: usize = 1024 * 1024;
/// Longest identification line (RFC 4253 4.2), in bytes.
const LINE: usize = 256;
/// Size of a piece of the read-ahead, in bytes.
const READ: usize = 64 * 1024;
/// Size of a read that starts with the length of a packet, in bytes.
const SMALL: usize = 2048;
/// Largest read of an SSH session that asks only for the length of a packet (RFC 4253 6), in bytes.
const LENGTH: usize = 16;
/// Capacity that an empty read-ahead keeps, in pieces.
const KEEP: usize = 8;

/// Handle of a guarded socket.
#[derive(Clone, Debug)]
pub struct Guard(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    cut: AtomicBool,
    read_ahead: AtomicUsize,
    waker: Mutex<Option<Waker>>,
    since: Instant,
    /// Time of the oldest write after which nothing has arrived: 1 + milliseconds from `since`; 0 if there is none.
    unanswered: AtomicU64,
    /// Why the server is not one for SSH.
    complaint: Mutex<Option<String>>,
    /// Whether the peer's identification has arrived.
    identified: AtomicBool,
    /// What is read ahead beyond [`UNCHARGED_READ_AHEAD`] is taken from it; none before the peer has authenticated.
    account: OnceLock<Account>,
}

impl Shared {
    fn wrote(&self) {
        if self.unanswered.load(Ordering::Relaxed) == 0 {
            self.unanswered.store(self.now() + 1, Ordering::Relaxed);
        }
    }

    fn arrived(&self) {
        if self.unanswered.load(Ordering::Relaxed) != 0 {
            self.unanswered.store(0, Ordering::Relaxed);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }
}

impl Default for Guard {
    fn default() -> Self {
        Self(Arc::new(Shared {
            cut: AtomicBool::new(false),
            read_ahead: AtomicUsize::new(UNAUTHENTICATED_READ_AHEAD),
            waker: Mutex::default(),
            since: Instant::now(),
            unanswered: AtomicU64::new(0),
            complaint: Mutex::default(),
            identified: AtomicBool::new(false),
            account: OnceLock::new(),
        }))
    }
}

impl Guard {
    /// Age of the oldest write after which nothing has arrived; none if bytes have arrived since.
    pub fn unanswered(&self) -> Option<Duration> {
        let written = self.0.unanswered.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Duration::from_millis(self.0.now().saturating_sub(written)))
    }

    /// Why the server at the other end is not one for SSH, with what it said, in one line of ASCII; none if it said
    /// nothing, or that it is one.
    pub fn not_ssh(&self) -> Option<String> {
        self.0.complaint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the peer has said that it speaks SSH (RFC 4253 4.2).
    pub fn identified(&self) -> bool {
        self.0.identified.load(Ordering::Relaxed)
    }

    /// Cuts the connection: the SSH session ends at once with an I/O error.
    pub fn cut(&self) {
        self.0.cut.store(true, Ordering::Release);
        let waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until the connection is cut. Cancellation safe.
    ///
    /// Call it only while no SSH session or other task reads or writes the socket: all share one waker, so a reader or
    /// writer that polls later takes the wake-up. This is not enforced.
    pub async fn until_cut(&self) {
        poll_fn(|cx| {
            *self.0.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
            if self.0.cut.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Sets the read-ahead limit from the number of bytes that the peer, now authenticated, may have in flight to us.
    pub fn set_read_ahead_limit(&self, bytes: usize) {
        self.0.read_ahead.store(bytes + READ_AHEAD_SLACK.min(bytes / 4), Ordering::Relaxed);
    }

    /// Takes what is read ahead beyond 256 KiB from this account, from now on; the first one stays. While the account is
    /// full, no more is read ahead, and a write waits until the peer has read: an agent reads ahead, too, and reads all that
    /// its own credit allows us to send.
    pub fn charge_read_ahead_to(&self, account: Account) {
        self.0.account.get_or_init(|| account);
    }
}

/// A guarded socket, for a russh session.
#[derive(Debug)]
pub struct Guarded<S> {
    socket: S,
    guard: Guard,
    ahead: ReadAhead,
    /// What the read-ahead has taken from the account.
    charged: Charged,
    strict: StrictKex,
}

/// Bytes that were taken from an account; given back on drop.
#[derive(Debug, Default)]
struct Charged(Option<(Account, usize)>);

impl Charged {
    /// Whether another piece may be read ahead.
    fn may_read(&mut self, account: Option<&Account>, ahead: usize) -> bool {
        let Some(account) = account else { return true };
        let (account, charged) = self.0.get_or_insert_with(|| (account.clone(), 0));
        let wanted = (ahead + READ).saturating_sub(UNCHARGED_READ_AHEAD + *charged);
        if wanted > 0 {
            *charged += account.take(wanted.max(READ));
        }
        ahead + READ <= UNCHARGED_READ_AHEAD + *charged
    }
}

impl Drop for Charged {
    fn drop(&mut self) {
        if let Some((account, charged)) = &self.0 {
            account.give_back(*charged);
        }
    }
}

/// Bytes that have been read ahead, in pieces: one growing buffer would be copied each time it grows, and take up to
/// three times the memory.
#[derive(Debug, Default)]
struct ReadAhead {
    pieces: VecDeque<BytesMut>,
    len: usize,
}

impl ReadAhead {
    /// Reads once, into memory that needs no zeroing. Returns the bytes, or none if no bytes have arrived. `size` is
    /// the size of a new piece, in bytes.
    fn read_from<S: AsyncRead + Unpin>(
        &mut self,
        size: usize,
        socket: &mut S,
        cx: &mut Context<'_>,
    ) -> io::Result<Option<&[u8]>> {
        if self.pieces.back().is_none_or(|piece| piece.len() == piece.capacity()) {
            self.pieces.push_back(BytesMut::with_capacity(size));
        }
        let Some(piece) = self.pieces.back_mut() else { return Ok(None) };
        let old = piece.len();
        match pin!(socket.read_buf(piece)).poll(cx) {
            Poll::Pending => Ok(None),
            Poll::Ready(read) => {
                self.len += read?;
                Ok(Some(piece.get(old..).unwrap_or_default()))
            }
        }
    }

    /// Appends a few bytes in a piece of their own size.
    fn push_line(&mut self, data: &[u8]) {
        self.len += data.len();
        self.pieces.push_back(data.into());
    }

    fn take(&mut self, out: &mut ReadBuf<'_>) {
        while let Some(piece) = self.pieces.front_mut()
            && out.remaining() > 0
        {
            let len = out.remaining().min(piece.len());
            out.put_slice(piece.get(..len).unwrap_or_default());
            piece.advance(len);
            self.len -= len;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
        if self.len == 0 && self.pieces.capacity() > KEEP {
            // Frees the memory of a burst.
            self.pieces = VecDeque::new();
        }
    }
}

impl<S> Guarded<S> {
    /// Guards `socket`; `peer` is the role of the other end.
    pub fn new(socket: S, peer: Peer) -> (Self, Guard) {
        let guard = Guard::default();
        let guarded = Self {
            socket,
            guard: guard.clone(),
            ahead: ReadAhead::default(),
            charged: Charged::default(),
            strict: StrictKex::new(peer),
        };
        (guarded, guard)
    }

    /// Inspects bytes that have arrived.
    fn inspect(strict: &mut StrictKex, guard: &Guard, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            guard.0.arrived();
        }
        let was_checked = strict.is_done();
        let result = strict.feed(data);
        if !was_checked {
            *guard.0.complaint.lock().unwrap_or_else(PoisonError::into_inner) = strict.complaint();
            if strict.identified() {
                guard.0.identified.store(true, Ordering::Relaxed);
            }
        }
        result
    }

    fn check(&self) -> io::Result<()> {
        if self.guard.0.cut.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut from this side"));
        }
        Ok(())
    }

    /// Registers the waker for a cut. Called when a poll is about to return pending.
    fn wake_on_cut(&self, cx: &Context<'_>) {
        let mut waker = self.guard.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            waker => *waker = Some(cx.waker().clone()),
        }
    }
}

impl<S: AsyncRead + Unpin> Guarded<S> {
    /// Waits until the peer has sent its first line, or as many bytes as one may have. The SSH session reads them again.
    /// Cancellation safe.
    ///
    /// # Errors
    /// The peer closed the connection, or it was cut.
    pub async fn first_line(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_first_line(cx)).await
    }

    fn poll_first_line(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut scratch = [0; LINE];
            let mut buffer = ReadBuf::new(&mut scratch);
            self.check()?;
            match Pin::new(&mut self.socket).poll_read(cx, &mut buffer)? {
                Poll::Pending => {
                    self.wake_on_cut(cx);
                    self.check()?;
                    return Poll::Pending;
                }
                Poll::Ready(()) => {}
            }
            let data = buffer.filled();
            if data.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            Self::inspect(&mut self.strict, &self.guard, data)?;
            self.ahead.push_line(data);
            if data.contains(&b'\n') || self.ahead.len >= LINE {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Reads the bytes that have arrived, up to the limit.
    fn read_ahead(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let bound = self.guard.0.read_ahead.load(Ordering::Relaxed);
        while self.ahead.len < bound && self.charged.may_read(self.guard.0.account.get(), self.ahead.len) {
            match self.ahead.read_from(READ, &mut self.socket, cx) {
                Ok(Some(data)) if !data.is_empty() => {
                    budget::charge(cx, data.len());
                    Self::inspect(&mut self.strict, &self.guard, data)?;
                }
                // No bytes, the end of file, or an error, which the next ordinary read meets again.
                Ok(_) | Err(_) => break,
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check()?;
        if this.ahead.len > 0 {
            // The socket, which would stop the SSH session when its budget is used up, is not asked.
            ready!(poll_proceed(cx)).made_progress();
            let before = out.remaining();
            this.ahead.take(out);
            if this.ahead.len == 0 {
                this.charged = Charged::default();
            }
            budget::charge(cx, before - out.remaining());
            return Poll::Ready(Ok(()));
        }
        // An SSH session reads the length of a packet (four bytes), then the packet. Reading more with the length makes a
        // small packet cost one system call. Most of a large packet is still read without a copy.
        if out.remaining() <= LENGTH {
            return match this.ahead.read_from(SMALL, &mut this.socket, cx) {
                Ok(Some(data)) => {
                    Self::inspect(&mut this.strict, &this.guard, data)?;
                    this.ahead.take(out);
                    Poll::Ready(Ok(()))
                }
                Ok(None) => {
                    this.wake_on_cut(cx);
                    this.check()?;
                    Poll::Pending
                }
                Err(error) => Poll::Ready(Err(error)),
            };
        }
        let old = out.filled().len();
        match Pin::new(&mut this.socket).poll_read(cx, out) {
            Poll::Pending => {
                this.wake_on_cut(cx);
                this.check()?;
                Poll::Pending
            }
            Poll::Ready(result) => {
                let data = out.filled().get(old..).unwrap_or_default();
                budget::charge(cx, data.len());
                Self::inspect(&mut this.strict, &this.guard, data)?;
                Poll::Ready(result)
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check()?;
        let poll = Pin::new(&mut this.socket).poll_write(cx, data);
        match &poll {
            Poll::Pending => {
                this.read_ahead(cx)?;
                this.wake_on_cut(cx);
                this.check()?;
            }
            Poll::Ready(wrote) => {
                budget::charge(cx, wrote.as_ref().copied().unwrap_or_default());
                this.guard.0.wrote();
            }
        }
        poll
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_session_reads_the_first_line_and_the_bytes_behind_it() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut peer, socket) = tokio::io::duplex(64);
        let (mut guarded, _guard) = Guarded::new(socket, Peer::Client);
        let said = tokio::spawn(async move {
            for part in ["SSH-", "2.0-x", "\r\nrest"] {
                peer.write_all(part.as_bytes()).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        guarded.first_line().await.unwrap();
        said.await.unwrap();
        let mut read = String::new();
        guarded.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "SSH-2.0-x\r\nrest");
    }

    #[tokio::test]
    async fn waiting_for_a_first_line_ends_with_the_peer_and_a_cut() {
        let (peer, socket) = tokio::io::duplex(64);
        let (mut guarded, _guard) = Guarded::new(socket, Peer::Client);
        drop(peer);
        assert_eq!(guarded.first_line().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let (_peer, socket) = tokio::io::duplex(64);
        let (mut guarded, guard) = Guarded::new(socket, Peer::Client);
        let waits = tokio::spawn(async move { guarded.first_line().await });
        tokio::task::yield_now().await;
        guard.cut();
        assert_eq!(waits.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        guard.until_cut().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_is_unanswered_until_bytes_arrive() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let second = Duration::from_secs(1);
        let (mut peer, socket) = tokio::io::duplex(64);
        let (mut guarded, guard) = Guarded::new(socket, Peer::Client);
        tokio::time::sleep(second).await;
        assert_eq!(guard.unanswered(), None, "nothing has been written");
        for _ in 0..2 {
            guarded.write_all(b"a").await.unwrap();
            tokio::time::sleep(second).await;
        }
        assert_eq!(guard.unanswered(), Some(2 * second), "since the first write");
        peer.write_all(b"S").await.unwrap();
        assert_eq!(guarded.read_u8().await.unwrap(), b'S');
        assert_eq!(guard.unanswered(), None);
        guarded.write_all(b"a").await.unwrap();
        assert_eq!(guard.unanswered(), Some(Duration::ZERO));
    }

    /// Always has bytes, and always has room for more.
    #[derive(Debug, Default)]
    struct Endless {
        first: Vec<u8>,
    }

    impl AsyncRead for Endless {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            out: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let len = out.remaining().min(self.first.len());
            out.put_slice(&self.first[..len]);
            self.first.drain(..len);
            out.put_slice(&vec![0; out.remaining()]);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Endless {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(data.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Runs a session that moves `PIECE` bytes at a time, until another task has run; returns how many it moved.
    async fn moved_before_another_runs<F: Future<Output = ()> + Send>(
        step: impl Fn(Arc<tokio::sync::Mutex<Guarded<Endless>>>) -> F + Send + 'static,
    ) -> usize {
        // The identification and a first packet with the marker, without padding (RFC 4253 6).
        let marker = b"kex-strict-c-v00@openssh.com";
        let mut first = b"SSH-2.0-x\r\n".to_vec();
        first.extend((1 + 1 + 16 + 4 + marker.len() as u32).to_be_bytes());
        first.extend([0, 20].into_iter().chain([0; 16]));
        first.extend((marker.len() as u32).to_be_bytes());
        first.extend(marker);
        let (guarded, _) = Guarded::new(Endless { first }, Peer::Client);
        let guarded = Arc::new(tokio::sync::Mutex::new(guarded));
        let moved = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&moved);
        let session = tokio::spawn(async move {
            loop {
                step(Arc::clone(&guarded)).await;
                counted.fetch_add(PIECE, Ordering::Relaxed);
            }
        });
        tokio::task::yield_now().await;
        session.abort();
        moved.load(Ordering::Relaxed)
    }

    const PIECE: usize = 32 * 1024;

    #[tokio::test]
    async fn a_session_that_always_has_bytes_to_read_lets_others_run() {
        let moved = moved_before_another_runs(|guarded| async move {
            guarded.lock().await.read_exact(&mut [0; PIECE]).await.unwrap();
        });
        let moved = moved.await;
        assert!((PIECE..=budget::BURST + PIECE).contains(&moved), "{moved} bytes");
    }

    #[tokio::test]
    async fn a_session_that_always_has_room_to_write_lets_others_run() {
        use tokio::io::AsyncWriteExt;
        let moved = moved_before_another_runs(|guarded| async move {
            guarded.lock().await.write_all(&[0; PIECE]).await.unwrap();
        });
        let moved = moved.await;
        assert!((PIECE..=budget::BURST + PIECE).contains(&moved), "{moved} bytes");
    }

    #[tokio::test]
    async fn a_session_that_takes_what_was_read_ahead_lets_others_run() {
        let moved = moved_before_another_runs(|guarded| async move {
            let mut guarded = guarded.lock().await;
            guarded.ahead.push_line(&[0; PIECE]);
            let mut taken = 0;
            while taken < PIECE {
                taken += guarded.read(&mut vec![0; PIECE - taken]).await.unwrap();
            }
        });
        let moved = moved.await;
        assert!((PIECE..=budget::BURST + PIECE).contains(&moved), "{moved} bytes");
    }

    #[test]
    fn the_read_ahead_keeps_every_byte_in_order_and_frees_memory() {
        let data: Vec<u8> = (0..5 * READ + 17).map(|at| (at % 251) as u8).collect();
        let mut ahead = ReadAhead::default();
        let mut out = Vec::new();
        let mut buffer = [0; 40_000];
        // Chunk sizes that match neither the pieces nor the reads, and never all bytes at once.
        let mut context = Context::from_waker(Waker::noop());
        for mut pushed in data.chunks(50_001) {
            while ahead
                .read_from(READ, &mut pushed, &mut context)
                .unwrap()
                .is_some_and(|read| !read.is_empty())
            {}
            let mut read = ReadBuf::new(&mut buffer);
            ahead.take(&mut read);
            out.extend_from_slice(read.filled());
        }
        while ahead.len > 0 {
            let mut read = ReadBuf::new(&mut buffer);
            ahead.take(&mut read);
            assert!(!read.filled().is_empty());
            out.extend_from_slice(read.filled());
        }
        assert!(out == data);
        assert!(ahead.pieces.is_empty() && ahead.pieces.capacity() <= KEEP);
    }
}
