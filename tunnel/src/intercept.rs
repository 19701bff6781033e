//! What stands in a tunnel and looks at its bytes, where a server's protocol asks for it.
//!
//! Two halves, one for each direction, as the relay has two ends. What they know of the protocol is theirs: here are
//! only pieces that pass, pieces that are held back until they may pass, and pieces of their own.

use std::error::Error;
use std::fmt::Debug;
use std::future::Future;

use bytes::Bytes;

/// Why an interceptor can't let a tunnel go on.
pub type InterceptError = Box<dyn Error + Send + Sync>;

/// Makes the two halves for each stream of a tunnel.
pub trait Interceptor: Clone + Debug + Send + Sync + 'static {
    /// Stands between the stream and the server.
    type ToServer: ToServer;
    /// Stands between the server and the stream.
    type FromServer: FromServer;
    /// The halves for a new stream.
    fn begin(&self) -> (Self::ToServer, Self::FromServer);
}

/// Sees what goes to the server.
pub trait ToServer: Send {
    /// A message has arrived. What goes on now is handed to `out`, in order; what is kept counts as consumed once all
    /// before it has left, so the interceptor must bound what it keeps.
    ///
    /// # Errors
    /// The tunnel must end.
    fn on_message(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), InterceptError>;
    /// No more will arrive.
    ///
    /// # Errors
    /// This is no place to end.
    fn ended(&mut self) -> Result<(), InterceptError>;
    /// Whether something is held back, so that the server must not hear an end yet.
    fn has_pending(&self) -> bool;
    /// Waits until a piece that was held back may go on, and this is the place for it; nothing if it never will. Asked
    /// only while something is held; the future may be dropped and asked for again.
    fn next_released(&mut self) -> impl Future<Output = Result<Option<Bytes>, InterceptError>> + Send;
}

/// Sees what the server sends.
pub trait FromServer: Send {
    /// This is about to go on.
    ///
    /// # Errors
    /// The tunnel must end.
    fn inspect(&mut self, data: &[u8]) -> Result<(), InterceptError>;
    /// The server sends no more.
    ///
    /// # Errors
    /// This is no place to end.
    fn ended(&mut self) -> Result<(), InterceptError>;
    /// How many bytes may be read next, at least one: fewer where a place for a piece of its own must not be missed.
    fn read_limit(&self) -> usize;
    /// A piece of its own, if there is one and this is the place for it.
    fn next_injected(&mut self) -> Option<Bytes>;
    /// Waits until there may be one. The future may be dropped and asked for again.
    fn injection_ready(&mut self) -> impl Future<Output = ()> + Send;
}

/// No interceptor: everything passes as it comes.
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
    fn inspect(&mut self, _: &[u8]) -> Result<(), InterceptError> {
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
