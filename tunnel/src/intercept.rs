//! What stands in a tunnel and looks at its bytes, where a server's protocol asks for it.
//!
//! Two halves, one for each direction, as the relay has two ends. What they know of the protocol is theirs: here are
//! only pieces that pass, pieces that are held back until they may pass, and pieces of their own.

use std::error::Error;
use std::fmt::Debug;
use std::future::Future;

use bytes::Bytes;

/// Why an interceptor can't let a tunnel go on.
pub type Broken = Box<dyn Error + Send + Sync>;

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
    fn take(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), Broken>;
    /// No more will arrive.
    ///
    /// # Errors
    /// This is no place to end.
    fn ended(&mut self) -> Result<(), Broken>;
    /// Whether something is held back, so that the server must not hear an end yet.
    fn holds(&self) -> bool;
    /// Waits until a piece that was held back may go on, and this is the place for it; nothing if it never will. Asked
    /// only while something is held; the future may be dropped and asked for again.
    fn released(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send;
}

/// Sees what the server sends.
pub trait FromServer: Send {
    /// This is about to go on.
    ///
    /// # Errors
    /// The tunnel must end.
    fn passes(&mut self, data: &[u8]) -> Result<(), Broken>;
    /// The server sends no more.
    ///
    /// # Errors
    /// This is no place to end.
    fn ended(&mut self) -> Result<(), Broken>;
    /// How many bytes may be read next, at least one: fewer where a place for a piece of its own must not be missed.
    fn reach(&self) -> usize;
    /// A piece of its own, if there is one and this is the place for it.
    fn insert(&mut self) -> Option<Bytes>;
    /// Waits until there may be one. The future may be dropped and asked for again.
    fn wakes(&mut self) -> impl Future<Output = ()> + Send;
}

/// No interceptor: everything passes as it comes.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Interceptor for Plain {
    type ToServer = Self;
    type FromServer = Self;

    fn begin(&self) -> (Self, Self) {
        (Self, Self)
    }
}

impl ToServer for Plain {
    fn take(&mut self, message: Bytes, out: &mut impl FnMut(Bytes)) -> Result<(), Broken> {
        out(message);
        Ok(())
    }

    fn ended(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    fn holds(&self) -> bool {
        false
    }

    fn released(&mut self) -> impl Future<Output = Result<Option<Bytes>, Broken>> + Send {
        std::future::pending()
    }
}

impl FromServer for Plain {
    fn passes(&mut self, _: &[u8]) -> Result<(), Broken> {
        Ok(())
    }

    fn ended(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    fn reach(&self) -> usize {
        usize::MAX
    }

    fn insert(&mut self) -> Option<Bytes> {
        None
    }

    fn wakes(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}
