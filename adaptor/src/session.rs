//! A session: an authenticated connection whose control channel is open and on which both ends have said hello.

mod tunnels;

use std::fmt;
use std::time::Duration;

use secure_comms_protocol::Hello;
use secure_comms_protocol::limits::{HELLO, UPGRADE_DRAIN};
use secure_comms_protocol::{Attestation, Control, KeyProgress, Phase, PodId, TunnelName};
use secure_comms_ssh::control::{self, ControlEnd, Outbox};
use secure_comms_ssh::guard::Guard;
use secure_comms_tunnel::{Credits, Receiver, Sender};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

pub use self::tunnels::Tunnels;
use self::tunnels::unpartnered;
use crate::ssh::{AgentLink, ClientPhase, ConnectError, Connection, TransportEnd, quote};

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionEnd(String);

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<TransportEnd> for SessionEnd {
    fn from(end: TransportEnd) -> Self {
        Self(match end {
            TransportEnd::Refused => "the agent refused us".into(),
            TransportEnd::Disconnected(why) => format!("the agent disconnected: {why}"),
            TransportEnd::Broken(why) => why,
        })
    }
}

/// What the agent has said so far. Later words replace earlier ones, so that a talkative stranger costs nothing.
#[derive(Clone, Debug, Default)]
struct Heard {
    hello: Option<Hello>,
    keys: Option<KeyProgress>,
    upgrade: bool,
    end: Option<SessionEnd>,
}

/// An established session; dropping it ends the connection, its streams and its tasks.
#[derive(Debug)]
pub struct Session<P: ClientPhase> {
    connection: Connection<P>,
    outbox: Outbox,
    heard: watch::Receiver<Heard>,
    agent: Hello,
    unpartnered: Vec<String>,
    last_keys: Option<KeyProgress>,
    control: AbortHandle,
}

impl<P: ClientPhase> Drop for Session<P> {
    fn drop(&mut self) {
        self.control.abort();
    }
}

impl<P: ClientPhase> Session<P> {
    /// Opens the control channel, asks for the forwards, and exchanges hellos.
    ///
    /// # Errors
    /// The other end is no agent in this phase, or does not answer in time.
    pub async fn establish(
        connection: Connection<P>,
        pod: &PodId,
        tunnels: &Tunnels<P>,
    ) -> Result<Self, ConnectError> {
        match timeout(HELLO, Self::exchange(connection, pod, tunnels)).await {
            Ok(session) => session,
            Err(_) => Err(ConnectError::Timeout(HELLO.as_secs(), "waiting for the agent's hello")),
        }
    }

    async fn exchange(
        connection: Connection<P>,
        pod: &PodId,
        tunnels: &Tunnels<P>,
    ) -> Result<Self, ConnectError> {
        // The forwards go out with the first message, and cost no round trip of their own.
        let (channel, refused) = tokio::join!(connection.control(), forwards(&connection, tunnels));
        let (receiver, sender) = channel?;
        let outbox = Outbox::default();
        let credits = connection.credits();
        let ours = tunnels.hello(pod, credits.initial());
        outbox.send(Control::Hello(ours.clone()));
        let (heard, mut hears) = watch::channel(Heard::default());
        let control = run(receiver, sender, credits.clone(), outbox.clone(), connection.ended(), heard);
        let control = tokio::spawn(control).abort_handle();
        let mut session = Self {
            connection,
            outbox,
            heard: hears.clone(),
            agent: Hello::default(),
            unpartnered: Vec::new(),
            last_keys: None,
            control,
        };
        let first = hears.wait_for(|heard| heard.hello.is_some() || heard.end.is_some()).await;
        let first = first.map(|heard| heard.clone()).unwrap_or_default();
        session.agent = checked::<P>(first)?;
        session.unpartnered = unpartnered::<P>(&ours, &session.agent, &refused?);
        Ok(session)
    }

    /// Where streams to the agent's outbounds are opened.
    pub fn link(&self) -> AgentLink<P> {
        self.connection.link()
    }

    /// What the agent said of itself.
    pub fn agent(&self) -> &Hello {
        &self.agent
    }

    /// A line for each tunnel that one end has and the other lacks.
    pub fn unpartnered(&self) -> &[String] {
        &self.unpartnered
    }

    /// What tells whether the agent still speaks.
    pub fn pulse(&self) -> Pulse {
        Pulse {
            outbox: self.outbox.clone(),
            guard: self.connection.guard(),
            credits: self.connection.credits().clone(),
        }
    }

    /// Waits until no stream is open.
    pub async fn idle(&self) {
        self.connection.credits().idle().await;
    }

    /// How many streams are open.
    pub fn open_streams(&self) -> usize {
        self.connection.credits().open_streams()
    }

    /// Waits for the end of the session.
    pub async fn ended(&mut self) -> SessionEnd {
        let end = self.heard.wait_for(|heard| heard.end.is_some()).await;
        end.ok().and_then(|heard| heard.end.clone()).unwrap_or_else(gone)
    }

    /// Says why, and waits for the agent to end the connection; not long, for it may be gone.
    pub async fn close(mut self, reason: &str) {
        self.outbox.bye(reason);
        drop(timeout(CLOSE, self.ended()).await);
    }
}

/// Whether the agent at the other end of a session still speaks.
#[derive(Debug)]
pub struct Pulse {
    outbox: Outbox,
    guard: Guard,
    credits: Credits,
}

impl Pulse {
    /// Asks the agent for a sign of life.
    pub fn probe(&self) {
        self.outbox.probe();
    }

    /// How long ago the agent was told something after which nothing has come from it; none if something has.
    pub fn unanswered(&self) -> Option<Duration> {
        self.guard.unanswered()
    }

    /// The shortest round trip seen; zero before the first.
    pub fn round_trip(&self) -> Duration {
        self.credits.shortest_round_trip().unwrap_or_default()
    }
}

/// How long an agent may take to end a connection after our bye.
const CLOSE: Duration = UPGRADE_DRAIN;

/// What happens while the agent attests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attested {
    /// An attempt to get the keys ended.
    Keys(KeyProgress),
    /// The keys are there: come back in the Kubernetes phase.
    Upgrade,
    /// The session ended.
    Ended(SessionEnd),
}

impl Session<Attestation> {
    /// Waits for what comes next.
    pub async fn next(&mut self) -> Attested {
        loop {
            let heard = self.heard.borrow_and_update().clone();
            // The agent repeats itself.
            if let Some(keys) = heard.keys.filter(|keys| self.last_keys.as_ref() != Some(keys)) {
                self.last_keys = Some(keys.clone());
                return Attested::Keys(keys);
            }
            if heard.upgrade {
                return Attested::Upgrade;
            }
            if let Some(end) = heard.end {
                return Attested::Ended(end);
            }
            if self.heard.changed().await.is_err() {
                return Attested::Ended(gone());
            }
        }
    }
}

fn gone() -> SessionEnd {
    SessionEnd("the connection is gone".into())
}

/// Runs the control channel, and notes what is heard and how it ends.
async fn run(
    mut receiver: impl Receiver,
    sender: impl Sender,
    credits: Credits,
    outbox: Outbox,
    ended: impl Future<Output = TransportEnd>,
    heard: watch::Sender<Heard>,
) {
    let end = tokio::select! {
        // The connection knows best why it ended; the channel then only sees that it did.
        biased;
        end = ended => end.into(),
        end = control::run(&mut receiver, &sender, &credits, &outbox, |message| note(&heard, message)) => {
            SessionEnd(match end {
                ControlEnd::Bye(reason) => format!("the agent said bye: {}", quote(&reason)),
                other => quote(&other.to_string()),
            })
        }
        () = credits.gone() => SessionEnd("the agent sent more than it was granted".into()),
    };
    credits.end();
    heard.send_modify(|heard| heard.end = Some(end));
}

fn note(heard: &watch::Sender<Heard>, message: Control) {
    heard.send_modify(|heard| match message {
        // The first one: it is what we have checked.
        Control::Hello(hello) => _ = heard.hello.get_or_insert(hello),
        Control::Keys(keys) => {
            let error = keys.error.as_deref().map(quote);
            heard.keys = Some(KeyProgress { error, ..keys });
        }
        Control::Upgrade(_) => heard.upgrade = true,
        Control::Credit(_) | Control::Ping(_) | Control::Pong(_) | Control::Bye(_) => {}
    });
}

fn checked<P: Phase>(heard: Heard) -> Result<Hello, ConnectError> {
    let fault = |why: String| ConnectError::Protocol("exchange hellos", why);
    match (heard.hello, heard.end) {
        (Some(hello), _) if hello.phase.is_some_and(|phase| phase != P::NAME) => {
            Err(fault(format!("the agent let us in as '{}' and says it is in another phase", P::NAME.user())))
        }
        (Some(hello), _) => Ok(Hello { instance: hello.instance.as_deref().map(quote), ..hello }),
        (None, end) => Err(fault(end.unwrap_or_else(gone).0)),
    }
}

/// Asks for a forward to each of our outbounds; returns those that the agent refuses.
async fn forwards<P: ClientPhase>(
    connection: &Connection<P>,
    tunnels: &Tunnels<P>,
) -> Result<Vec<TunnelName>, ConnectError> {
    let mut refused = Vec::new();
    for (name, port) in &tunnels.forwards {
        if !connection.forward(name, *port).await? {
            refused.push(name.clone());
        }
    }
    Ok(refused)
}
