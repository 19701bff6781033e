//! What the relay sees of a stream: it goes on over whichever channel carries it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::entry::{Entry, Pass, Waiting};
use super::{Channels, Session};
use crate::flow::cost;
use crate::link::{Event, Gone, Receiver, Sender};

/// Receiving half of a stream of a session.
#[derive(Debug)]
pub struct SessionReceiver<C: Channels> {
    session: Session<C>,
    entry: Arc<Entry<C>>,
    /// The channel that is read, with its epoch.
    channel: Option<(C::Receiver, u64)>,
    /// Nothing more will come.
    ended: bool,
}

/// Sending half of a stream of a session.
#[derive(Debug)]
pub struct SessionSender<C: Channels> {
    session: Session<C>,
    entry: Arc<Entry<C>>,
    closed: AtomicBool,
}

/// The halves of a stream that both ends know.
pub(super) fn halves<C: Channels>(
    session: &Session<C>,
    entry: &Arc<Entry<C>>,
) -> (SessionReceiver<C>, SessionSender<C>) {
    let receiver =
        SessionReceiver { session: session.clone(), entry: entry.clone(), channel: None, ended: false };
    let sender =
        SessionSender { session: session.clone(), entry: entry.clone(), closed: AtomicBool::new(false) };
    (receiver, sender)
}

/// Next event, on whichever channel. None if the peer lied. Cancellation safe.
async fn next<C: Channels>(
    session: &Session<C>,
    entry: &Entry<C>,
    channel: &mut Option<(C::Receiver, u64)>,
) -> Option<Event> {
    loop {
        let Some((receiver, epoch)) = channel else {
            let waiting = entry.wait_for(|state| match Entry::<C>::waiting(state) {
                Waiting::Nothing => None,
                other => Some(other),
            });
            match waiting.await {
                Waiting::Channel(receiver, epoch) => *channel = Some((receiver, epoch)),
                Waiting::Closed | Waiting::Nothing => return Some(Event::Close),
            }
            continue;
        };
        if let Some(event) = receiver.recv().await {
            return on_event(session, entry, event);
        }
        // All that had arrived was taken: the stream may go on over another channel.
        entry.detach(*epoch);
        *channel = None;
    }
}

/// Counts what has come; none if the peer lied, which ends the session.
fn on_event<C: Channels>(session: &Session<C>, entry: &Entry<C>, event: Event) -> Option<Event> {
    let mut state = entry.state();
    let counted = match &event {
        Event::Data(data) => state.stream.on_data(data.len()),
        Event::Eof => state.stream.on_eof(),
        Event::Close => {
            let freed = state.stream.on_close();
            drop(state);
            session.drop_kept(freed.into());
            entry.notify();
            return Some(event);
        }
    };
    drop(state);
    match counted {
        Ok(()) => Some(event),
        Err(lie) => {
            session.end_for(entry.id(), &lie);
            None
        }
    }
}

impl<C: Channels> Receiver for SessionReceiver<C> {
    async fn recv(&mut self) -> Option<Event> {
        let Self { session, entry, channel, ended } = self;
        if *ended {
            return None;
        }
        let event = tokio::select! {
            biased;
            event = next(session, entry, channel) => event,
            // With the session the streams end at once, also where the connection lives for some time.
            () = session.credits().gone() => None,
        };
        if matches!(event, None | Some(Event::Close)) {
            (*ended, *channel) = (true, None);
        }
        event
    }
}

impl<C: Channels> SessionSender<C> {
    /// Passes something on.
    async fn pass(&self, pass: Option<Pass<C>>) -> Result<(), Gone> {
        if let Some(pass) = pass {
            // A connection that has ended: the stream has kept it.
            let _ = pass.run().await;
        }
        if self.session.credits().is_gone() { Err(Gone) } else { Ok(()) }
    }
}

impl<C: Channels> Sender for SessionSender<C> {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        let counted = cost(data.len());
        self.session.keep(counted).map_err(|()| Gone)?;
        let (kept, pass) = self.entry.transmit(|stream| stream.push(&data));
        self.session.drop_kept((counted - kept).into());
        drop(data);
        self.pass(pass).await
    }

    async fn eof(&self) -> Result<(), Gone> {
        let ((), pass) = self.entry.transmit(|stream| stream.end());
        self.pass(pass).await
    }

    /// Returns once the other end has closed the stream, too, or has our close; or the session has ended.
    async fn close(&self) -> Result<(), Gone> {
        let ((), pass) = self.entry.transmit(|stream| stream.close());
        let closed = async {
            let result = self.pass(pass).await;
            self.entry.wait_for(|state| state.is_done().then_some(())).await;
            result
        };
        let result = tokio::select! {
            biased;
            result = closed => result,
            () = self.session.credits().gone() => Err(Gone),
        };
        self.closed.store(true, Relaxed);
        self.session.forget(&self.entry);
        result
    }
}

impl<C: Channels> Drop for SessionSender<C> {
    fn drop(&mut self) {
        if self.closed.load(Relaxed) {
            return;
        }
        let close = self.entry.hang_up();
        self.session.forget(&self.entry);
        // Without a connection, or a runtime, the other end learns it on the next connection.
        if let Some(close) = close
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(close.run());
        }
    }
}
