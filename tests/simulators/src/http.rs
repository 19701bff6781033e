//! The part of HTTP/1.1 that the simulated KBS and guest components share.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

/// An answer with its whole body.
pub type Reply = Response<Full<Bytes>>;

/// An answer with this status, without headers of its own.
pub fn reply(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    reply
}

/// Serves one connection until either side closes it, or no request head arrives within `head_limit` (a new and
/// an idle connection alike). An error of `handle` closes the connection without an answer.
pub async fn serve<S, F, Fut, E>(stream: S, head_limit: Duration, handle: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> Fut,
    Fut: Future<Output = Result<Reply, E>>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    // The peer caused the error (malformed, closed, too slow), and sees the connection end.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_limit)
        // As the real servers: a client may send its FIN right after its request.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service_fn(handle))
        .await;
}
