//! One session with the pod's agent, over many connections of its main lane. The streams go on from one to the next; the
//! local clients hear silence in between.
//!
//! ```text
//! serve_main --- lost ---------> reconnect --- resumed ---> serve_main
//!     |  ^                           |
//!     |  +-- replaced by failover    +--- not resumed: this session is over, its streams are reset
//!     +---- stopped, or over
//! ```

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::control::KnownStreams;
use secure_comms_protocol::limits::{RETRY_MAX, SESSION_LINGER};
use secure_comms_protocol::{Control, Kubernetes, Lane, PhaseName, SessionId};
use secure_comms_tunnel::flow::Side;
use secure_comms_tunnel::session::Session;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::candidates::Reached;
use super::connect::{AnyConnection, Connected};
use super::data_lane::{DataLane, MainLane};
use super::driver::{Driver, Ended, Stop, stopped};
use super::failover::{LaneEnd, await_lane_end, failover_reason};
use super::redial::{Pace, Redial};
use super::status::PodEvent;
use super::withdrawal::{READABLE, until_gone};
use crate::transport::agent_connection::{
    AgentConnection, ConnectionEnd, EndCause, Farewell, Joined, Joining,
};
use crate::transport::routes::KubernetesLink;
use crate::transport::ssh::{AgentSession, ClientPhase};

/// The time after the loss of the main lane in which only the Kubernetes phase is tried. After it the agent may have been
/// restarted, and attest.
const KUBERNETES_ONLY: Duration = Duration::from_secs(2);
/// The time in which the main lane is connected again quickly, besides the search at all addresses in both phases. An agent
/// may keep the session for as long: from when it notices the loss.
const REDIAL: Duration = SESSION_LINGER.saturating_mul(2);

/// What serves a session.
struct Serving {
    session: AgentSession,
    /// The connection of the main lane, for the data lane.
    main_lane: watch::Sender<Option<MainLane>>,
    /// Wakes the data lane because the agent wants it.
    data_wanted: Arc<Notify>,
    /// The last word on the connection of the data lane, while that has one.
    data_farewell: watch::Receiver<Option<Farewell>>,
    /// Of the connections of the main lane.
    pace: Pace,
    /// The task of the data lane.
    data_lane: Pin<Box<dyn Future<Output = Infallible> + Send>>,
}

/// A connection of the main lane.
struct Main {
    address: SocketAddr,
    connection: AgentConnection<Kubernetes>,
    /// When the connection before it was last heard; none for the first one of the session.
    cut: Option<Instant>,
}

/// How a connection of the main lane ended.
enum MainEnd {
    Stopped(Stop),
    /// The session is over, and why.
    Over(String),
    Lost(ConnectionEnd),
    Replaced(SocketAddr, Box<AgentConnection<Kubernetes>>),
}

impl Driver {
    /// Serves the session `id`, which begins with this connection, until the pod is stopped or the session is over. Returns
    /// the connection that follows, if there is one already.
    pub(super) async fn run_session(
        &mut self,
        address: SocketAddr,
        connection: AgentConnection<Kubernetes>,
        id: SessionId,
    ) -> Result<Option<Connected>, Ended> {
        let credit = connection.agent().credit.unwrap_or_default();
        let session = Session::charged_to(
            self.plan.account.clone(),
            Side::Adaptor,
            Kubernetes::CREDIT,
            id.clone(),
            credit,
        );
        self.plan.session = Some(id);
        let (main_lane, seen) = watch::channel(None);
        let data_lane = DataLane::new(self.plan.clone(), session.clone(), seen, self.status.clone());
        let (data_wanted, data_farewell) = (data_lane.wanted(), data_lane.farewell());
        let serving = Serving {
            session: session.clone(),
            main_lane,
            data_wanted,
            data_farewell,
            pace: Pace::default(),
            data_lane: Box::pin(data_lane.run()),
        };
        self.routes.set_kubernetes(KubernetesLink::Session(session.link()));
        let followed = self.serve_session(serving, Main { address, connection, cut: None }).await;
        self.routes.close();
        self.plan.session = None;
        self.status.session_over();
        session.end("the session is over");
        followed
    }

    async fn serve_session(
        &mut self,
        mut serving: Serving,
        mut main: Main,
    ) -> Result<Option<Connected>, Ended> {
        loop {
            let since = Instant::now();
            let end = self.serve_main(&mut serving, &mut main).await;
            serving.main_lane.send_replace(None);
            self.status.lane(Lane::Main, false);
            let (session, liveness) = (&serving.session, main.connection.liveness());
            let heard = Instant::now() - liveness.unanswered().unwrap_or_default();
            let (address, connection) = match end {
                MainEnd::Stopped(stop) => {
                    self.routes.close();
                    self.drain_streams(session.credits(), stop.drain).await;
                    main.connection.close_with_session(stop.reason).await;
                    return Err(Ended::Stopped);
                }
                MainEnd::Over(why) => {
                    let reset = reset(session);
                    session.end(&why);
                    self.down(PhaseName::Kubernetes, format!("{why}; the session is over{reset}"));
                    main.connection.close_with_session(&why).await;
                    self.pause_if_short_lived(since).await?;
                    return Ok(None);
                }
                MainEnd::Replaced(address, connection) => {
                    let why = failover_reason(main.address, address) + &waits(session);
                    self.down(PhaseName::Kubernetes, why);
                    (address, *connection)
                }
                MainEnd::Lost(end) => {
                    self.down(PhaseName::Kubernetes, format!("{end}{}", waits(session)));
                    // Its streams go on only when what it has brought was taken.
                    drop(main.connection);
                    let joining = Joining { lane: Lane::Main, session: self.plan.session.clone() };
                    let redial = Redial::new(self.plan.clone(), joining, main.address, liveness.round_trip());
                    let pause = self.pause_after(&end, since, &mut serving.pace);
                    match self.reconnect(&mut serving, &redial, pause).await {
                        Ok(Some(connected)) => connected,
                        Ok(None) => return Ok(None),
                        Err(ended) => {
                            let farewell = serving.data_farewell.borrow().clone();
                            self.end_without_main(farewell).await;
                            return Err(ended);
                        }
                    }
                }
            };
            let session = &serving.session;
            if connection.session() != Some(&Joined { id: session.id().clone(), resumed: true }) {
                self.status.emit(&PodEvent::SessionOver(format!(
                    "the agent does not have it any more (it was restarted, or had no connection for {} s, or another \
                     adaptor connected){}",
                    SESSION_LINGER.as_secs(),
                    reset(session)
                )));
                let connection = AnyConnection::Kubernetes(connection);
                return Ok(Some(Connected { index: 0, address, connection }));
            }
            match self.plan.expected.check(connection.agent()) {
                Ok(warnings) => self.log_warnings(warnings),
                Err(unexpected) => {
                    let why = unexpected.to_string() + &reset(session);
                    return self.on_unexpected(connection, since, why).await.map(|()| None);
                }
            }
            main = Main { address, connection, cut: Some(heard) };
        }
    }

    /// Serves a connection of the main lane until it ends, is replaced, or the pod is stopped.
    async fn serve_main(&mut self, serving: &mut Serving, main: &mut Main) -> MainEnd {
        let Serving { session, main_lane, data_wanted, data_lane, .. } = serving;
        let Main { address, connection, cut } = main;
        let number = connection.join(session, Lane::Main);
        let liveness = connection.liveness();
        main_lane.send_replace(Some(MainLane { address: *address, number, liveness: liveness.clone() }));
        self.status.lane(Lane::Main, true);
        let instance = connection.agent().instance.clone().unwrap_or_default();
        match *cut {
            None => self.status.up(*address, instance.clone()),
            Some(cut) => self.status.resumed(
                *address,
                instance.clone(),
                cut.elapsed(),
                session.credits().open_streams(),
            ),
        }
        self.report_mismatches(PhaseName::Kubernetes, connection.tunnel_mismatches());
        let log = connection.take_log();
        let mut resume = pin!(async {
            if cut.is_some() {
                connection.say(Control::Streams(KnownStreams { known: session.known() }));
                session.resume(Lane::Main, number).await;
            }
            pending::<Infallible>().await
        });
        // Published again if anything at the pod's addresses attested in between. The streams go on at once: the VM runs
        // containers already, and a KBS that is away must not end them.
        let publication = self.plan.publication.clone().filter(|_| cut.is_some());
        let mut withdrawal = pin!(async {
            if let Some(publication) = publication {
                until_gone(&publication, &self.status, READABLE, |_| {}).await;
            }
            pending::<Infallible>().await
        });
        let joining = Joining { lane: Lane::Main, session: Some(session.id().clone()) };
        let redial = || Redial::new(self.plan.clone(), joining.clone(), *address, liveness.round_trip());
        let lane_limits = self.plan.lane_limits;
        let vm_log = self.vm_log.show(log, &instance, &self.status);
        let traffic = || (session.streams_of(Lane::Main) > 0).then(|| self.status.account().traffic());
        let (mut end, mut vm_log) =
            (pin!(await_lane_end(connection, lane_limits, traffic, redial)), pin!(vm_log));
        loop {
            tokio::select! {
                never = &mut vm_log => match never {},
                never = data_lane.as_mut() => match never {},
                never = &mut resume => match never {},
                never = &mut withdrawal => match never {},
                stop = stopped(&mut self.stop) => return MainEnd::Stopped(stop),
                why = session.ended() => return MainEnd::Over(why),
                end = &mut end => return match end {
                    LaneEnd::Lost(end) if end.cause == EndCause::AgentWithSession => MainEnd::Over(end.to_string()),
                    LaneEnd::Lost(end) => MainEnd::Lost(end),
                    LaneEnd::Replaced(address, connection) => MainEnd::Replaced(address, connection),
                },
                () = connection.lane_wanted() => data_wanted.notify_one(),
            }
        }
    }

    /// Connects the main lane again. Returns nothing if the session has ended.
    async fn reconnect(
        &mut self,
        serving: &mut Serving,
        redial: &Redial,
        pause: Duration,
    ) -> Result<Option<(SocketAddr, AgentConnection<Kubernetes>)>, Ended> {
        let Serving { session, data_lane, .. } = serving;
        let connected = async {
            sleep(pause).await;
            match timeout(REDIAL, redial.connect()).await {
                Ok(connected) => connected,
                // The agent has given the session up.
                Err(_) => pending().await,
            }
        };
        let (mut connected, mut stop) = (pin!(connected), self.stop.clone());
        tokio::select! {
            never = data_lane.as_mut() => match never {},
            _ = stopped(&mut stop) => {
                self.drain_streams(session.credits(), Duration::ZERO).await;
                return Err(Ended::Stopped);
            }
            why = session.ended() => return Ok(self.over_without_main(session, &why)),
            connected = &mut connected => return Ok(Some(connected)),
            () = sleep(pause + KUBERNETES_ONLY) => {}
        }
        let reached = tokio::select! {
            never = data_lane.as_mut() => match never {},
            why = session.ended() => return Ok(self.over_without_main(session, &why)),
            connected = &mut connected => {
                self.status.connected();
                Ok(connected)
            }
            reached = self.reach(PhaseName::Kubernetes, None) => {
                reached.map(|Reached { address, connection, .. }| (address, connection))
            }
        };
        self.routes.set_attestation(None);
        reached.map(Some)
    }

    /// The session has ended while its main lane was not connected.
    fn over_without_main<T>(&self, session: &AgentSession, why: &str) -> Option<T> {
        self.status.emit(&PodEvent::SessionOver(format!("{why}{}", reset(session))));
        None
    }

    /// The pod's channel ends while the main lane is not connected: the agent learns it from the data lane, if that is, and keeps
    /// the session no longer.
    async fn end_without_main(&self, farewell: Option<Farewell>) {
        let stop = self.stop.borrow().clone();
        if let Some(farewell) = farewell {
            farewell.end_session(stop.map_or("the session is over", |stop| stop.reason)).await;
        }
    }

    /// An agent that ends its connections soon is not connected to in a tight loop. What the network breaks is tried again
    /// at once, or soon if that happens all the time.
    fn pause_after(&mut self, end: &ConnectionEnd, since: Instant, pace: &mut Pace) -> Duration {
        let lasted = since.elapsed();
        match end.cause {
            EndCause::Broken => pace.pause(lasted),
            EndCause::Agent | EndCause::AgentWithSession if lasted < RETRY_MAX => self.backoff.next_pause(),
            EndCause::Agent | EndCause::AgentWithSession => Duration::ZERO,
        }
    }
}

/// What the loss of a connection costs the session's streams: time.
fn waits(session: &AgentSession) -> String {
    match session.credits().open_streams() {
        0 => String::new(),
        1 => "; 1 stream waits".to_owned(),
        streams => format!("; {streams} streams wait"),
    }
}

/// What the end of the session costs.
fn reset(session: &AgentSession) -> String {
    let streams = match session.credits().open_streams() {
        0 => return String::new(),
        1 => "; 1 stream is reset".to_owned(),
        streams => format!("; {streams} streams are reset"),
    };
    match session.streams_of(Lane::Main) {
        0 => streams,
        _ => streams + ", and with the runtime's connection the runtime ends the pod",
    }
}
