//! `pod show`: all that is known of a pod, in sections, as `kubectl describe`.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use tokio::time::timeout;

use super::find::{find, id_of};
use super::list::{launcher_word, phase_colour, runtime_word};
use super::select::word;
use super::{print_json, print_yaml};
use crate::api::client::{Client, ClientError, StreamItem};
use crate::api::types::{Event, EventKind, Launcher, Phase, Pod, RuntimeState};
use crate::cli::service::{Format, PodShowArgs};
use crate::commands::screen::{Colour, NONE, Screen, Table, age, clean, show};

/// Events that are shown: the last ones.
const EVENTS_SHOWN: usize = 20;
/// The service sends what it has kept without a pause; after such a pause there is no more.
const PAUSE: Duration = Duration::from_millis(300);
/// Events that are read at most: as many as the service keeps.
const EVENTS_MAX: usize = 4096;
/// The place before all events that are kept.
const FROM_THE_FIRST: &str = "0-0";
/// Width of the names before values.
const NAMES: usize = 14;

pub(super) async fn run(client: &Client, args: &PodShowArgs, screen: Screen) -> anyhow::Result<()> {
    let pod = find(client, &args.id).await?;
    match args.form.output {
        Format::Json => print_json(&pod),
        Format::Yaml => print_yaml(&pod),
        Format::Table | Format::Wide => {
            let events = recent(client, &pod).await?;
            show(&describe(&pod, &events, screen, SystemTime::now())).map(drop)
        }
    }
}

/// The last events of the pod that the service has kept.
pub(in crate::commands) async fn recent(client: &Client, pod: &Pod) -> anyhow::Result<Vec<Event>> {
    let id = id_of(pod)?;
    let mut reader = client.events(Some(&id), Some(FROM_THE_FIRST)).await?;
    let mut events = Vec::new();
    for _ in 0..EVENTS_MAX {
        match timeout(PAUSE, reader.next()).await {
            Ok(Ok(Some(StreamItem::Event(event)))) => events.push(event),
            // What is not kept any more is not recent.
            Ok(Ok(Some(StreamItem::Lost(_)))) => {}
            // A service that ends now: what was read is worth showing.
            Ok(Ok(None) | Err(ClientError::Lost(_))) | Err(_) => break,
            Ok(Err(error)) => return Err(error.into()),
        }
    }
    let skipped = events.len().saturating_sub(EVENTS_SHOWN);
    Ok(events.split_off(skipped))
}

fn describe(pod: &Pod, events: &[Event], screen: Screen, now: SystemTime) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "{:<NAMES$}{}", format!("{name}:"), if value.is_empty() { NONE } else { value });
    };
    let optional = |text: &Option<String>| clean(text.as_deref().unwrap_or_default());
    line("Name", &optional(&pod.name));
    line("Namespace", &optional(&pod.namespace));
    line("ID", &clean(&pod.id));
    line("Launched by", pod.launcher.map(launcher_word).unwrap_or_default());
    let phase = screen.paint(word(pod.phase), Some(phase_colour(pod.phase)));
    line("Phase", &format!("{phase}, for {}", age(pod.since.into(), now)));
    let created = pod.created.map(|created| format!("{created} ({} ago)", age(created.into(), now)));
    line("Created", &created.unwrap_or_default());
    line("Init-data", &optional(&pod.init_data_digest));
    line("Addresses", &clean(&pod.addresses.join(", ")));
    line("Session", &session(pod));
    line("Runtime", &runtime(pod, now));
    let (next, colour) = next_step(pod);
    line("Next step", &screen.paint(&next, colour));
    text.push_str("Endpoints:\n");
    let mut endpoints = Table::default();
    for endpoint in &pod.endpoints {
        endpoints.row([(endpoint.tunnel.clone(), None), (endpoint.local.clone(), None)]);
    }
    text.push_str(&or_none(endpoints.to_text(screen, "  ")));
    text.push_str("Events:\n");
    text.push_str(&or_none(table_of(events, screen, now)));
    text
}

fn or_none(lines: String) -> String {
    if lines.is_empty() { format!("  {NONE}\n") } else { lines }
}

fn table_of(events: &[Event], screen: Screen, now: SystemTime) -> String {
    if events.is_empty() {
        return String::new();
    }
    let mut table = Table::with_headers(&["AGE", "TYPE", "REASON", "MESSAGE"]);
    for event in events {
        let (kind, colour) = kind(event.kind);
        table.row([
            (age(event.time.into(), now), None),
            (kind.to_owned(), colour),
            (event.reason.clone(), None),
            (event.message.clone(), None),
        ]);
    }
    table.to_text(screen, "  ")
}

pub(super) fn kind(kind: EventKind) -> (&'static str, Option<Colour>) {
    match kind {
        EventKind::Normal => ("Normal", None),
        EventKind::Warning => ("Warning", Some(Colour::Yellow)),
    }
}

fn session(pod: &Pod) -> String {
    let Some(session) = &pod.session else { return String::new() };
    let lanes = if session.lanes.is_empty() { NONE.to_owned() } else { clean(&session.lanes.join(", ")) };
    format!("lanes {lanes}; resumed {} times", session.resumed)
}

fn runtime(pod: &Pod, now: SystemTime) -> String {
    let runtime = &pod.runtime;
    let since = runtime.since.map(|since| format!(", for {}", age(since.into(), now))).unwrap_or_default();
    let reason = runtime.reason.as_deref().map(|reason| format!(": {}", clean(reason))).unwrap_or_default();
    match runtime_word(runtime.state) {
        "" => String::new(),
        word => format!("{word}{since}{reason}"),
    }
}

/// What happens next, and what is wrong with it.
fn next_step(pod: &Pod) -> (String, Option<Colour>) {
    let reason = |otherwise: &str| clean(pod.reason.as_deref().unwrap_or(otherwise));
    let id = clean(&pod.id);
    match pod.phase {
        Phase::NotPrepared => ("the service prepares it when its launcher asks".to_owned(), None),
        Phase::Preparing => {
            let why = pod.reason.as_deref().map(|why| format!(": {}", clean(why))).unwrap_or_default();
            (
                format!("its keys are being published to the KBS{why}"),
                pod.reason.as_ref().map(|_| Colour::Yellow),
            )
        }
        Phase::Prepared => (waits_for(pod.launcher).to_owned(), None),
        Phase::Connecting => {
            let text = format!("connect to its VM: {}", reason("no answer yet"));
            (text, Some(Colour::Yellow))
        }
        Phase::Attesting => {
            let attempt = pod.attempt.filter(|attempt| *attempt > 0);
            let attempt = attempt.map(|attempt| format!(", attempt {attempt}")).unwrap_or_default();
            let why = reason("no answer of the KBS yet");
            (format!("the VM gets its keys from the KBS{attempt}: {why}"), Some(Colour::Yellow))
        }
        Phase::Upgrading => ("the VM has its keys: reconnect for the Kubernetes phase".to_owned(), None),
        Phase::Up => match pod.runtime.state {
            RuntimeState::Held => {
                ("the runtime's connection is let through once the kata agent answers".to_owned(), None)
            }
            RuntimeState::Ended => (
                "the runtime's connection has ended: the pod ends, unless a new one comes soon".to_owned(),
                Some(Colour::Red),
            ),
            RuntimeState::None | RuntimeState::Connected => ("none: the pod can be used".to_owned(), None),
        },
        Phase::Down => (
            format!("reconnect: {}; secure-comms-adaptor doctor --pod {id}", reason("the connection ended")),
            Some(Colour::Red),
        ),
        Phase::Failed => {
            let why = reason("unknown");
            let doctor = format!("secure-comms-adaptor doctor --pod {id}");
            let text = match pod.launcher {
                // It owns the pod: the API refuses to start it. Another agent at its VM stays another one.
                Some(Launcher::Caa) => format!(
                    "it failed: {why}; tried again while cloud-api-adaptor waits, unless another agent answers; {doctor}"
                ),
                _ => format!("none, it failed: {why}; {doctor}, then start it again or stop it"),
            };
            (text, Some(Colour::Red))
        }
        Phase::Ending => (
            format!("delete its keys: {}; the service tries again", reason("under way")),
            Some(Colour::Yellow),
        ),
        Phase::Stopped => ("none: it was stopped".to_owned(), None),
    }
}

fn waits_for(launcher: Option<Launcher>) -> &'static str {
    match launcher {
        Some(Launcher::Caa) => "cloud-api-adaptor connects to its VM, once that boots",
        _ => "its launcher says where its VM is: secure-comms-adaptor pod start",
    }
}

#[cfg(test)]
mod tests {
    use super::super::list::tests::pod;
    use super::*;
    use crate::api::types::Endpoint;

    #[test]
    fn a_failed_pod_of_cloud_api_adaptor_is_not_to_be_started() {
        for (launcher, advised) in [(Launcher::Caa, false), (Launcher::Api, true)] {
            let failed = Pod { phase: Phase::Failed, launcher: Some(launcher), ..pod("3f2a", "web-1") };
            let (text, _) = next_step(&failed);
            assert_eq!(text.contains("start it again"), advised, "{text}");
        }
    }

    #[test]
    fn a_pod_is_described_in_sections() {
        let up = Pod {
            endpoints: vec![Endpoint { tunnel: "KATAAGENT".to_owned(), local: "/run/x".to_owned() }],
            ..pod("3f2a", "web-1\u{7}")
        };
        let event = Event {
            time: SystemTime::UNIX_EPOCH.into(),
            pod: "3f2a".to_owned(),
            namespace: None,
            name: None,
            kind: EventKind::Warning,
            reason: "Down".to_owned(),
            message: "a\nb".to_owned(),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(200);
        let text = describe(&up, &[event], Screen::of_stdout(&|_| None), now);
        let expected = "\
Name:         web-1\\u{7}
Namespace:    default
ID:           3f2a
Launched by:  caa
Phase:        Up, for 3m20s
Created:      1970-01-01T00:00:00.000Z (3m20s ago)
Init-data:    <none>
Addresses:    10.0.0.7:2222
Session:      lanes main, data; resumed 2 times
Runtime:      <none>
Next step:    none: the pod can be used
Endpoints:
  KATAAGENT   /run/x
Events:
  AGE     TYPE      REASON   MESSAGE
  3m20s   Warning   Down     a\\nb
";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_next_step_says_what_is_wrong() {
        let reason = Some("the KBS denies default/pp-3f2a".to_owned());
        for (phase, words) in [
            (Phase::Connecting, "connect to its VM: the KBS denies"),
            (Phase::Attesting, "from the KBS, attempt 3: the KBS denies"),
            (Phase::Down, "reconnect: the KBS denies"),
            (Phase::Failed, "it failed: the KBS denies"),
        ] {
            let pod = Pod { phase, attempt: Some(3), reason: reason.clone(), ..pod("3f2a", "a") };
            assert!(next_step(&pod).0.contains(words), "{:?}", next_step(&pod));
        }
    }
}
