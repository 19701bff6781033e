//! Simulates the metadata services of clouds: what each requires of a request, and what a broken one answers.
//!
//! Works with threads and over any pair of streams, so that the same service answers in a test, in a network namespace, and as a command
//! that qemu starts for a guest's connection.

mod behaviour;
mod request;
mod service;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use behaviour::{Behaviour, Step};
use nix::sys::socket::{setsockopt, sockopt};
pub use request::Request;
pub use service::{Cloud, TOKEN, correct, user_data_path};

/// What answers: from the request and its number, counted from 0, to what is sent.
pub type Script = Arc<dyn Fn(&Request, usize) -> Vec<Step> + Send + Sync>;

/// A service at an address, until it is dropped.
pub struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves each connection of `listener` by `script`.
    ///
    /// # Errors
    /// If the listener has no address.
    pub fn start(listener: TcpListener, script: Script) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (requests, stopped) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (list, stop) = (requests.clone(), stopped.clone());
        let accepting = Some(std::thread::spawn(move || accept(&listener, &script, &list, &stop)));
        Ok(Self { address, requests, stopped, accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The requests until now.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // The connection wakes the accepting thread; if it fails, the listener is gone already.
        let woken = TcpStream::connect(self.address);
        if let (Ok(_), Some(accepting)) = (woken, self.accepting.take()) {
            // A panic of it was reported already.
            let _ = accepting.join();
        }
    }
}

fn accept(
    listener: &TcpListener,
    script: &Script,
    requests: &Arc<Mutex<Vec<Request>>>,
    stopped: &AtomicBool,
) {
    for stream in listener.incoming() {
        if stopped.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let (script, requests) = (script.clone(), requests.clone());
        std::thread::spawn(move || {
            // The client sees the connection end.
            let _ = serve_socket(&stream, &script, &requests);
        });
    }
}

fn serve_socket(stream: &TcpStream, script: &Script, requests: &Mutex<Vec<Request>>) -> io::Result<()> {
    let request = Request::read(&mut &*stream)?;
    let number = {
        let mut requests = requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request.clone());
        requests.len() - 1
    };
    let mut output = stream;
    if !play(&script(&request, number), &mut &*stream, &mut output)? {
        let no_linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&stream.as_fd(), sockopt::Linger, &no_linger)?;
    }
    Ok(())
}

/// Serves the one connection that `input` and `output` are.
///
/// # Errors
/// If the request can't be read, or the answer not be written.
pub fn serve_streams(mut input: impl Read, mut output: impl Write, script: &Script) -> io::Result<()> {
    let request = Request::read(&mut input)?;
    play(&script(&request, 0), &mut input, &mut output).map(|_| ())
}

/// Does the steps; false if the connection is to be reset.
fn play(steps: &[Step], input: &mut impl Read, output: &mut impl Write) -> io::Result<bool> {
    for step in steps {
        match step {
            Step::Send(bytes) => output.write_all(bytes).and_then(|()| output.flush())?,
            Step::Wait(time) => std::thread::sleep(*time),
            Step::Stall => {
                // Until the client closes.
                io::copy(input, &mut io::sink())?;
            }
            Step::Drip(bytes, pause) => {
                for byte in bytes {
                    output.write_all(&[*byte]).and_then(|()| output.flush())?;
                    std::thread::sleep(*pause);
                }
            }
            Step::Reset => return Ok(false),
        }
    }
    Ok(true)
}

/// An answer with a status, headers and a body of the right length.
#[must_use]
pub fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 {status} {}\r\n", reason(status));
    for (name, value) in headers {
        answer.extend([name, ": ", value, "\r\n"]);
    }
    answer.push_str(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()));
    [answer.as_bytes(), body].concat()
}

const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        500 => "Internal Server Error",
        _ => "Status",
    }
}

/// Limit of a wait in a script.
pub const LONGEST_WAIT: Duration = Duration::from_secs(600);
