//! The release of a held dial: a Check, a stream, and the end of the dial's handshake.

use super::Machine;
use super::channel::Channel;
use super::effect::Effect;
use super::input::{DialNo, ReleaseFailure, Slot};

/// How far the release of the next dial is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Release {
    Idle,
    Checking,
    CheckLater,
    Opening,
    OpenLater,
    /// A stream is open, and no dial is there for it.
    Opened,
    Finishing(DialNo),
}

impl Machine {
    pub(super) fn checked(&mut self, result: Result<(), ReleaseFailure>, effects: &mut Vec<Effect>) {
        if self.release != Release::Checking {
            return;
        }
        match result {
            Ok(()) => {
                self.release = Release::Opening;
                effects.push(Effect::Open);
            }
            Err(failure) => self.release_failed(failure, Release::CheckLater, effects),
        }
    }

    pub(super) fn opened(&mut self, result: Result<(), ReleaseFailure>, effects: &mut Vec<Effect>) {
        if self.release != Release::Opening {
            return;
        }
        match result {
            Ok(()) => self.release = Release::Opened,
            Err(failure) => self.release_failed(failure, Release::OpenLater, effects),
        }
    }

    fn release_failed(&mut self, failure: ReleaseFailure, later: Release, effects: &mut Vec<Effect>) {
        match failure {
            ReleaseFailure::Again => {
                self.release = later;
                effects.push(Effect::Pause(Slot::Release, self.backoffs.release.failed()));
            }
            ReleaseFailure::Lost => {
                self.release = Release::Idle;
                self.relayed = false;
                self.prepare_later(effects);
            }
        }
    }

    pub(super) fn finished(&mut self, dial: DialNo, proven: bool, effects: &mut Vec<Effect>) {
        if self.release != Release::Finishing(dial) {
            return;
        }
        if proven {
            if let Some(earlier) = self.relay.replace(dial) {
                effects.push(Effect::Cut(earlier));
            }
            self.dials.remove(dial);
            self.backoffs.release.reset();
            self.relayed = true;
            self.release = Release::Idle;
            effects.push(Effect::Relay(dial));
        } else {
            // Nothing was sent on the stream: the next dial gets it.
            self.release = Release::Opened;
            self.forget(dial);
        }
    }

    pub(super) fn release_due(&mut self) {
        if matches!(self.release, Release::CheckLater | Release::OpenLater) {
            self.release = Release::Idle;
        }
    }

    pub(super) fn give_up_release(&mut self, effects: &mut Vec<Effect>) {
        if let Release::Finishing(dial) = self.release {
            self.forget(dial);
        }
        if self.release != Release::Idle {
            self.release = Release::Idle;
            effects.push(Effect::Abort(Slot::Release));
        }
    }

    pub(super) fn settle_release(&mut self, effects: &mut Vec<Effect>) {
        let Channel::Up(vm) = self.channel else {
            self.give_up_release(effects);
            return;
        };
        let next = self.dials.first_to(vm);
        match (self.release, next) {
            (Release::Idle, Some(_)) if self.relayed => {
                self.release = Release::Opening;
                effects.push(Effect::Open);
            }
            (Release::Idle, Some(_)) => {
                self.release = Release::Checking;
                effects.push(Effect::Check);
            }
            (Release::Opened, Some(dial)) => {
                self.release = Release::Finishing(dial);
                effects.push(Effect::Finish(dial));
            }
            (Release::Idle | Release::Finishing(_), _) | (_, Some(_)) => {}
            // All that waited are gone.
            (_, None) => self.give_up_release(effects),
        }
    }
}
