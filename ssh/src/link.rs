//! A connection as a link of the tunnel crate.

use std::fmt::Debug;
use std::future::Future;

use russh::{Channel, ChannelOpenFailure};
use secure_comms_protocol::limits::CHANNEL_OPEN;
use secure_comms_protocol::{Opening, TunnelName};
use secure_comms_tunnel::flow::Flow;
use secure_comms_tunnel::session::{ChannelError, Channels};
use secure_comms_tunnel::{Credits, Link, OpenError, Receiver, Sender, Stream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::channel::{ChannelReceiver, ChannelSender, Message, PendingChannel, split};

/// Opens the channel of a named stream; each end has its own implementation.
pub trait Opener: Clone + Debug + Send + Sync + 'static {
    /// Message type of its SSH session.
    type Message: Message;
    /// Opens the channel, with the stream id as the originator port and the opening as the originator address.
    ///
    /// # Errors
    /// The peer refuses the channel, or the connection is gone.
    fn open(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
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

/// A connection of a session.
impl<O: Opener> Channels for SshLink<O> {
    type Receiver = ChannelReceiver;
    type Sender = ChannelSender<O::Message>;
    type Pending = PendingChannel<O::Message>;

    fn open_channel(
        &self,
        name: &TunnelName,
        id: u32,
        opening: Opening,
    ) -> impl Future<Output = Result<(ChannelReceiver, ChannelSender<O::Message>), ChannelError>> + Send + 'static
    {
        let channel = self.opener.open(name, id, opening);
        async move {
            match channel.await {
                Ok(channel) => Ok(split(channel)),
                Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ResourceShortage)) => {
                    Err(ChannelError::Full)
                }
                Err(russh::Error::ChannelOpenFailure(reason)) => {
                    Err(ChannelError::Refused(describe(&reason)))
                }
                Err(russh::Error::RequestDenied) => Err(ChannelError::Refused("not asked for".into())),
                Err(_) => Err(ChannelError::Gone),
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.credits.is_gone()
    }

    async fn gone(&self) {
        self.credits.gone().await;
    }
}

impl<O: Opener> Link for SshLink<O> {
    type Receiver = ChannelReceiver;
    type Sender = ChannelSender<O::Message>;

    async fn open(
        &self,
        name: &TunnelName,
    ) -> Result<Stream<ChannelReceiver, ChannelSender<O::Message>>, OpenError> {
        let flow = self.credits.open(name).await?;
        let (done, opened) = oneshot::channel();
        tokio::spawn(answered(
            self.opener.open(name, flow.id(), Opening::New),
            flow,
            self.credits.clone(),
            done,
        ));
        tokio::select! {
            opened = timeout(CHANNEL_OPEN, opened) => match opened {
                Ok(Ok((Ok(channel), flow))) => {
                    let (receiver, sender) = split(channel);
                    Ok(Stream { receiver, sender, flow })
                }
                Ok(Ok((Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ResourceShortage)), _))) => {
                    Err(OpenError::Full)
                }
                Ok(Ok((Err(russh::Error::ChannelOpenFailure(reason)), _))) => {
                    Err(OpenError::Refused(describe(&reason)))
                }
                Ok(Ok((Err(_), _)) | Err(_)) => Err(OpenError::LinkGone),
                Err(_) => Err(OpenError::Refused(format!("no answer within {} s", CHANNEL_OPEN.as_secs()))),
            },
            () = self.credits.gone() => Err(OpenError::LinkGone),
        }
    }

    fn is_gone(&self) -> bool {
        self.credits.is_gone()
    }
}

/// The answer to an open, with the stream's place on the connection.
type Answer<M> = (Result<Channel<M>, russh::Error>, Flow);

/// Waits for the answer to an open, and passes it to `done`. Runs in a task of its own, to the end even if the opener has
/// left: a server SSH session that receives the answer to a dropped open would end after a refusal, and leak the channel after a
/// confirmation. The stream keeps its place until then, so a peer that answers no open gets a limited number of them.
async fn answered<M: Message>(
    open: impl Future<Output = Result<Channel<M>, russh::Error>>,
    flow: Flow,
    credits: Credits,
    done: oneshot::Sender<Answer<M>>,
) {
    let answer = tokio::select! {
        answer = open => answer,
        () = credits.gone() => return,
    };
    if let Err((Ok(late), _flow)) = done.send((answer, flow)) {
        // The client of the inbound has left. The SSH session may wait for us to take messages before it takes our close (D1), and
        // then neither a cut nor the end of the connection would reach it. Or it may be gone.
        let (mut receiver, sender) = split(late);
        tokio::select! {
            _ = sender.close() => {}
            () = async { while receiver.recv().await.is_some() {} } => {}
            () = credits.gone() => {}
        }
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

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use secure_comms_protocol::limits::CreditLimits;
    use secure_comms_tunnel::flow::{PeerFlow, Side};
    use tokio::time::Instant;

    use super::*;

    /// A peer that answers no open.
    #[derive(Clone, Debug, Default)]
    struct Mute(Arc<AtomicUsize>);

    impl Opener for Mute {
        type Message = russh::client::Msg;

        fn open(
            &self,
            _: &TunnelName,
            _: u32,
            _: Opening,
        ) -> impl Future<Output = Result<Channel<Self::Message>, russh::Error>> + Send + 'static {
            self.0.fetch_add(1, Ordering::Relaxed);
            pending()
        }
    }

    fn link() -> (SshLink<Mute>, Mute, Credits) {
        let credits = Credits::new(Side::Agent, CreditLimits::ATTESTATION);
        credits.set_peer_mode(PeerFlow::WindowOnly);
        let mute = Mute::default();
        (SshLink::new(mute.clone(), credits.clone()), mute, credits)
    }

    #[tokio::test(start_paused = true)]
    async fn opens_that_are_never_answered_are_limited() {
        let (link, mute, credits) = link();
        let (name, most) = (TunnelName::kbs(), CreditLimits::ATTESTATION.tunnel_streams());
        for number in 0..3 * most {
            // The client leaves in one case, and waits for the timeout in the other.
            let opened = match number % 2 {
                0 => timeout(CHANNEL_OPEN / 2, link.open(&name)).await.ok(),
                _ => Some(link.open(&name).await),
            };
            assert!(!matches!(opened, Some(Ok(_))));
        }
        assert_eq!(mute.0.load(Ordering::Relaxed), most, "opens that wait at the peer");
        assert_eq!(link.open(&name).await.map(drop), Err(OpenError::Full));
        credits.end();
        timeout(CHANNEL_OPEN, credits.idle()).await.expect("the places are given back with the connection");
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_is_given_up_in_time_and_with_the_connection() {
        let (link, _, credits) = link();
        let began = Instant::now();
        let Err(OpenError::Refused(why)) = link.open(&TunnelName::kbs()).await else { panic!("opened") };
        assert!(why == "no answer within 160 s" && began.elapsed() == CHANNEL_OPEN, "{why}");
        let name = TunnelName::kbs();
        let (opened, ()) = tokio::join!(link.open(&name), async { credits.end() });
        assert!(matches!(opened, Err(OpenError::LinkGone)));
    }
}
