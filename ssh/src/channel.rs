//! SSH channels as streams of the tunnel crate, for both ends.

use bytes::Bytes;
use russh::{
    Channel, ChannelId, ChannelMsg, ChannelOpenFailure, ChannelOpenHandleInner, ChannelReadHalf,
    ChannelWriteHalf,
};
use secure_comms_protocol::Refusal;
use secure_comms_tunnel::link::Gone;
use secure_comms_tunnel::{Event, Incoming, Receiver, Sender};

/// Message of a channel to the SSH session of a client or of a server.
pub trait Message: From<(ChannelId, ChannelMsg)> + Send + Sync + 'static {}

impl<M: From<(ChannelId, ChannelMsg)> + Send + Sync + 'static> Message for M {}

/// Receiving half of a channel.
#[derive(Debug)]
pub struct ChannelReceiver(ChannelReadHalf);

/// Sending half of a channel.
pub struct ChannelSender<M: Message>(ChannelWriteHalf<M>);

impl<M: Message> std::fmt::Debug for ChannelSender<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelSender").finish_non_exhaustive()
    }
}

/// Splits a channel into the halves of a stream.
pub fn split<M: Message>(channel: Channel<M>) -> (ChannelReceiver, ChannelSender<M>) {
    let (read, write) = channel.split();
    (ChannelReceiver(read), ChannelSender(write))
}

impl Receiver for ChannelReceiver {
    async fn recv(&mut self) -> Option<Event> {
        loop {
            match self.0.wait().await? {
                ChannelMsg::Data { data } => return Some(Event::Data(data)),
                ChannelMsg::Eof => return Some(Event::Eof),
                ChannelMsg::Close => return Some(Event::Close),
                // The handler answers requests; extended data has no meaning on a tunnel.
                _ => {}
            }
        }
    }
}

impl<M: Message> ChannelSender<M> {
    /// Sends the exit status of a session channel.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn exit_status(&self, status: u32) -> Result<(), Gone> {
        self.0.exit_status(status).await.map_err(|_| Gone)
    }
}

impl<M: Message> Sender for ChannelSender<M> {
    async fn send(&self, data: Bytes) -> Result<(), Gone> {
        self.0.data_bytes(data).await.map_err(|_| Gone)
    }

    async fn eof(&self) -> Result<(), Gone> {
        self.0.eof().await.map_err(|_| Gone)
    }

    async fn close(&self) -> Result<(), Gone> {
        self.0.close().await.map_err(|_| Gone)
    }
}

/// A channel that the other end asks to open.
pub struct PendingChannel<M: Message> {
    channel: Channel<M>,
    reply: ChannelOpenHandleInner<M>,
}

impl<M: Message> std::fmt::Debug for PendingChannel<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingChannel").finish_non_exhaustive()
    }
}

impl<M: Message> PendingChannel<M> {
    /// Takes the channel and the reply handle that russh gave to the handler.
    pub fn new(channel: Channel<M>, reply: ChannelOpenHandleInner<M>) -> Self {
        Self { channel, reply }
    }
}

impl<M: Message> Incoming for PendingChannel<M> {
    type Receiver = ChannelReceiver;
    type Sender = ChannelSender<M>;

    async fn accept(self) -> (ChannelReceiver, ChannelSender<M>) {
        self.reply.accept().await;
        split(self.channel)
    }

    async fn refuse(self, refusal: Refusal) {
        // `Other` is the only variant that carries a description of ours.
        let failure = ChannelOpenFailure::Other { code: refusal.kind.code(), reason: refusal.reason };
        self.reply.reject(failure).await;
    }
}
