//! The confidential data hub's `SecureMount`: opens an encrypted disk with a key of the KBS, and mounts it.
//!
//! ttrpc (containerd's) is a header of ten bytes before a protobuf message. One call needs no more of it; the crate `ttrpc`
//! would bring a protobuf compiler into the build, and a second protobuf library, threads and an older `nix` into the program.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use prost::Message;

use crate::text::one_line;

/// Socket of the confidential data hub.
pub const SOCKET: &str = "/run/confidential-containers/cdh.sock";
/// Service of the call.
pub const SERVICE: &str = "api.SecureMountService";
/// Method of the call.
pub const METHOD: &str = "SecureMount";

/// Limit for the connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Limit for the call. The data hub attests, fetches the key, and formats an empty disk.
const CALL: Duration = Duration::from_secs(150);
/// Longest answer, in bytes: a status.
const ANSWER_MAX: u32 = 64 * 1024;
/// Type of a request in the header.
const REQUEST: u8 = 1;
/// Type of an answer in the header.
const RESPONSE: u8 = 2;
/// Number of the only stream: a client's are odd.
const STREAM: u32 = 1;

/// `SecureMountRequest` of guest-components, protos/confidential-data-hub/api.proto.
#[derive(Clone, PartialEq, Message)]
pub struct SecureMount {
    /// `block-device`.
    #[prost(string, tag = "1")]
    pub volume_type: String,
    /// What the type needs.
    #[prost(btree_map = "string, string", tag = "2")]
    pub options: BTreeMap<String, String>,
    /// Mount flags.
    #[prost(string, repeated, tag = "3")]
    pub flags: Vec<String>,
    /// Where it is to be mounted.
    #[prost(string, tag = "4")]
    pub mount_point: String,
}

/// A request of ttrpc.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Service of the call.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Method of the call.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The method's own message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// Limit for the call, in nanoseconds.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// An answer of ttrpc.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// How the call ended; absent if well.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The method's own answer.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// How a call ended (google.rpc.Status).
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// 0 if well.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// The cause.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing listens there.
    #[error("no confidential data hub at {}: an encrypted volume needs one in the image", .0.display())]
    Absent(PathBuf, #[source] io::Error),
    /// The connection failed.
    #[error("asking the confidential data hub")]
    Connection(#[source] io::Error),
    /// No answer in time.
    #[error("the confidential data hub has not answered within {} s", CALL.as_secs())]
    TooSlow,
    /// Its answer is none of ttrpc.
    #[error("the confidential data hub's answer is not understood: {0}")]
    Malformed(&'static str),
    /// It refused.
    #[error("the confidential data hub failed (code {code}): {said}")]
    Failed {
        /// The status's code.
        code: i32,
        /// Its message, in one line.
        said: String,
    },
}

/// Has the disk opened and mounted.
///
/// # Errors
/// The data hub is not there, fails, or does not answer within 150 s.
pub fn secure_mount(at: &Path, mount: &SecureMount) -> Result<(), CallError> {
    let deadline = Instant::now() + CALL;
    let mut stream = open(at)?;
    let request = Request {
        service: SERVICE.to_owned(),
        method: METHOD.to_owned(),
        payload: mount.encode_to_vec(),
        timeout_nano: i64::try_from(CALL.as_nanos()).unwrap_or(i64::MAX),
    };
    stream.set_write_timeout(Some(CONNECT)).map_err(CallError::Connection)?;
    stream.write_all(&frame(REQUEST, &request.encode_to_vec())).map_err(CallError::Connection)?;
    let answer = read_answer(&mut stream, deadline)?;
    let answer = Response::decode(&*answer).map_err(|_| CallError::Malformed("no response of ttrpc"))?;
    match answer.status {
        Some(Status { code, message }) if code != 0 => {
            Err(CallError::Failed { code, said: one_line(&message) })
        }
        _ => Ok(()),
    }
}

/// The header and the message (containerd/ttrpc, PROTOCOL.md): length, stream, type, flags.
#[must_use]
pub fn frame(kind: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut frame = [length.to_be_bytes(), STREAM.to_be_bytes()].concat();
    frame.extend([kind, 0]);
    frame.extend(message);
    frame
}

/// Connects; std has no limit for that, and the kernel makes a client wait while the server's queue is full.
fn open(at: &Path) -> Result<UnixStream, CallError> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| CallError::Connection(error.into()))?;
    let limit = TimeVal::seconds(i64::try_from(CONNECT.as_secs()).unwrap_or(i64::MAX));
    setsockopt(&fd, sockopt::SendTimeout, &limit).map_err(|error| CallError::Connection(error.into()))?;
    UnixAddr::new(at)
        .and_then(|address| connect(fd.as_raw_fd(), &address))
        .map_err(|error| CallError::Absent(at.to_owned(), error.into()))?;
    Ok(fd.into())
}

fn read_answer(stream: &mut UnixStream, deadline: Instant) -> Result<Vec<u8>, CallError> {
    let mut header = [0; 10];
    read(stream, &mut header, deadline)?;
    let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _] = header;
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    if u32::from_be_bytes([s0, s1, s2, s3]) != STREAM || kind != RESPONSE {
        return Err(CallError::Malformed("not the answer to the call"));
    }
    if length > ANSWER_MAX {
        return Err(CallError::Malformed("too long"));
    }
    let mut answer = vec![0; usize::try_from(length).map_err(|_| CallError::Malformed("too long"))?];
    read(stream, &mut answer, deadline)?;
    Ok(answer)
}

/// Reads all of the buffer before the deadline, however slowly the bytes come.
fn read(stream: &mut UnixStream, mut into: &mut [u8], deadline: Instant) -> Result<(), CallError> {
    while !into.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CallError::TooSlow);
        }
        stream.set_read_timeout(Some(left)).map_err(CallError::Connection)?;
        match stream.read(into) {
            Ok(0) => return Err(CallError::Connection(io::ErrorKind::UnexpectedEof.into())),
            Ok(length) => into = into.get_mut(length..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(CallError::TooSlow),
            Err(error) => return Err(CallError::Connection(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_length_stream_type_and_flags() {
        assert_eq!(frame(REQUEST, b"abc"), [0, 0, 0, 3, 0, 0, 0, 1, 1, 0, b'a', b'b', b'c']);
    }

    #[test]
    fn the_message_has_the_fields_of_the_proto_file() {
        let mount = SecureMount {
            volume_type: "v".into(),
            options: [("k".to_owned(), "w".to_owned())].into(),
            flags: vec![],
            mount_point: "/m".into(),
        };
        let expected = [b"\x0a\x01v".as_slice(), b"\x12\x06\x0a\x01k\x12\x01w", b"\x22\x02/m"].concat();
        assert_eq!(mount.encode_to_vec(), expected);
    }

    #[test]
    fn an_absent_data_hub_is_named_at_once() {
        let error = secure_mount(Path::new("/no/such.sock"), &SecureMount::default()).unwrap_err();
        assert!(error.to_string().starts_with("no confidential data hub at /no/such.sock"), "{error}");
    }
}
