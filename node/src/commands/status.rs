//! `status`: how this node's service is, on one screen.

use std::time::SystemTime;

use super::pod::{phase_colour, phase_word, print_json, print_yaml};
use super::screen::{Screen, age, clean, show};
use crate::api::client::Client;
use crate::api::types::{Status, StopCost};
use crate::cli::service::{Format, StatusArgs};
use crate::doctor::Outcome;
use crate::settings::{Env, ServiceSettings};

/// Asks the service, and prints its answer.
///
/// # Errors
/// The flags are invalid, the service does not answer, or the output cannot be written.
pub async fn run(args: StatusArgs, env: Env<'_>) -> anyhow::Result<()> {
    let client = Client::new(ServiceSettings::read(args.service, env)?.socket);
    let status = client.status().await?;
    match args.form.output {
        Format::Json => print_json(&status),
        Format::Yaml => print_yaml(&status),
        Format::Table | Format::Wide => {
            show(&screen_of(&status, Screen::of_stdout(env), SystemTime::now())).map(drop)
        }
    }
}

fn screen_of(status: &Status, screen: Screen, now: SystemTime) -> String {
    let ready = if status.ready { "ready" } else { "not ready" };
    let mut text = format!(
        "secure-comms-adaptor {}: {ready}, up for {}\n\n",
        clean(&status.version),
        age(status.since.into(), now)
    );
    for part in &status.parts {
        let outcome = match &part.reason {
            _ if part.works => Outcome::Ok,
            reason => Outcome::Fault { found: String::new(), fix: reason.clone().unwrap_or_default() },
        };
        text += &format!("{} {}", screen.marks().of(&outcome), clean(&part.name));
        text += &part.reason.as_deref().map(|why| format!(": {}", clean(why))).unwrap_or_default();
        text.push('\n');
    }
    text += &format!("\npods: {}", status.pods);
    let by_phase = status.pods_by_phase.iter();
    let counts: Vec<_> = by_phase
        .map(|(phase, count)| {
            screen.paint(&format!("{count} {}", phase_word(*phase)), Some(phase_colour(*phase)))
        })
        .collect();
    if !counts.is_empty() {
        text += &format!(" ({})", counts.join(", "));
    }
    text + "\n" + &cost(&status.stop_cost) + "\n"
}

/// What a restart of the service would cost now.
fn cost(cost: &StopCost) -> String {
    let count = |count: u64, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {many}")),
    };
    let costs: Vec<_> = [
        count(
            cost.pods_lost,
            "pod that uses it (the runtime ends it)",
            "pods that use it (the runtime ends them)",
        ),
        count(
            cost.pods_at_risk,
            "pod of the API, if a runtime is connected to it",
            "pods of the API, if runtimes are connected to them",
        ),
        count(cost.starts_interrupted, "start, which goes on afterwards", "starts, which go on afterwards"),
    ]
    .into_iter()
    .flatten()
    .collect();
    if costs.is_empty() {
        "a restart of the service would cost nothing now".to_owned()
    } else {
        format!("a restart of the service would cost now: {}", costs.join("; "))
    }
}
