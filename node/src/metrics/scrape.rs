//! The pods as they are now.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use secure_comms_adaptor::Traffic;
use secure_comms_adaptor::pod::PodState;

use crate::pods::{Launcher, PodView, Runtime};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
    launcher: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InDirection {
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

/// One pod. Its series ends with it.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OnePod {
    pod: String,
    namespace: String,
    name: String,
    launcher: &'static str,
}

/// All phases, so that a series does not come and go.
const PHASES: [&str; 11] = [
    "not-prepared",
    "preparing",
    "prepared",
    "connecting",
    "attesting",
    "upgrading",
    "up",
    "down",
    "failed",
    "ending",
    "stopped",
];
const RUNTIMES: [&str; 4] = ["none", "held", "connected", "ended"];

/// The word for a state of a pod's channel, as the API has it.
pub(crate) fn phase(state: &PodState) -> &'static str {
    match state {
        PodState::NotPrepared => "not-prepared",
        PodState::Preparing => "preparing",
        PodState::Prepared => "prepared",
        PodState::Connecting { .. } => "connecting",
        PodState::Attesting { .. } => "attesting",
        PodState::Upgrading => "upgrading",
        PodState::Up { .. } => "up",
        PodState::Down { .. } => "down",
        PodState::Failed { .. } => "failed",
        PodState::Ending { .. } => "ending",
        PodState::Stopped => "stopped",
    }
}

fn launcher(pod: &PodView) -> &'static str {
    pod.launch.launcher.map_or("other", Launcher::as_str)
}

/// What the streams of all pods have moved, and the memory that they hold.
pub(super) fn streams(traffic: Traffic, memory: usize) -> Registry {
    let mut registry = Registry::with_prefix("secure_comms");
    let moved = Family::<InDirection, Counter>::default();
    for (direction, bytes) in [("to_vm", traffic.sent), ("from_vm", traffic.received)] {
        moved.get_or_create(&InDirection { direction }).inc_by(bytes);
    }
    registry.register("stream_bytes", "Bytes that the streams of all pods have moved", moved);
    let memory = ConstGauge::new(i64::try_from(memory).unwrap_or(i64::MAX));
    registry.register(
        "stream_memory_bytes",
        "Memory that the streams of all pods hold for slow readers",
        memory,
    );
    registry
}

pub(super) fn pods(all: &[PodView], each_pod: bool) -> Registry {
    let mut registry = Registry::with_prefix("secure_comms");
    let by_phase = Family::<InPhase, Gauge>::default();
    let runtimes = Family::<InState, Gauge>::default();
    for launcher in [Launcher::Caa, Launcher::Api] {
        for phase in PHASES {
            drop(by_phase.get_or_create(&InPhase { phase, launcher: launcher.as_str() }));
        }
    }
    for state in RUNTIMES {
        drop(runtimes.get_or_create(&InState { state }));
    }
    for pod in all {
        by_phase.get_or_create(&InPhase { phase: phase(&pod.snapshot.state), launcher: launcher(pod) }).inc();
        let state = match pod.runtime {
            Runtime::None => "none",
            Runtime::Held { .. } => "held",
            Runtime::Connected { .. } => "connected",
            Runtime::Ended { .. } => "ended",
        };
        runtimes.get_or_create(&InState { state }).inc();
    }
    registry.register(
        "pods",
        "Pods that are served, by the phase of their channel and by their launcher",
        by_phase,
    );
    registry.register(
        "runtime_connections",
        "Pods, by the runtime's connection to their kata agent",
        runtimes,
    );
    if each_pod {
        let up = Family::<OnePod, Gauge>::default();
        for pod in all {
            let (namespace, name) = match &pod.launch.name {
                Some(name) => (name.namespace().to_owned(), name.name().to_owned()),
                None => Default::default(),
            };
            let labels = OnePod { pod: pod.id.to_string(), namespace, name, launcher: launcher(pod) };
            up.get_or_create(&labels).set(i64::from(matches!(pod.snapshot.state, PodState::Up { .. })));
        }
        registry.register("pod_up", "Whether the Kubernetes phase of the pod is up", up);
    }
    registry
}
