//! Asks a pod's kata agent whether it serves, over a stream of its own.
//!
//! The runtime's first call is the same `Check`, and if it fails the pod fails. So cloud-api-adaptor's handshake ends only
//! once a kata agent has answered one of ours.

use std::io;
use std::time::Duration;

use prost::Message;
use secure_comms_keys::text::one_line;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The service and the method (kata-containers, src/libs/protocols/protos/health.proto).
const SERVICE: &str = "grpc.Health";
const METHOD: &str = "Check";

/// Length of a ttrpc head: length of the message (4 bytes), number of the call (4), kind, flags.
const HEAD: usize = 10;
/// Kind of a message that asks, and of one that answers.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// The number of a client's first call. Clients use odd ones.
const CALL: u32 = 1;
/// The longest answer, in bytes. Those of errors have some 5,000.
const MAX_ANSWER: usize = 64 * 1024;
/// The longest text of an error that is kept, in bytes.
const MAX_TEXT: usize = 300;
/// How long the kata agent may take to close its end once we have closed ours.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// Why a kata agent is not known to serve.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It has not answered.
    #[error("the kata agent did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The stream ended before the answer.
    #[error("the stream to the kata agent ended before it answered")]
    Closed,
    /// The stream is broken.
    #[error("the stream to the kata agent is broken: {0}")]
    Broken(#[source] io::Error),
    /// It answered with an error.
    #[error("the kata agent answered with error {code}: {text}")]
    Status {
        /// A code of gRPC.
        code: i32,
        /// Its words, made fit for one line.
        text: String,
    },
    /// It says that it does not serve.
    #[error("the kata agent says that it does not serve (health status {0})")]
    NotServing(i32),
    /// What answered speaks another protocol.
    #[error("what answered is no kata agent: {0}")]
    Protocol(&'static str),
}

#[derive(Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    /// An empty one is a `CheckRequest` that asks for the whole server.
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    timeout_nano: i64,
}

#[derive(Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `HealthCheckResponse.ServingStatus`.
const SERVING: i32 = 1;

/// Asks the kata agent at the other end of a stream that is used for nothing else, and closes the stream. The kata agent has
/// seen the stream's end when this returns without an error, or had 2 s for it.
///
/// # Errors
/// No kata agent answers that it serves within `patience`.
///
/// # Cancellation
/// Closes the stream.
pub async fn check(mut stream: UnixStream, patience: Duration) -> Result<(), CheckError> {
    let asked = timeout(patience, ask(&mut stream, patience)).await;
    asked.unwrap_or(Err(CheckError::Timeout(patience)))?;
    match timeout(CLOSE_TIME, close(&mut stream)).await {
        Ok(Ok(())) => {}
        // It has answered. The stream ends when it is dropped.
        Ok(Err(error)) => tracing::debug!("caa check: the stream did not end in good order: {error}"),
        Err(_) => tracing::debug!("caa check: the kata agent left the stream open"),
    }
    Ok(())
}

async fn ask(stream: &mut UnixStream, patience: Duration) -> Result<(), CheckError> {
    let message = Request {
        service: SERVICE.to_owned(),
        method: METHOD.to_owned(),
        payload: Vec::new(),
        timeout_nano: i64::try_from(patience.as_nanos()).unwrap_or(i64::MAX),
    }
    .encode_to_vec();
    let length = u32::try_from(message.len()).map_err(|_| CheckError::Protocol("the request is too long"))?;
    let mut frame = Vec::with_capacity(HEAD + message.len());
    frame.extend(length.to_be_bytes());
    frame.extend(CALL.to_be_bytes());
    frame.extend([REQUEST, 0]);
    frame.extend(message);
    stream.write_all(&frame).await.map_err(ended)?;

    let length = stream.read_u32().await.map_err(ended)? as usize;
    let call = stream.read_u32().await.map_err(ended)?;
    let kind = stream.read_u8().await.map_err(ended)?;
    let _flags = stream.read_u8().await.map_err(ended)?;
    if call != CALL || kind != RESPONSE {
        return Err(CheckError::Protocol("its answer belongs to no request"));
    }
    if length > MAX_ANSWER {
        return Err(CheckError::Protocol("its answer is too long"));
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await.map_err(ended)?;
    judge(&message)
}

fn judge(message: &[u8]) -> Result<(), CheckError> {
    let broken = |_| CheckError::Protocol("its answer is broken");
    let response = Response::decode(message).map_err(broken)?;
    if let Some(Status { code, message }) = response.status.filter(|status| status.code != 0) {
        return Err(CheckError::Status { code, text: one_line(&message, MAX_TEXT) });
    }
    match HealthCheckResponse::decode(response.payload.as_slice()).map_err(broken)?.status {
        SERVING => Ok(()),
        status => Err(CheckError::NotServing(status)),
    }
}

fn ended(error: io::Error) -> CheckError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            CheckError::Closed
        }
        _ => CheckError::Broken(error),
    }
}

/// Ends our direction and waits for the end of the other. A kata agent has nothing more to say: what it says is an error.
async fn close(stream: &mut UnixStream) -> io::Result<()> {
    stream.shutdown().await?;
    match stream.read(&mut [0; 1]).await? {
        0 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it said more than its answer")),
    }
}
