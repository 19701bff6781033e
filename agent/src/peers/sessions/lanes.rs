//! Which connection each lane of a session has.

use std::time::Duration;

use secure_comms_protocol::Lane;
use tokio::time::Instant;

/// The lanes of a session: at most one connection each.
#[derive(Debug)]
pub(super) struct Lanes<C> {
    main: Option<LaneState<C>>,
    data: Option<LaneState<C>>,
    /// When the session was made, or has lost its last connection.
    alone_since: Instant,
}

/// A lane that has or had a connection.
#[derive(Debug)]
struct LaneState<C> {
    /// Id of the connection. Ids grow from login to login.
    id: u64,
    /// The connection, also if it is lost: what it offered is what the next one will offer.
    connection: C,
    /// Since when the lane has no connection.
    lost: Option<Instant>,
}

/// What a new connection of a lane replaces.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Replaced<C> {
    /// Nothing: the lane is new.
    Nothing,
    /// This connection.
    Connection(C),
    /// A connection that was lost this long ago.
    Lost(Duration),
}

impl<C> Lanes<C> {
    /// No connections.
    pub(super) fn new() -> Self {
        Self { main: None, data: None, alone_since: Instant::now() }
    }

    fn slot(&mut self, lane: Lane) -> &mut Option<LaneState<C>> {
        match lane {
            Lane::Main => &mut self.main,
            Lane::Data => &mut self.data,
        }
    }

    fn states(&self) -> impl Iterator<Item = (Lane, &LaneState<C>)> {
        let main = self.main.iter().map(|state| (Lane::Main, state));
        main.chain(self.data.iter().map(|state| (Lane::Data, state)))
    }

    /// The last connection of the lane, if it logged in later than the one with this id. It may be lost.
    pub(super) fn newer(&self, lane: Lane, id: u64) -> Option<&C> {
        let newer = |(own, state): &(Lane, &LaneState<C>)| *own == lane && state.id > id;
        self.states().find(newer).map(|(_, state)| &state.connection)
    }

    /// Sets the connection of a lane.
    pub(super) fn connect(&mut self, lane: Lane, id: u64, connection: C) -> Replaced<C> {
        match self.slot(lane).replace(LaneState { id, connection, lost: None }) {
            None => Replaced::Nothing,
            Some(LaneState { lost: Some(lost), .. }) => Replaced::Lost(lost.elapsed()),
            Some(LaneState { connection, .. }) => Replaced::Connection(connection),
        }
    }

    /// Notes that the connection with this id has ended. Returns its lane and the connection; none if no lane has it.
    pub(super) fn lose(&mut self, id: u64) -> Option<(Lane, &C)> {
        let lane = self.states().find(|(_, state)| state.id == id && state.lost.is_none())?.0;
        if let Some(state) = self.slot(lane) {
            state.lost = Some(Instant::now());
        }
        if self.connected().next().is_none() {
            self.alone_since = Instant::now();
        }
        self.slot(lane).as_ref().map(|state| (lane, &state.connection))
    }

    /// The lanes that are connected, with their connections.
    pub(super) fn connected(&self) -> impl Iterator<Item = (Lane, &C)> {
        self.states().filter(|(_, state)| state.lost.is_none()).map(|(lane, state)| (lane, &state.connection))
    }

    /// The last connection of each lane, lost or not.
    pub(super) fn last(&self) -> impl Iterator<Item = &C> {
        self.states().map(|(_, state)| &state.connection)
    }

    /// Since when no lane is connected; none if one is.
    pub(super) fn alone_since(&self) -> Option<Instant> {
        self.connected().next().is_none().then_some(self.alone_since)
    }

    /// Removes all lanes; returns the connections of those that were connected.
    pub(super) fn take(&mut self) -> Vec<C> {
        let states = [self.main.take(), self.data.take()];
        states
            .into_iter()
            .flatten()
            .filter(|state| state.lost.is_none())
            .map(|state| state.connection)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn connected(lanes: &Lanes<&'static str>) -> Vec<(Lane, &'static str)> {
        lanes.connected().map(|(lane, connection)| (lane, *connection)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_has_one_connection_the_last() {
        let mut lanes = Lanes::new();
        assert_eq!(lanes.connect(Lane::Main, 3, "a"), Replaced::Nothing);
        assert_eq!(lanes.connect(Lane::Data, 4, "b"), Replaced::Nothing);
        assert_eq!(lanes.connect(Lane::Main, 7, "c"), Replaced::Connection("a"));
        assert_eq!(connected(&lanes), [(Lane::Main, "c"), (Lane::Data, "b")]);
        assert_eq!(lanes.lose(3), None, "it was replaced");
        assert_eq!(lanes.lose(7), Some((Lane::Main, &"c")));
        assert_eq!(lanes.lose(7), None, "it is lost already");
        tokio::time::advance(9 * SECOND).await;
        assert_eq!(lanes.connect(Lane::Main, 8, "d"), Replaced::Lost(9 * SECOND));
        assert_eq!(lanes.take(), ["d", "b"]);
        assert_eq!(connected(&lanes), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_is_compared_with_the_last_of_its_lane() {
        let mut lanes = Lanes::new();
        assert_eq!(lanes.newer(Lane::Main, 1), None);
        lanes.connect(Lane::Main, 5, "a");
        lanes.connect(Lane::Data, 9, "b");
        lanes.lose(5);
        assert_eq!(lanes.newer(Lane::Main, 4), Some(&"a"), "also one that is lost");
        assert_eq!(lanes.newer(Lane::Main, 6), None);
        assert_eq!(lanes.newer(Lane::Data, 6), Some(&"b"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_session_is_alone_from_its_last_connection_on() {
        let mut lanes = Lanes::new();
        let made = Instant::now();
        assert_eq!(lanes.alone_since(), Some(made));
        lanes.connect(Lane::Main, 1, "a");
        lanes.connect(Lane::Data, 2, "b");
        tokio::time::advance(SECOND).await;
        lanes.lose(1);
        assert_eq!(lanes.alone_since(), None);
        tokio::time::advance(SECOND).await;
        lanes.lose(2);
        assert_eq!(lanes.alone_since(), Some(made + 2 * SECOND));
        assert_eq!(lanes.last().collect::<Vec<_>>(), [&"a", &"b"], "what they offered is known");
    }
}
