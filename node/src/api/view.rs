//! What is known of pods, in the words of the API.

use secure_comms_adaptor::pod::{PodEvent, PodState, SessionStatus};
use secure_comms_keys::text::one_line;
use secure_comms_protocol::PhaseName;

use super::types;
use crate::pods::{Happening, Launch, Launcher, Orphan, PodView, Runtime, StopCost};

/// Longest text of a pod or an event, in bytes.
const TEXT_MAX: usize = 2000;

impl From<Launcher> for types::Launcher {
    fn from(launcher: Launcher) -> Self {
        match launcher {
            Launcher::Caa => Self::Caa,
            Launcher::Api => Self::Api,
        }
    }
}

impl From<&PodState> for types::Phase {
    fn from(state: &PodState) -> Self {
        match state {
            PodState::NotPrepared => Self::NotPrepared,
            PodState::Preparing => Self::Preparing,
            PodState::Prepared => Self::Prepared,
            PodState::Connecting { .. } => Self::Connecting,
            PodState::Attesting { .. } => Self::Attesting,
            PodState::Upgrading => Self::Upgrading,
            PodState::Up { .. } => Self::Up,
            PodState::Down { .. } => Self::Down,
            PodState::Failed { .. } => Self::Failed,
            PodState::Ending { .. } => Self::Ending,
            PodState::Stopped => Self::Stopped,
        }
    }
}

impl From<PodView> for types::Pod {
    fn from(pod: PodView) -> Self {
        let PodView { id, launch, snapshot, runtime, obstacle } = pod;
        let (reason, attempt, instance) = match &snapshot.state {
            PodState::Connecting { last_error } | PodState::Ending { last_error } => {
                (last_error.as_deref(), None, None)
            }
            PodState::Attesting { attempt, last_error } => (last_error.as_deref(), Some(*attempt), None),
            PodState::Up { instance } => (None, None, Some(line(instance))),
            PodState::Down { reason } | PodState::Failed { reason } => (Some(&**reason), None, None),
            _ => (None, None, None),
        };
        let endpoints = snapshot.endpoints.iter().map(|endpoint| types::Endpoint {
            tunnel: endpoint.name.to_string(),
            local: endpoint.local.clone(),
        });
        Self {
            id: id.to_string(),
            launcher: launch.launcher.map(Into::into),
            namespace: namespace(&launch),
            name: name(&launch),
            phase: (&snapshot.state).into(),
            reason: reason.or(obstacle.as_deref()).map(line),
            attempt,
            instance,
            since: snapshot.since.into(),
            created: launch.created.map(Into::into),
            addresses: snapshot.addresses.iter().map(ToString::to_string).collect(),
            endpoints: endpoints.collect(),
            session: snapshot.session.map(Into::into),
            runtime: runtime.into(),
            init_data_digest: snapshot.init_data.map(|digest| digest.to_string()),
        }
    }
}

impl From<SessionStatus> for types::Session {
    fn from(session: SessionStatus) -> Self {
        let lanes = session.lanes.iter().map(ToString::to_string).collect();
        Self { lanes, resumed: session.resumed }
    }
}

impl From<Runtime> for types::Runtime {
    fn from(runtime: Runtime) -> Self {
        let (state, since, reason) = match runtime {
            Runtime::None => (types::RuntimeState::None, None, None),
            Runtime::Held { since } => (types::RuntimeState::Held, Some(since), None),
            Runtime::Connected { since } => (types::RuntimeState::Connected, Some(since), None),
            Runtime::Ended { since, reason } => {
                (types::RuntimeState::Ended, Some(since), Some(line(&reason)))
            }
        };
        Self { state, since: since.map(Into::into), reason }
    }
}

impl From<Orphan> for types::Orphan {
    fn from(orphan: Orphan) -> Self {
        Self {
            id: orphan.id.to_string(),
            launcher: orphan.launch.launcher.map(Into::into),
            namespace: namespace(&orphan.launch),
            name: name(&orphan.launch),
            since: orphan.since.into(),
            reason: orphan.reason.as_str().to_owned(),
            message: line(&orphan.reason.to_string()),
        }
    }
}

impl From<StopCost> for types::StopCost {
    fn from(cost: StopCost) -> Self {
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        Self {
            pods_lost: count(cost.connected),
            pods_at_risk: count(cost.up),
            starts_interrupted: count(cost.starting),
        }
    }
}

/// The event, of a pod that was launched so.
pub(super) fn event(happening: &Happening, launch: Option<&Launch>) -> types::Event {
    let (kind, reason) = reason(&happening.event);
    types::Event {
        time: happening.at.into(),
        pod: happening.pod.to_string(),
        namespace: launch.and_then(namespace),
        name: launch.and_then(name),
        kind,
        reason: reason.to_owned(),
        message: line(&happening.event.to_string()),
    }
}

/// docs/operations/API.md lists the words.
fn reason(event: &PodEvent) -> (types::EventKind, &'static str) {
    use types::EventKind::{Normal, Warning};
    match event {
        PodEvent::Attesting(_) => (Normal, "Attesting"),
        PodEvent::Keys(keys) if keys.error.is_some() => (Warning, "KeysFailed"),
        PodEvent::Keys(_) => (Normal, "KeysReceived"),
        PodEvent::Upgrade(_) => (Normal, "Attested"),
        PodEvent::Up(_) => (Normal, "Up"),
        PodEvent::Resumed { .. } => (Normal, "Resumed"),
        PodEvent::Down(PhaseName::Kubernetes, _) => (Warning, "Down"),
        PodEvent::Down(PhaseName::Attestation, _) => (Normal, "AttestationEnded"),
        PodEvent::SessionOver(_) => (Warning, "SessionOver"),
        PodEvent::ConnectFailed(_) => (Warning, "ConnectFailed"),
        PodEvent::TunnelMismatch(_) => (Warning, "TunnelMismatch"),
        PodEvent::VmLog(line) if line.is_warning => (Warning, "VmLog"),
        PodEvent::VmLog(_) => (Normal, "VmLog"),
        PodEvent::Stopped => (Normal, "Stopped"),
        PodEvent::Waiting { .. } => (Normal, "Waiting"),
        PodEvent::Published => (Normal, "Published"),
        PodEvent::Withdrawn => (Normal, "Withdrawn"),
        PodEvent::WithdrawFailed(_) => (Warning, "WithdrawFailed"),
        PodEvent::InitDataMismatch(_) => (Warning, "InitDataMismatch"),
        PodEvent::PublishedAgain => (Normal, "PublishedAgain"),
        PodEvent::PublishFailed(_) => (Warning, "PublishFailed"),
        PodEvent::DeleteFailed(_) => (Warning, "DeleteFailed"),
        PodEvent::Deleted => (Normal, "Deleted"),
        _ => (Normal, "Other"),
    }
}

fn namespace(launch: &Launch) -> Option<String> {
    launch.name.as_ref().map(|name| name.namespace().to_owned())
}

fn name(launch: &Launch) -> Option<String> {
    launch.name.as_ref().map(|name| name.name().to_owned())
}

/// Peers wrote parts of it.
fn line(text: &str) -> String {
    one_line(text, TEXT_MAX)
}
