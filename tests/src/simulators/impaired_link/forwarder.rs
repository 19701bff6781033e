//! The thread that forwards the packets; it sleeps until a packet arrives or is due.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tun_rs::{SyncDevice, VIRTIO_NET_HDR_LEN};

use super::Shared;
use super::lane::{Fate, Lane};

/// The largest IP packet, which is the largest burst too.
const LARGEST: usize = 64 * 1024;
/// As many packets as a burst may be cut into, at the least MTU of IPv4 with all options.
const PIECES: usize = 160;
/// Reads of one direction in a row, before the other one is served.
const IN_A_ROW: usize = 64;
/// Buffers that are kept for the next packets.
const SPARE: usize = 512;

/// Both directions.
pub(super) struct Forwarder {
    directions: [Direction; 2],
    /// Readable once the link is to end.
    stop: UnixStream,
    buffers: Buffers,
}

/// One direction.
pub(super) struct Direction {
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    lane: Lane,
    shared: Arc<Shared>,
    held: BinaryHeap<Reverse<Held>>,
    /// Number of the next held packet.
    next: u64,
}

/// A packet in flight, with the header that the device wants before it.
struct Held {
    at: Instant,
    number: u64,
    packet: Vec<u8>,
}

/// Buffers for what is read.
struct Buffers {
    whole: Vec<u8>,
    pieces: Vec<Vec<u8>>,
    sizes: Vec<usize>,
    spare: Vec<Vec<u8>>,
}

impl Forwarder {
    pub(super) fn new(directions: [Direction; 2], stop: UnixStream) -> Self {
        let buffers = Buffers {
            whole: vec![0; VIRTIO_NET_HDR_LEN + LARGEST],
            pieces: vec![vec![0; VIRTIO_NET_HDR_LEN + LARGEST]; PIECES],
            sizes: vec![0; PIECES],
            spare: Vec::new(),
        };
        Self { directions, stop, buffers }
    }

    /// Forwards until the link ends.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let next =
                self.directions.iter_mut().filter_map(|direction| direction.give(&mut self.buffers)).min();
            if self.wait(next)? {
                return Ok(());
            }
            for direction in &mut self.directions {
                direction.take(&mut self.buffers)?;
            }
        }
    }

    /// Sleeps until a packet arrives, or until `next`; true once the link is to end.
    fn wait(&self, next: Option<Instant>) -> io::Result<bool> {
        let timeout = next.map(|at| TimeSpec::from(at.saturating_duration_since(Instant::now())));
        let [there, back] = &self.directions;
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut sources =
            [readable(self.stop.as_fd()), readable(there.from.as_fd()), readable(back.from.as_fd())];
        match ppoll(&mut sources, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [stop, ..] = sources;
        Ok(stop.any().unwrap_or_default())
    }
}

impl Direction {
    pub(super) fn new(from: Arc<SyncDevice>, to: Arc<SyncDevice>, seed: u64, shared: Arc<Shared>) -> Self {
        Self { from, to, lane: Lane::new(seed), shared, held: BinaryHeap::new(), next: 0 }
    }

    /// Reads what has arrived.
    fn take(&mut self, buffers: &mut Buffers) -> io::Result<()> {
        for _ in 0..IN_A_ROW {
            let apart = self.shared.impairment().treats_packets_singly();
            match if apart { self.take_pieces(buffers) } else { self.take_whole(buffers) } {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what the kernel delivers in one piece.
    fn take_whole(&mut self, buffers: &mut Buffers) -> io::Result<()> {
        let length = self.from.recv(&mut buffers.whole)?;
        let packet = buffers.whole.get(..length).unwrap_or_default();
        self.pass(packet, &mut buffers.spare);
        Ok(())
    }

    /// Reads a burst, and cuts it into the packets that a real link would carry.
    fn take_pieces(&mut self, buffers: &mut Buffers) -> io::Result<()> {
        let Buffers { whole, pieces, sizes, spare } = buffers;
        let count = self.from.recv_multiple(whole, pieces, sizes, VIRTIO_NET_HDR_LEN)?;
        for (piece, size) in pieces.iter().zip(sizes.iter()).take(count) {
            // The header stays as it was made, all zeros: one whole packet, with its checksums.
            self.pass(piece.get(..VIRTIO_NET_HDR_LEN + size).unwrap_or_default(), spare);
        }
        Ok(())
    }

    fn pass(&mut self, packet: &[u8], spare: &mut Vec<Vec<u8>>) {
        let impairment = self.shared.impairment();
        let now = Instant::now();
        let traffic = &self.shared.traffic;
        let bytes = packet.len().saturating_sub(VIRTIO_NET_HDR_LEN);
        let (at, twice) = match self.lane.decide(&impairment, now, bytes) {
            Fate::Swallowed => return traffic.swallowed.add(1),
            Fate::Lost => return traffic.lost.add(1),
            Fate::NoRoom => return traffic.no_room.add(1),
            Fate::Arrives { at, late, twice } => {
                traffic.late.add(late.into());
                traffic.twice.add(twice.into());
                (at, twice)
            }
        };
        let at_once = at <= now && self.held.is_empty();
        for _ in 0..=u8::from(twice) {
            if at_once {
                self.send(packet);
            } else {
                self.hold(packet, at, spare);
            }
        }
    }

    fn hold(&mut self, packet: &[u8], at: Instant, spare: &mut Vec<Vec<u8>>) {
        let mut buffer = spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.held.push(Reverse(Held { at, number: self.next, packet: buffer }));
        self.next += 1;
    }

    /// Delivers what is due; returns when the next packet is due.
    fn give(&mut self, buffers: &mut Buffers) -> Option<Instant> {
        let now = Instant::now();
        while let Some(Reverse(next)) = self.held.peek() {
            if next.at > now {
                return Some(next.at);
            }
            if let Some(Reverse(held)) = self.held.pop() {
                self.send(&held.packet);
                if buffers.spare.len() < SPARE {
                    buffers.spare.push(held.packet);
                }
            }
        }
        None
    }

    fn send(&self, packet: &[u8]) {
        let traffic = &self.shared.traffic;
        match self.to.send(packet) {
            Ok(_) => {
                traffic.passed.add(1);
                traffic.bytes.add(packet.len().saturating_sub(VIRTIO_NET_HDR_LEN) as u64);
            }
            // As on a real link, a device that is down loses packets silently.
            Err(_) => traffic.refused.add(1),
        }
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Held {}
