//! The pod's channel: its keys are published, it is started, and it follows the dials to another address.

use std::net::IpAddr;

use super::Machine;
use super::effect::Effect;
use super::input::{Slot, StartFailure};

/// How far the adaptor is with the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Channel {
    /// There is nothing of the pod.
    Unknown,
    /// An earlier process has prepared the pod; it is not served.
    Recorded,
    Preparing,
    PrepareLater,
    Prepared,
    Starting(IpAddr),
    StartLater(IpAddr),
    Up(IpAddr),
    /// The VM at this address will never do.
    Failed(IpAddr),
    Halting,
    Stopping,
}

impl Channel {
    /// Where the pod is started, or was.
    pub(super) fn vm(self) -> Option<IpAddr> {
        match self {
            Self::Starting(vm) | Self::StartLater(vm) | Self::Up(vm) | Self::Failed(vm) => Some(vm),
            _ => None,
        }
    }
}

impl Machine {
    pub(super) fn prepared(&mut self, done: bool, effects: &mut Vec<Effect>) {
        if self.channel != Channel::Preparing {
            return;
        }
        if done {
            self.backoffs.prepare.reset();
            self.channel = Channel::Prepared;
        } else {
            self.prepare_later(effects);
        }
    }

    pub(super) fn prepare_later(&mut self, effects: &mut Vec<Effect>) {
        self.channel = Channel::PrepareLater;
        effects.push(Effect::Pause(Slot::Channel, self.backoffs.prepare.failed()));
    }

    pub(super) fn started(&mut self, result: Result<(), StartFailure>, effects: &mut Vec<Effect>) {
        let Channel::Starting(vm) = self.channel else { return };
        match result {
            Ok(()) => {
                self.backoffs.start.reset();
                self.backoffs.release.reset();
                self.channel = Channel::Up(vm);
            }
            Err(StartFailure::Final) => self.channel = Channel::Failed(vm),
            Err(StartFailure::NotPrepared) => self.prepare_later(effects),
            Err(StartFailure::Again) => {
                self.channel = Channel::StartLater(vm);
                effects.push(Effect::Pause(Slot::Channel, self.backoffs.start.failed()));
            }
        }
    }

    pub(super) fn channel_due(&mut self, effects: &mut Vec<Effect>) {
        match self.channel {
            Channel::PrepareLater => self.prepare(effects),
            Channel::StartLater(vm) => self.start(vm, effects),
            _ => {}
        }
    }

    pub(super) fn prepare(&mut self, effects: &mut Vec<Effect>) {
        self.stale = false;
        self.channel = Channel::Preparing;
        effects.push(Effect::Prepare);
    }

    pub(super) fn start(&mut self, vm: IpAddr, effects: &mut Vec<Effect>) {
        self.channel = Channel::Starting(vm);
        effects.push(Effect::Start(vm));
    }

    pub(super) fn settle_channel(&mut self, effects: &mut Vec<Effect>) {
        match self.channel {
            Channel::Unknown | Channel::Recorded if self.wanted || !self.dials.is_empty() => {
                self.prepare(effects)
            }
            Channel::Preparing | Channel::PrepareLater | Channel::Prepared if self.stale => {
                self.prepare(effects);
            }
            Channel::Prepared => {
                if let Some(vm) = self.dials.first_vm() {
                    self.start(vm, effects);
                }
            }
            Channel::StartLater(_) if self.dials.is_empty() => {
                self.channel = Channel::Prepared;
                effects.push(Effect::Abort(Slot::Channel));
            }
            Channel::Starting(vm) | Channel::StartLater(vm) | Channel::Up(vm) | Channel::Failed(vm)
                if self.is_elsewhere(vm) =>
            {
                self.give_up_release(effects);
                self.relayed = false;
                self.channel = Channel::Halting;
                effects.push(Effect::Halt);
            }
            _ => {}
        }
    }

    /// Whether the pod has to move: nothing uses it here, and all dials are to other addresses.
    fn is_elsewhere(&self, vm: IpAddr) -> bool {
        self.relay.is_none() && self.dials.are_elsewhere(vm)
    }
}
