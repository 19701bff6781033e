//! A connection as a link of the tunnel crate.

use std::future::Future;

use russh::{Channel, ChannelOpenFailure};
use secure_comms_protocol::TunnelName;
use secure_comms_protocol::limits::CHANNEL_OPEN;
use secure_comms_tunnel::flow::StreamError;
use secure_comms_tunnel::{Credits, Link, OpenError, Receiver, Sender, Stream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::channel::{ChannelReceiver, ChannelSender, Message, split};

/// Opens the channel of a named stream; each end has its own implementation.
pub trait Opener: Clone + Send + Sync + 'static {
    /// Message type of its session.
    type Message: Message;
    /// Opens the channel, with the stream id as the originator port.
    ///
    /// # Errors
    /// The peer refuses the channel, or the connection is gone.
    fn open(
        &self,
        name: &TunnelName,
        id: u32,
    ) -> impl Future<Output = Result<Channel<Self::Message>, russh::Error>> + Send + 'static;
}

/// An authenticated connection on which streams can be opened.
#[derive(Clone, Debug)]
pub struct SshLink<O> {
    opener: O,
    credits: Credits,
}

impl<O: Opener> SshLink<O> {
    /// Makes the link of a connection with this flow control.
    pub fn new(opener: O, credits: Credits) -> Self {
        Self { opener, credits }
    }

    /// Opener of its channels.
    pub fn opener(&self) -> &O {
        &self.opener
    }
}

impl<O: Opener> Link for SshLink<O> {
    type Receiver = ChannelReceiver;
    type Sender = ChannelSender<O::Message>;

    async fn open(
        &self,
        name: &TunnelName,
    ) -> Result<Stream<ChannelReceiver, ChannelSender<O::Message>>, OpenError> {
        let flow = self.credits.open().await.map_err(|error| match error {
            StreamError::Gone => OpenError::LinkGone,
            other => OpenError::Refused(other.to_string()),
        })?;
        let (done, opened) = oneshot::channel();
        let open = self.opener.open(name, flow.id());
        let credits = self.credits.clone();
        // A task of its own runs to the end even if our future is dropped. Otherwise a server session that receives
        // the answer to a dropped open would end after a refusal, and leak the channel after a confirmation.
        tokio::spawn(async move {
            if let Err(Ok(late)) = done.send(open.await) {
                // The client of the inbound has left. The session may wait for us to take messages before it takes our
                // close (D1), and then neither a cut nor the end of the connection would reach it. Or it may be gone.
                let (mut receiver, sender) = split(late);
                tokio::select! {
                    _ = sender.close() => {}
                    () = async { while receiver.recv().await.is_some() {} } => {}
                    () = credits.gone() => {}
                }
            }
        });
        tokio::select! {
            opened = timeout(CHANNEL_OPEN, opened) => match opened {
                Ok(Ok(Ok(channel))) => {
                    let (receiver, sender) = split(channel);
                    Ok(Stream { receiver, sender, flow })
                }
                Ok(Ok(Err(russh::Error::ChannelOpenFailure(reason)))) => Err(OpenError::Refused(describe(&reason))),
                Ok(Ok(Err(_)) | Err(_)) => Err(OpenError::LinkGone),
                Err(_) => Err(OpenError::Refused(format!("no answer within {} s", CHANNEL_OPEN.as_secs()))),
            },
            () = self.credits.gone() => Err(OpenError::LinkGone),
        }
    }

    fn is_gone(&self) -> bool {
        self.credits.is_gone()
    }
}

fn describe(reason: &ChannelOpenFailure) -> String {
    match reason {
        ChannelOpenFailure::AdministrativelyProhibited => {
            "administratively prohibited: not an outbound there".into()
        }
        ChannelOpenFailure::ConnectFailed => "connect failed: its server can't be reached".into(),
        other => other.description().to_owned(),
    }
}
