//! `doctor`: what is wrong with this node or a pod, and what to do about it.
//!
//! In: where things are ([`Node`]), and what the service says of itself. Out: a [`Report`]: groups of [`Finding`]s, each with
//! a mark and, where something is wrong, a fix. Each check is a function that looks at one thing. Doctor changes nothing but a
//! probe file in the store and a probe resource at the KBS, which it deletes. Nothing secret gets into a finding.

mod caa;
mod clock;
mod counters;
mod kbs;
mod pod;
mod processes;
mod report;
mod service;
mod settings;
mod store;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use secure_comms_adaptor::kbs::KbsSettings;

use self::processes::Processes;
use crate::api::types::{Event, Pod};
use crate::caa::CaaSettings;
use crate::caa::rules::RulesSettings;

pub use self::caa::Seen;
pub use self::kbs::PROBE;
pub use self::report::{Finding, Group, Marks, Outcome, Report};

/// How the settings of the service were read.
#[derive(Clone, Debug, Default)]
pub struct SettingsRead {
    /// The settings' file.
    pub file: PathBuf,
    /// Whether it is the default one, which need not be there.
    pub is_default: bool,
    /// The faults of the settings, one a line.
    pub faults: Vec<String>,
    /// What is valid and probably not meant, one a line.
    pub warnings: Vec<String>,
    /// Files with secrets that the settings name.
    pub secrets: Vec<PathBuf>,
}

/// Where the parts of a node's service are.
#[derive(Clone, Debug)]
pub struct Node {
    /// How that was found out.
    pub read: SettingsRead,
    /// The API's socket.
    pub socket: PathBuf,
    /// The rest; `None`: the settings cannot be read.
    pub places: Option<Places>,
}

/// What valid settings say.
#[derive(Clone, Debug)]
pub struct Places {
    /// Directory of the key store.
    pub store: PathBuf,
    /// The KBS; `None`: the VMs have their keys from user data.
    pub kbs: Option<KbsSettings>,
    /// The way in of cloud-api-adaptor; `None`: off.
    pub caa: Option<CaaSettings>,
    /// Where the service's counters are read; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
}

/// The service's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Whether it takes connections.
    pub answers: bool,
    /// Its number; `None`: unknown, as where it is in another namespace of process numbers.
    pub pid: Option<u32>,
}

/// Looks at the service: whether it runs, and whether it has what it needs.
pub async fn look_at_service(node: &Node) -> (Vec<Finding>, Service) {
    let processes = Processes::of("/proc");
    let (reachable, service) = service::reachable(&node.socket).await;
    let files = service.pid.map(|pid| service::files(&processes, pid));
    (Vec::from_iter([Some(reachable), files].into_iter().flatten()), service)
}

/// Looks at the node: all but the service itself.
pub async fn look_at_node(node: &Node, service: Service, seen: &Seen, report: &mut Report) {
    let processes = Processes::of("/proc");
    let mut findings = settings::check(&node.read);
    if node.places.is_none() {
        let rest = "the store, the KBS and cloud-api-adaptor";
        findings.push(Finding::not_checked("settings-rest", rest, "the settings do not say where they are"));
    }
    report.add("settings", findings);
    let Some(places) = &node.places else { return };
    report.add("store", store::check(&places.store));
    if let Some(kbs) = &places.kbs {
        report.add("kbs", kbs::check(kbs).await);
    }
    report.add("clock", vec![clock::check(&processes)]);
    if let Some(caa) = &places.caa {
        let findings = look_at_caa(caa, places.metrics, &processes, service, seen).await;
        report.add("cloud-api-adaptor", findings);
    }
}

/// Whether a socket listens at a TCP port of this network namespace.
///
/// # Errors
/// The kernel's table cannot be read.
pub fn something_listens(port: u16) -> io::Result<bool> {
    Ok(!Processes::of("/proc").listeners(port)?.is_empty())
}

/// Looks at a pod, with its last events.
pub async fn look_at_pod(pod: &Pod, events: &[Event]) -> Vec<Finding> {
    pod::check(pod, events).await
}

async fn look_at_caa(
    caa: &CaaSettings,
    metrics: Option<SocketAddr>,
    processes: &Processes,
    service: Service,
    seen: &Seen,
) -> Vec<Finding> {
    let ports = RulesSettings { forwarder_port: caa.forwarder_port, listen_port: caa.listen_port };
    let mut findings = self::caa::rules(ports).await;
    findings.push(self::service::port(processes, caa.listen_port, service));
    let unix = Path::new("/proc/net/unix");
    findings.push(self::caa::directory(&caa.pods_directory, caa.certificates.is_some(), unix));
    findings.extend(caa.certificates.as_deref().map(self::caa::certificates));
    let refused = match metrics {
        _ if !service.answers => Err("the service does not run".to_owned()),
        None => Err("the service has no counters: metrics-listen is off".to_owned()),
        Some(listen) => counters::refused_dials(listen).await,
    };
    findings.extend(self::caa::observed(refused.as_ref().map_err(String::as_str), seen));
    findings.push(self::caa::network(processes));
    findings
}
