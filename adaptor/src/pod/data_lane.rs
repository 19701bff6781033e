//! The data lane of a session: all tunnels but the kata agent's, on a connection of their own, so that their bytes never
//! stand before a request of the runtime.
//!
//! The lane is connected when a stream wants it, to where the main lane is, and closed when it was idle for a while. It
//! has a failover of its own. Streams that wait for it go on over the main lane if it can't be had.

use std::convert::Infallible;
use std::future::{pending, ready};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use secure_comms_protocol::control::KnownStreams;
use secure_comms_protocol::{Control, Kubernetes, Lane};
use secure_comms_tunnel::Backoff;
use secure_comms_tunnel::flow::LaneNumber;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, interval, sleep};

use super::failover::{LaneEnd, await_lane_end, failover_reason, is_lane_silent};
use super::plan::{LaneLimits, Plan};
use super::redial::{Pace, Redial};
use super::status::StatusReporter;
use crate::transport::agent_connection::{AgentConnection, EndCause, Farewell, Joined, Joining, Liveness};
use crate::transport::ssh::AgentSession;

/// The time of failed attempts after which streams that wait for the lane go on over the main one. A connection that is
/// silent for this long counts as lost: its streams could not go on elsewhere before.
const FALL_BACK: Duration = Duration::from_secs(3);
/// How often it is checked, within the time after which the lane is closed, that no stream needs it.
const IDLE_CHECKS: u32 = 12;
/// The shortest interval at which a silence is looked at.
const SILENCE_CHECK: Duration = Duration::from_millis(100);

/// The connection of the main lane.
#[derive(Clone, Debug)]
pub(super) struct MainLane {
    pub(super) address: SocketAddr,
    pub(super) number: LaneNumber,
    pub(super) liveness: Liveness,
}

/// The task of the lane.
pub(super) struct DataLane {
    plan: Plan,
    session: AgentSession,
    /// None while the main lane is not connected.
    main: watch::Receiver<Option<MainLane>>,
    wanted: Arc<Notify>,
    /// The connection, while there is one, for the end of the session.
    farewell: watch::Sender<Option<Farewell>>,
    status: StatusReporter,
    backoff: Backoff,
    pace: Pace,
}

/// How a connection of the lane ended.
enum End {
    Idle,
    Lost(EndCause),
    Replaced(SocketAddr, Box<AgentConnection<Kubernetes>>),
}

impl DataLane {
    pub(super) fn new(
        plan: Plan,
        session: AgentSession,
        main: watch::Receiver<Option<MainLane>>,
        status: StatusReporter,
    ) -> Self {
        Self {
            plan,
            session,
            main,
            wanted: Arc::default(),
            farewell: watch::Sender::default(),
            status,
            backoff: Backoff::default(),
            pace: Pace::default(),
        }
    }

    /// Wakes the lane because the agent wants it.
    pub(super) fn wanted(&self) -> Arc<Notify> {
        Arc::clone(&self.wanted)
    }

    /// The last word on the lane's connection; none while it has none.
    pub(super) fn farewell(&self) -> watch::Receiver<Option<Farewell>> {
        self.farewell.subscribe()
    }

    /// Never returns; dropping the future cuts the lane.
    pub(super) async fn run(mut self) -> Infallible {
        loop {
            tokio::select! {
                _ = self.session.lane_wanted() => {}
                () = self.wanted.notified() => {}
            }
            self.serve().await;
        }
    }

    /// Serves the lane until no stream needs it.
    async fn serve(&mut self) {
        let (mut replacement, mut cut) = (None, None);
        loop {
            let (address, connection) = match replacement.take() {
                Some(connected) => connected,
                None => self.connect().await,
            };
            if let Some(why) = self.fault(&connection) {
                tracing::debug!("pod {}: lane data: {why}", self.plan.id);
                connection.close(&why).await;
                self.backoff.pause().await;
                if self.session.streams_of(Lane::Data) == 0 {
                    return;
                }
                continue;
            }
            let since = Instant::now();
            self.farewell.send_replace(Some(connection.farewell()));
            let end = self.serve_connection(address, &connection, cut).await;
            let heard = Instant::now() - connection.liveness().unanswered().unwrap_or_default();
            self.status.lane(Lane::Data, false);
            // An idle one says the last word itself, unless the session ends before.
            if !matches!(end, End::Idle) {
                self.farewell.send_replace(None);
            }
            match end {
                End::Idle => {
                    // Until the agent has ended it, the connection serves the streams that cross the bye.
                    connection.close("no stream needs the lane").await;
                    self.farewell.send_replace(None);
                    // One may have got onto the lane at the last moment.
                    if self.session.streams_of(Lane::Data) == 0 {
                        return;
                    }
                }
                // What the network does is no reason to let the streams wait for longer.
                End::Lost(EndCause::Broken) => sleep(self.pace.pause(since.elapsed())).await,
                End::Lost(_) if since.elapsed() < FALL_BACK => self.backoff.pause().await,
                End::Lost(_) => self.backoff.reset(),
                End::Replaced(address, connection) => replacement = Some((address, *connection)),
            }
            cut = Some(heard);
        }
    }

    /// Why a new connection can't be the lane.
    fn fault(&self, connection: &AgentConnection<Kubernetes>) -> Option<String> {
        if connection.session() != Some(&Joined { id: self.session.id().clone(), resumed: true }) {
            return Some("this is another session".to_owned());
        }
        self.plan.expected.check(connection.agent()).err().map(|unexpected| unexpected.to_string())
    }

    fn redial(&self, to: &MainLane) -> Redial {
        let joining = Joining { lane: Lane::Data, session: Some(self.session.id().clone()) };
        Redial::new(self.plan.at(to.address), joining, to.address, to.liveness.round_trip())
    }

    /// Connects to where the main lane is.
    async fn connect(&self) -> (SocketAddr, AgentConnection<Kubernetes>) {
        let (mut main, mut fall_back) = (self.main.clone(), pin!(self.fall_back()));
        loop {
            let Some(to) = main.wait_for(Option::is_some).await.ok().and_then(|main| main.clone()) else {
                // The session is over, and drops this future.
                return pending().await;
            };
            let redial = self.redial(&to);
            tokio::select! {
                connected = redial.connect() => return connected,
                () = until_elsewhere(&mut main, to.address) => {}
                never = &mut fall_back => match never {},
            }
        }
    }

    /// Lets the streams that wait for the lane go on over the main one, after a while in which that answers: they stay there
    /// until they end. While the main lane is silent, the network carries neither, and they wait.
    async fn fall_back(&self) -> Infallible {
        let mut main = self.main.clone();
        loop {
            let on = main.borrow_and_update().clone();
            if let Some(on) = on {
                tokio::select! {
                    Ok(()) = main.changed() => continue,
                    () = until_answering(&on.liveness, self.plan.lane_limits) => {}
                }
                let streams = self.session.resume(Lane::Data, on.number).await;
                if streams > 0 {
                    self.status.log_data_lane(
                        true,
                        format_args!("no connection; {streams} streams go on over lane main"),
                    );
                }
            }
            if main.changed().await.is_err() {
                // The session is over, and drops this future.
                return pending().await;
            }
        }
    }

    async fn serve_connection(
        &self,
        address: SocketAddr,
        connection: &AgentConnection<Kubernetes>,
        cut: Option<Instant>,
    ) -> End {
        let (session, status) = (&self.session, &self.status);
        let number = connection.join(session, Lane::Data);
        self.status.lane(Lane::Data, true);
        connection.say(Control::Streams(KnownStreams { known: session.known() }));
        // The streams that wanted the lane have it.
        tokio::select! {
            biased;
            _ = session.lane_wanted() => {}
            () = self.wanted.notified() => {}
            () = ready(()) => {}
        }
        let resume = async {
            let streams = session.resume(Lane::Data, number).await;
            if let Some(cut) = cut.filter(|_| streams > 0) {
                let after = cut.elapsed().as_secs_f32();
                status.log_data_lane(
                    false,
                    format_args!("connected again after {after:.1} s; {streams} streams go on"),
                );
            }
            pending::<Infallible>().await
        };
        let liveness = connection.liveness();
        let mut main = self.main.clone();
        let (mut resume, mut idle) = (pin!(resume), pin!(until_idle(session, self.plan.lane_limits.idle)));
        let mut to = MainLane { address, number, liveness: liveness.clone() };
        let limits = self.plan.lane_limits;
        loop {
            to = main.borrow_and_update().clone().unwrap_or(to);
            let traffic = || (session.streams_of(Lane::Data) > 0).then(|| self.status.account().traffic());
            tokio::select! {
                never = &mut resume => match never {},
                () = &mut idle => return End::Idle,
                end = await_lane_end(connection, limits, traffic, || self.redial(&to)) => match end {
                    LaneEnd::Lost(end) => {
                        if end.cause == EndCause::AgentWithSession {
                            session.end(&end.to_string());
                        }
                        status.log_data_lane(true, format_args!("{end}"));
                        return End::Lost(end.cause);
                    }
                    LaneEnd::Replaced(next, connection) => {
                        status.log_data_lane(true, format_args!("{}", failover_reason(address, next)));
                        return End::Replaced(next, connection);
                    }
                },
                () = until_silent_for_long(&liveness) => {
                    let silence = FALL_BACK.as_secs();
                    status.log_data_lane(true, format_args!("the agent was silent for {silence} s"));
                    return End::Lost(EndCause::Broken);
                }
                // The failover goes to where the main lane is.
                () = until_elsewhere(&mut main, to.address) => {}
            }
        }
    }
}

/// Waits until the main lane is connected to another address.
async fn until_elsewhere(main: &mut watch::Receiver<Option<MainLane>>, address: SocketAddr) {
    let is_elsewhere = |main: &Option<MainLane>| main.as_ref().is_some_and(|main| main.address != address);
    if main.wait_for(is_elsewhere).await.is_err() {
        // The session is over, and drops this future.
        pending().await
    }
}

/// Waits until nothing has come for [`FALL_BACK`] although the agent owes an answer.
async fn until_silent_for_long(liveness: &Liveness) {
    loop {
        let silence = liveness.unanswered().unwrap_or_default();
        match FALL_BACK.checked_sub(silence).filter(|left| !left.is_zero()) {
            Some(left) => sleep(left.max(SILENCE_CHECK)).await,
            None => return,
        }
    }
}

/// Waits until a connection has answered for [`FALL_BACK`].
async fn until_answering(liveness: &Liveness, limits: LaneLimits) {
    let mut silent = Instant::now();
    while silent.elapsed() < FALL_BACK {
        // Otherwise an idle connection would owe no answer.
        liveness.probe();
        sleep(SILENCE_CHECK).await;
        if is_lane_silent(liveness, limits) {
            silent = Instant::now();
        }
    }
}

/// Waits until no stream has used the lane for this long.
async fn until_idle(session: &AgentSession, idle: Duration) {
    let (mut checks, mut used) = (interval(idle / IDLE_CHECKS), Instant::now());
    while used.elapsed() < idle {
        checks.tick().await;
        if session.streams_of(Lane::Data) > 0 {
            used = Instant::now();
        }
    }
}
