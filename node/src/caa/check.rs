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
    Broken(io::Error),
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

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// `Check` of `grpc.Health` as the first call of a ttrpc client, with 30 s for it.
    const ASKED: &[u8] =
        b"\x00\x00\x00\x1a\x00\x00\x00\x01\x01\x00\x0a\x0bgrpc.Health\x12\x05Check\x20\x80\xd8\x8e\xe1\x6f";

    fn frame(call: u32, kind: u8, message: &[u8]) -> Vec<u8> {
        let mut frame = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
        frame.extend(call.to_be_bytes());
        frame.extend([kind, 0]);
        frame.extend(message);
        frame
    }

    /// A kata agent that answers with these bytes, and ends its stream once its client has.
    async fn answered(answer: Vec<u8>) -> Result<(), CheckError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let agent = tokio::spawn(async move {
            let mut asked = vec![0; ASKED.len()];
            theirs.read_exact(&mut asked).await.unwrap();
            theirs.write_all(&answer).await.unwrap();
            let mut rest = Vec::new();
            // A reset: our answer was not read to its end.
            let end = theirs.read_to_end(&mut rest).await;
            assert!(end.is_ok_and(|more| more == 0) || !answer.is_empty());
            asked
        });
        let result = check(ours, PATIENCE).await;
        assert_eq!(agent.await.unwrap(), ASKED);
        result
    }

    #[tokio::test]
    async fn an_agent_that_serves_is_found() {
        answered(frame(1, 2, b"\x12\x02\x08\x01")).await.unwrap();
        // An empty status is OK as well.
        answered(frame(1, 2, b"\x0a\x00\x12\x02\x08\x01")).await.unwrap();
    }

    #[tokio::test]
    async fn the_agent_has_seen_the_end_when_the_check_is_over() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let checking = tokio::spawn(check(ours, PATIENCE));
        theirs.read_exact(&mut vec![0; ASKED.len()]).await.unwrap();
        theirs.write_all(&frame(1, 2, b"\x12\x02\x08\x01")).await.unwrap();
        assert_eq!(theirs.read(&mut [0; 1]).await.unwrap(), 0, "our end is closed");
        assert!(!checking.is_finished(), "and we wait for the agent's");
        drop(theirs);
        checking.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_leaves_the_stream_open_serves_as_well() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let checking = tokio::spawn(check(ours, PATIENCE));
        theirs.read_exact(&mut vec![0; ASKED.len()]).await.unwrap();
        theirs.write_all(&frame(1, 2, b"\x12\x02\x08\x01")).await.unwrap();
        checking.await.unwrap().unwrap();
        drop(theirs);
    }

    #[tokio::test]
    async fn an_error_of_the_agent_is_one_bounded_line() {
        let text = "a\nb\x1b[2J".repeat(1000);
        let status = Status { code: 5, message: text };
        let response = Response { status: Some(status), payload: vec![] }.encode_to_vec();
        let error = answered(frame(1, 2, &response)).await.unwrap_err();
        let CheckError::Status { code: 5, text } = error else { panic!("{error:?}") };
        assert!(text.starts_with("a\\nb\\u{1b}") && text.len() < MAX_TEXT + 40, "{text}");
    }

    #[tokio::test]
    async fn an_agent_that_does_not_serve_is_an_error() {
        for (answer, status) in [(b"\x12\x02\x08\x02".as_slice(), 2), (b"", 0)] {
            let error = answered(frame(1, 2, answer)).await.unwrap_err();
            assert!(matches!(error, CheckError::NotServing(is) if is == status), "{error:?}");
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        let too_long = (u32::MAX).to_be_bytes().into_iter().chain([0, 0, 0, 1, 2, 0]).collect();
        let answers = [
            frame(3, 2, b"\x12\x02\x08\x01"),
            frame(1, 1, b"\x12\x02\x08\x01"),
            frame(1, 2, b"\xff\xff\xff"),
            too_long,
            b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(),
        ];
        for answer in answers {
            let error = answered(answer).await.unwrap_err();
            assert!(matches!(error, CheckError::Protocol(_)), "{error:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_agent_is_given_up() {
        for answer in [vec![], frame(1, 2, b"\x12\x02\x08\x01")[..9].to_vec()] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&answer).await.unwrap();
            let error = check(ours, PATIENCE).await.unwrap_err();
            assert!(matches!(error, CheckError::Timeout(PATIENCE)), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_early_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(check(ours, PATIENCE).await, Err(CheckError::Closed)));
    }
}
