//! `doctor`: looks at this node or a pod, and says what to do.

use std::path::PathBuf;

use secure_comms_adaptor::key_source::KeySource;

use super::pod::{find, print_json, recent_events};
use super::screen::{Screen, show};
use crate::api::client::Client;
use crate::api::types::{Launcher, Pod, RuntimeState};
use crate::cli::doctor::{DoctorArgs, ReportFormat};
use crate::cli::setting::Flags;
use crate::doctor::{self, Finding, Node, Places, Report, Seen, SettingsRead};
use crate::settings::{DEFAULT_CONFIG, Env, ServeSettings, ServiceSettings};

/// Looks, and prints what was found. True: nothing is wrong.
///
/// # Errors
/// The flags are invalid, or the output cannot be written.
pub async fn run(args: DoctorArgs, env: Env<'_>) -> anyhow::Result<bool> {
    let service = ServiceSettings::read(args.service.clone(), env)?;
    let node = node(&args, service, env);
    let client = Client::new(&node.socket);
    let mut report = Report::default();
    let (mut findings, service) = doctor::look_at_service(&node).await;
    let pods = if service.answers { ask(&client, &mut findings).await } else { None };
    let seen = Seen { connected: pods.as_deref().map(connected) };
    report.add("service", findings);
    doctor::look_at_node(&node, service, &seen, &mut report).await;
    if let Some(text) = &args.pod {
        report.add("pod", pod(&client, text, pods.is_some()).await);
    }
    match args.output {
        ReportFormat::Json => print_json(&report)?,
        ReportFormat::Text => drop(show(&report.to_text(Screen::of_stdout(env).marks()))?),
    }
    Ok(!report.has_faults())
}

/// Where things are, as far as the service's settings say it.
fn node(args: &DoctorArgs, service: ServiceSettings, env: Env<'_>) -> Node {
    let named = args.config.clone().or_else(|| {
        let variable = env("SECURE_COMMS_CONFIG").filter(|path| !path.is_empty());
        variable.map(PathBuf::from)
    });
    let mut read = SettingsRead {
        is_default: named.is_none(),
        file: named.unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG)),
        ..SettingsRead::default()
    };
    let settings = match ServeSettings::read(Flags::default(), args.config.clone(), env) {
        Ok(settings) => settings,
        Err(error) => {
            read.faults.extend(error.faults().map(str::to_owned));
            return Node { read, socket: service.socket, places: None };
        }
    };
    read.warnings = settings.warnings;
    let kbs = match settings.key_source {
        KeySource::Kbs(kbs) => Some(kbs),
        KeySource::UserData => None,
    };
    let admin = kbs.as_ref().and_then(|kbs| kbs.admin.as_ref());
    read.secrets.extend(admin.map(|admin| admin.key_file.clone()));
    let socket = if service.is_given { service.socket } else { settings.socket };
    let places = Places { store: settings.store, kbs, caa: settings.caa, metrics: settings.metrics_listen };
    Node { read, socket, places: Some(places) }
}

/// What the service says of its parts, and its pods.
async fn ask(client: &Client, findings: &mut Vec<Finding>) -> Option<Vec<Pod>> {
    const CHECK: &str = "service-parts";
    let fix = "look at its log: journalctl -u secure-comms-adaptor";
    let fault =
        |error: &dyn std::fmt::Display| Finding::fault(CHECK, "it answers requests", error.to_string(), fix);
    match client.status().await {
        Ok(status) => findings.extend(status.parts.iter().map(|part| {
            let title = format!("its part {} works", part.name);
            match &part.reason {
                _ if part.works => Finding::ok(CHECK, title),
                reason => {
                    let why = reason.as_deref().unwrap_or("no reason is known");
                    let (found, fix) = why.rsplit_once(": ").unwrap_or((why, fix));
                    Finding::fault(CHECK, title, found, fix)
                }
            }
        })),
        Err(error) => findings.push(fault(&error)),
    }
    client.pods().await.map_err(|error| findings.push(fault(&error))).ok()
}

/// Pods of cloud-api-adaptor whose runtime is connected: each of them has shown how CAA connects.
fn connected(pods: &[Pod]) -> usize {
    let is_connected =
        |pod: &&Pod| pod.launcher == Some(Launcher::Caa) && pod.runtime.state == RuntimeState::Connected;
    pods.iter().filter(is_connected).count()
}

async fn pod(client: &Client, text: &str, service_answers: bool) -> Vec<Finding> {
    const CHECK: &str = "pod-known";
    let title = format!("the service has the pod '{text}'");
    if !service_answers {
        return vec![Finding::not_checked(CHECK, title, "the service does not answer")];
    }
    let fix = "see secure-comms-adaptor pod list";
    match find(client, text).await {
        Err(error) => {
            let text = format!("{error:#}");
            let (found, fix) = text.rsplit_once(": ").unwrap_or((&text, fix));
            vec![Finding::fault(CHECK, title, found, fix)]
        }
        Ok(pod) => {
            let mut findings = vec![Finding::ok(CHECK, format!("{title}: {}", pod.id))];
            match recent_events(client, &pod).await {
                Ok(events) => findings.extend(doctor::look_at_pod(&pod, &events).await),
                Err(error) => {
                    findings.extend(doctor::look_at_pod(&pod, &[]).await);
                    let reason = format!("{error:#}");
                    findings.push(Finding::not_checked("pod-events", "its events can be read", reason));
                }
            }
            findings
        }
    }
}
