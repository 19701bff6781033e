//! What can happen to a sandbox.

use std::net::IpAddr;

/// Number of a held dial, in the order of their arrival.
pub(in crate::caa::life) type DialNo = u64;

/// How the start of a pod failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caa::life) enum StartFailure {
    /// Another try may succeed.
    Again,
    /// The VM at this address will never do.
    Final,
    /// The adaptor does not know the pod: it has to be prepared again.
    NotPrepared,
}

/// How a step of a release failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caa::life) enum ReleaseFailure {
    /// Another try may succeed.
    Again,
    /// The adaptor does not serve the pod any more.
    Lost,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::caa::life) enum Input {
    /// Its directory describes a pod that begins or lives.
    Appeared,
    /// What the directory says has changed.
    Changed,
    /// The directory is gone.
    Gone,
    /// Cloud-api-adaptor, or a stranger, has dialled the VM, and waits in its handshake.
    Dialled { dial: DialNo, vm: IpAddr },
    /// The other end has closed a held dial.
    DialClosed(DialNo),
    /// A younger sandbox has the VM's address.
    Superseded,
    /// Another ends the pod, whatever cloud-api-adaptor waits for.
    TakenAway,
    /// The keys are published, and the inbounds listen, or not.
    Prepared(bool),
    /// The Kubernetes phase is up, or not.
    Started(Result<(), StartFailure>),
    /// The pod's channel is suspended.
    Halted,
    /// The kata agent has answered, or not.
    Checked(Result<(), ReleaseFailure>),
    /// A stream to the kata agent is confirmed, or not.
    Opened(Result<(), ReleaseFailure>),
    /// A dial's handshake has ended: it is cloud-api-adaptor's, or it is gone.
    Finished { dial: DialNo, proven: bool },
    /// The relay with this dial has ended.
    RelayEnded(DialNo),
    /// The pod is stopped; whether its keys are deleted is the adaptor's business.
    Stopped,
    /// The pause before the next try of this is over.
    Due(Slot),
    /// The time that [`Effect::Expire`](super::Effect::Expire) gave is over.
    Expired,
}

/// What may be under way at one time: each slot has one operation or pause, and a new one replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::caa::life) enum Slot {
    /// Of the adaptor's pod: prepare, start, halt, stop.
    Channel,
    /// Of a held dial: check, open, finish.
    Release,
}
