//! What a sandbox's machine can ask for.

use std::net::IpAddr;
use std::time::Duration;

use super::input::{DialNo, Slot};

/// Why a pod is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::caa::life) enum Cause {
    /// No dial came in the time for a start.
    NeverDialled,
    /// No dial came after a restart of this service.
    NotDialledAgain,
    /// The last dial was closed before the pod could be used.
    DialClosed,
    /// The relay has ended.
    RelayEnded,
    /// The directory is gone.
    DirectoryGone,
    /// A younger sandbox has the VM's address.
    Superseded,
    /// Another has ended it.
    TakenAway,
}

/// How the runtime's connection is, for viewers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::caa::life) enum Connection {
    None,
    Held,
    Connected,
    Ended,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caa::life) enum Effect {
    /// Publish the keys.
    Prepare,
    /// Start the pod at this address, or wait until a start there is up.
    Start(IpAddr),
    /// Suspend the pod's channel: it has to be started elsewhere.
    Halt,
    /// Stop the pod and delete its keys.
    Stop(Cause),
    /// Ask the kata agent whether it answers.
    Check,
    /// Open a stream to the kata agent.
    Open,
    /// End the handshake of this dial.
    Finish(DialNo),
    /// Relay between this dial and the open stream.
    Relay(DialNo),
    /// End the relay with this dial.
    Cut(DialNo),
    /// Close this dial: others wait, and there is no room for more.
    Drop(DialNo),
    /// Keep this dial open, without use: it would dial again.
    Park(DialNo),
    /// Give up what the slot has under way, and what it has opened.
    Abort(Slot),
    /// Give [`Input::Due`](super::Input::Due) after this time.
    Pause(Slot, Duration),
    /// Give [`Input::Expired`](super::Input::Expired) after this time, unless another order comes; `None`: never.
    Expire(Option<Duration>),
    /// Show the connection like this.
    Show(Connection),
    /// Nothing of the sandbox is left. Given again by each input that does not change that.
    Ended,
}
