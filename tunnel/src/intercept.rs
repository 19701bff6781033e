//! Interceptors: inspect and change the bytes of a tunnel, where the protocol of its server asks for it.
//!
//! An interceptor has two halves, one for each direction, as the relay has two ends. The trait knows nothing of the
//! protocol: it knows only pieces that pass, pieces that are held back and released later, and pieces that the
//! interceptor injects.

use std::error::Error;
use std::fmt::Debug;
use std::future::Future;

use bytes::Bytes;

/// Error of an interceptor after which its stream must end.
pub type InterceptError = Box<dyn Error + Send + Sync>;

/// Makes the two halves for each stream of a tunnel.
pub trait Interceptor: Clone + Debug + Send + Sync + 'static {
    /// Half that sees the bytes from the stream to the server.
    type ToServer: ToServer;
    /// Half that sees the bytes from the server to the stream.
    type FromServer: FromServer;
    /// Makes the halves for a new stream.
    fn begin(&self) -> (Self::ToServer, Self::FromServer);
    /// The interceptor for a new connection, or a new session, whose streams may share limits.
    #[must_use]
    fn for_connection(&self) -> Self {
        self.clone()
    }
}

/// Inspects and changes the bytes that go to the server.
pub trait ToServer: Send {
    /// Handles one message of the stream.
    ///
    /// Passes to `out`, in order, every piece that may go to the server now. The interceptor may keep the rest. The
    /// message's credit goes back to the peer once the server has taken all pieces passed so far, so the
    /// interceptor itself must bound the bytes that it keeps.
    ///
    /// # Errors
    /// The stream must end.
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError>;
    /// Handles the end of the stream: no more messages arrive.
    ///
    /// # Errors
    /// The stream ended inside a unit of the protocol.
    fn ended(&mut self) -> Result<(), InterceptError>;
    /// What it costs if the stream ends with an error now, for the log.
    fn cost(&self) -> Option<&'static str> {
        None
    }
    /// Whether the interceptor holds a piece back. The server sees the end of the stream only when it holds none.
    fn has_pending(&self) -> bool;
    /// Waits until a piece that was held back may go to the server, at this point of the byte stream. Returns none if
    /// a held piece was dropped. Called only while [`ToServer::has_pending`].
    ///
    /// Cancellation safe: no piece is lost when the future is dropped.
    ///
    /// # Errors
    /// The stream must end.
    fn next_released(&mut self) -> impl Future<Output = Result<Option<Bytes>, InterceptError>> + Send;
    /// Whether no further byte goes to the server, whatever arrives: the server sees the end of the stream.
    fn is_finished(&self) -> bool {
        false
    }
}

/// Inspects the bytes that the server sends, drops some of them, and injects pieces of its own between them.
pub trait FromServer: Send {
    /// Handles bytes of the server.
    ///
    /// Passes to `out`, in order, the pieces that are sent on the stream now. The interceptor may keep a few bytes.
    ///
    /// # Errors
    /// The stream must end.
    fn on_data(&mut self, data: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError>;
    /// Handles the end of the server's bytes.
    ///
    /// # Errors
    /// The server ended inside a unit of the protocol.
    fn ended(&mut self) -> Result<(), InterceptError>;
    /// Most bytes that may be read from the server next, at least one. It is less than the rest of the stream when a
    /// piece waits to be injected at a boundary.
    fn read_limit(&self) -> usize;
    /// Next piece to inject, if one waits and the bytes that were passed end at a boundary.
    fn next_injected(&mut self) -> Option<Bytes>;
    /// Waits until there may be a piece to inject.
    ///
    /// Cancellation safe: the piece stays for [`FromServer::next_injected`].
    fn injection_ready(&mut self) -> impl Future<Output = ()> + Send;
    /// Whether no further byte goes to the peer, whatever the server sends: the stream ends there. Asked when there is
    /// nothing to inject.
    fn is_finished(&self) -> bool {
        false
    }
}

/// Interceptor that passes every byte unchanged; it compiles to nothing.
#[derive(Clone, Copy, Debug)]
pub struct PassThrough;

impl Interceptor for PassThrough {
    type ToServer = Self;
    type FromServer = Self;

    fn begin(&self) -> (Self, Self) {
        (Self, Self)
    }
}

impl ToServer for PassThrough {
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        out(message);
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(())
    }

    fn has_pending(&self) -> bool {
        false
    }

    fn next_released(&mut self) -> impl Future<Output = Result<Option<Bytes>, InterceptError>> + Send {
        std::future::pending()
    }
}

impl FromServer for PassThrough {
    fn on_data(&mut self, data: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError> {
        out(data);
        Ok(())
    }

    fn ended(&mut self) -> Result<(), InterceptError> {
        Ok(())
    }

    fn read_limit(&self) -> usize {
        usize::MAX
    }

    fn next_injected(&mut self) -> Option<Bytes> {
        None
    }

    fn injection_ready(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}
