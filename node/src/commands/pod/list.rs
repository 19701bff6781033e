//! `pod list`: a table as kubectl's.

use std::time::SystemTime;

use super::select::{Selector, word};
use super::{print_json, print_yaml};
use crate::api::client::Client;
use crate::api::types::{Launcher, Phase, Pod, PodList, RuntimeState};
use crate::cli::service::{Format, PodListArgs};
use crate::commands::screen::{Colour, Screen, Table, age, note, show};
use crate::settings::UsageError;

/// Digits of an id that are shown: as many as of a container's.
const ID_SHOWN: usize = 12;

pub(super) async fn run(client: &Client, args: PodListArgs, screen: Screen) -> anyhow::Result<()> {
    let selector: Selector = match &args.phase {
        Some(text) => text.parse().map_err(|fault| UsageError::of_value("--phase", text, fault))?,
        None => Selector::default(),
    };
    let namespace = args.namespace.as_deref();
    let wanted = |pod: &Pod| namespace.is_none_or(|wanted| pod.namespace.as_deref() == Some(wanted));
    let mut items = client.pods().await?;
    items.retain(|pod| wanted(pod) && selector.takes(pod));
    sort(&mut items);
    match args.form.output {
        Format::Json => print_json(&PodList { items }),
        Format::Yaml => print_yaml(&PodList { items }),
        _ if items.is_empty() => {
            note("no pods found");
            Ok(())
        }
        format => {
            let table = table(&items, format == Format::Wide, !args.no_headers, SystemTime::now());
            show(&table.to_text(screen, "")).map(drop)
        }
    }
}

/// By namespace and name, as kubectl; pods without a name come last, by their ids.
fn sort(pods: &mut [Pod]) {
    let key = |pod: &Pod| (pod.name.is_none(), pod.namespace.clone(), pod.name.clone(), pod.id.clone());
    pods.sort_by_cached_key(key);
}

fn table(pods: &[Pod], wide: bool, headers: bool, now: SystemTime) -> Table {
    let mut columns = vec!["NAMESPACE", "NAME", "ID", "PHASE", "AGE"];
    if wide {
        columns.extend(["ADDRESS", "LANES", "RESUMES", "RUNTIME", "LAUNCHER"]);
    }
    let mut table = if headers { Table::with_headers(&columns) } else { Table::default() };
    let digits = digits(pods);
    for pod in pods {
        let colour = phase_colour(pod.phase);
        let mut cells = vec![
            (pod.namespace.clone().unwrap_or_default(), None),
            (pod.name.clone().unwrap_or_default(), None),
            (first(&pod.id, digits).to_owned(), None),
            (word(pod.phase).to_owned(), Some(colour)),
            (pod.created.map(|created| age(created.into(), now)).unwrap_or_default(), None),
        ];
        if wide {
            cells.extend(wide_cells(pod).map(|text| (text, None)));
        }
        table.row(cells);
    }
    table
}

fn wide_cells(pod: &Pod) -> [String; 5] {
    let session = pod.session.as_ref();
    [
        pod.addresses.join(","),
        session.map(|session| session.lanes.join(",")).unwrap_or_default(),
        session.map(|session| session.resumed.to_string()).unwrap_or_default(),
        runtime_word(pod.runtime.state).to_owned(),
        pod.launcher.map(|launcher| launcher_word(launcher).to_owned()).unwrap_or_default(),
    ]
}

pub(super) fn launcher_word(launcher: Launcher) -> &'static str {
    match launcher {
        Launcher::Caa => "caa",
        Launcher::Api => "api",
    }
}

/// Empty: there is none.
pub(super) fn runtime_word(state: RuntimeState) -> &'static str {
    match state {
        RuntimeState::None => "",
        RuntimeState::Held => "Held",
        RuntimeState::Connected => "Connected",
        RuntimeState::Ended => "Ended",
    }
}

/// Green: it can be used. Red: something is wrong. Yellow: between.
pub(in crate::commands) fn phase_colour(phase: Phase) -> Colour {
    match phase {
        Phase::Up => Colour::Green,
        Phase::Down | Phase::Failed => Colour::Red,
        _ => Colour::Yellow,
    }
}

/// Digits that distinguish ids.
fn digits(pods: &[Pod]) -> usize {
    let mut ids: Vec<&str> = pods.iter().map(|pod| &*pod.id).collect();
    ids.sort_unstable();
    let alike = |a: &str, b: &str| a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
    let most = ids.iter().zip(ids.iter().skip(1)).map(|(a, b)| alike(a, b)).max().unwrap_or_default();
    ID_SHOWN.max(most + 1)
}

fn first(id: &str, digits: usize) -> &str {
    id.char_indices().nth(digits).and_then(|(end, _)| id.get(..end)).unwrap_or(id)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::types::{Runtime, Session};

    /// A pod that is up.
    pub(in crate::commands::pod) fn pod(id: &str, name: &str) -> Pod {
        Pod {
            id: id.to_owned(),
            launcher: Some(Launcher::Caa),
            namespace: Some("default".to_owned()),
            name: Some(name.to_owned()),
            phase: Phase::Up,
            reason: None,
            attempt: None,
            instance: None,
            since: SystemTime::UNIX_EPOCH.into(),
            created: Some(SystemTime::UNIX_EPOCH.into()),
            addresses: vec!["10.0.0.7:2222".to_owned()],
            endpoints: Vec::new(),
            session: Some(Session { lanes: vec!["main".to_owned(), "data".to_owned()], resumed: 2 }),
            runtime: Runtime { state: RuntimeState::None, since: None, reason: None },
            init_data_digest: None,
        }
    }

    #[test]
    fn ids_are_shown_as_far_as_they_differ() {
        let pods = |ids: &[&str]| ids.iter().map(|id| pod(id, "a")).collect::<Vec<_>>();
        assert_eq!(digits(&pods(&["0123456789abcdef"])), 12);
        assert_eq!(digits(&pods(&["0123456789abcdef", "0123456789abcdex", "1"])), 16);
        assert_eq!(digits(&[]), 12);
        assert_eq!(first("0123456789abcdef", 12), "0123456789ab");
        assert_eq!(first("üü", 12), "üü");
    }

    #[test]
    fn a_wide_table_has_more_columns() {
        let mut pods = vec![pod("3f2a", "web-2"), pod("77", "web-1")];
        pods.push(Pod {
            namespace: None,
            name: None,
            launcher: None,
            created: None,
            session: None,
            ..pod("5", "")
        });
        sort(&mut pods);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(200);
        let screen = Screen::of_stdout(&|_| None);
        let text = table(&pods, true, true, now).to_text(screen, "");
        let expected = "\
NAMESPACE   NAME     ID     PHASE   AGE      ADDRESS         LANES       RESUMES   RUNTIME   LAUNCHER
default     web-1    77     Up      3m20s    10.0.0.7:2222   main,data   2         <none>    caa
default     web-2    3f2a   Up      3m20s    10.0.0.7:2222   main,data   2         <none>    caa
<none>      <none>   5      Up      <none>   10.0.0.7:2222   <none>      <none>    <none>    <none>
";
        assert_eq!(text, expected);
        let plain = table(&pods, false, false, now).to_text(screen, "");
        assert!(plain.starts_with("default   web-1    77     Up   3m20s\n"), "{plain}");
    }
}
