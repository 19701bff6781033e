//! The service: one request a connection, one request at a time.
//!
//! A thread for each connection reads its request, within 5 s; one worker carries the requests out, so that a client that
//! hangs blocks no other.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use secure_comms_protocol::volumes::{Answer, Failure, FailureKind, LINE_MAX, Request};

use crate::log;
use crate::mounting::{Patience, Volumes, Woken};
use crate::uevents::Uevents;

/// Limit for the request of a connection, from its start, and for taking the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// Most connections whose request is read, or which wait for the worker.
const CLIENTS_MAX: usize = 16;
/// Pause after the socket refused to give a connection, such as for want of files.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// A request that waits for the worker.
struct Job {
    client: UnixStream,
    request: Request,
    _place: Place,
}

/// A place among [`CLIENTS_MAX`].
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let before = taken.fetch_add(1, Ordering::Relaxed);
        let place = Self(Arc::clone(taken));
        (before < CLIENTS_MAX).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves until the process ends.
///
/// # Errors
/// The worker can't be started.
pub fn serve(listener: &UnixListener, volumes: Volumes) -> io::Result<()> {
    let (jobs, queue) = sync_channel(CLIENTS_MAX);
    thread::Builder::new().name("worker".into()).spawn(move || work(&queue, &volumes))?;
    let taken = Arc::new(AtomicUsize::new(0));
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::line(format_args!("accepting a connection: {error}"));
                sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let Some(place) = Place::take(&taken) else {
            log::line(format_args!("{CLIENTS_MAX} connections are open: closing another one"));
            continue;
        };
        let jobs = jobs.clone();
        let reader = thread::Builder::new().name("client".into()).spawn(move || read(client, place, &jobs));
        if let Err(error) = reader {
            log::line(format_args!("starting a thread for a connection: {error}"));
        }
    }
}

/// Reads the request of a connection and hands it to the worker.
fn read(mut client: UnixStream, place: Place, jobs: &SyncSender<Job>) {
    match read_request(&mut client) {
        Ok(request) => {
            let job = Job { client, request, _place: place };
            if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = jobs.try_send(job) {
                answer(job.client, &failed(FailureKind::Internal, "too many requests wait"));
            }
        }
        Err(RequestFault::Stranger(uid)) => log::line(format_args!("refused a connection of user {uid}")),
        Err(RequestFault::Bad(why)) => {
            log::line(format_args!("refused a request: {why}"));
            answer(client, &failed(FailureKind::Invalid, &why));
        }
    }
}

/// A connection without a request that can be carried out.
enum RequestFault {
    /// It is another user's than root.
    Stranger(u32),
    /// The cause.
    Bad(String),
}

fn read_request(client: &mut UnixStream) -> Result<Request, RequestFault> {
    let bad = |why: &dyn std::fmt::Display| RequestFault::Bad(format!("reading the request: {why}"));
    let peer = getsockopt(client, sockopt::PeerCredentials).map_err(|error| bad(&error))?;
    if peer.uid() != 0 {
        return Err(RequestFault::Stranger(peer.uid()));
    }
    let line = read_line(client, Instant::now() + CLIENT_LIMIT).map_err(|error| bad(&error))?;
    serde_json::from_slice(&line).map_err(|error| bad(&error))
}

/// Reads up to a newline, or up to the end if the client has shut its side down.
fn read_line(client: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.set_read_timeout(Some(left))?;
        let read = match client.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            read => read?,
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        let end = bytes.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(bytes.get(..end.unwrap_or(read)).unwrap_or_default());
        if line.len() >= LINE_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a line of {LINE_MAX} bytes or more"),
            ));
        }
        if end.is_some() || read == 0 {
            return Ok(line);
        }
    }
}

fn work(queue: &Receiver<Job>, volumes: &Volumes) {
    let uevents = match Uevents::listen() {
        Ok(uevents) => Some(uevents),
        Err(error) => {
            log::line(format_args!(
                "listening to events about disks: {error}; a disk is seen at the next attempt"
            ));
            None
        }
    };
    while let Ok(Job { client, request, _place }) = queue.recv() {
        let patience = Client { stream: &client, uevents: uevents.as_ref() };
        // An unmount is carried out all the same: what was written has to reach its disk.
        if matches!(request, Request::Mount(_)) && patience.pause(Duration::ZERO) == Woken::GivenUp {
            log::line(format_args!("a request was given up before the worker came to it"));
            continue;
        }
        let result = match request {
            Request::Mount(wanted) => volumes.mount(&wanted, &patience).map(Answer::Mounted),
            Request::UnmountAll => volumes.unmount_all().map(|()| Answer::Unmounted),
        };
        let reply = result.unwrap_or_else(|error| {
            let failure = error.to_failure();
            log::line(format_args!("{}", failure.message));
            Answer::Failed(failure)
        });
        answer(client, &reply);
    }
}

/// A client, as long as it waits.
struct Client<'a> {
    stream: &'a UnixStream,
    uevents: Option<&'a Uevents>,
}

impl Patience for Client<'_> {
    fn pause(&self, at_most: Duration) -> Woken {
        let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
        // A closed connection is reported without being asked for; one whose client only sends no more is not closed.
        let mut fds = vec![PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        fds.extend(self.uevents.map(|uevents| PollFd::new(uevents.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => return Woken::Time,
            Ok(_) => {}
            Err(error) => {
                log::line(format_args!("waiting for a disk: {error}"));
                return Woken::GivenUp;
            }
        }
        if fds.first().is_some_and(|client| client.any() != Some(false)) {
            return Woken::GivenUp;
        }
        if let Some(Err(error)) = self.uevents.map(Uevents::drain) {
            log::line(format_args!("reading events about disks: {error}"));
            sleep(at_most);
            return Woken::Time;
        }
        Woken::Event
    }
}

fn failed(kind: FailureKind, message: &str) -> Answer {
    Answer::Failed(Failure { kind, message: message.to_owned() })
}

fn answer(mut client: UnixStream, answer: &Answer) {
    let sent = serde_json::to_vec(answer).map_err(io::Error::from).and_then(|mut line| {
        line.push(b'\n');
        client.set_write_timeout(Some(CLIENT_LIMIT))?;
        client.write_all(&line)
    });
    if let Err(error) = sent {
        log::line(format_args!("answering a request: {error}"));
    }
}
