//! The time for which a pod without a connection stays.

use std::time::Duration;

use super::effect::{Cause, Effect};

/// What a pod without a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Expiry {
    /// Its first dial.
    FirstDial,
    /// Another dial.
    NextDial(Cause),
}

/// Times that the settings give.
#[derive(Clone, Copy, Debug)]
pub(in crate::caa::life) struct Times {
    /// For the next dial.
    pub(in crate::caa::life) grace: Duration,
    /// For the first one.
    pub(in crate::caa::life) first_dial: Duration,
}

/// The end of a pod that is in use no more.
#[derive(Clone, Debug)]
pub(super) struct Grace {
    times: Times,
    /// What the pod has seen last, which ends it unless a dial comes.
    pub(super) last: Expiry,
    pub(super) armed: Option<Expiry>,
}

impl Grace {
    pub(super) fn new(times: Times, last: Expiry) -> Self {
        Self { times, last, armed: None }
    }

    /// The change of the timer, if it has to change. `waits`: the pod is served, and has no connection.
    pub(super) fn settle(&mut self, waits: bool) -> Option<Effect> {
        let expiry = waits.then_some(self.last);
        if expiry == self.armed {
            return None;
        }
        self.armed = expiry;
        Some(Effect::Expire(expiry.map(|expiry| match expiry {
            Expiry::FirstDial => self.times.first_dial,
            Expiry::NextDial(_) => self.times.grace,
        })))
    }

    /// The time is over: why the pod is ended, unless a dial came.
    pub(super) fn expire(&mut self) -> Option<Cause> {
        Some(match self.armed.take()? {
            Expiry::FirstDial => Cause::NeverDialled,
            Expiry::NextDial(cause) => cause,
        })
    }
}
