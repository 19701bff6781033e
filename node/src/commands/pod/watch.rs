//! `pod watch`: what happens to the pods, a line each, until a signal.

use anyhow::{Context as _, bail};

use super::find::{find, id_of};
use super::show::kind;
use crate::api::client::{Client, EventReader, StreamItem};
use crate::api::types::{Event, Lost};
use crate::cli::service::{EventFormat, PodWatchArgs};
use crate::commands::screen::{NONE, Screen, clean, show};
use crate::signals::Signals;

/// Digits of an id that are shown.
const ID_SHOWN: usize = 12;

pub(super) async fn run(client: &Client, args: PodWatchArgs, screen: Screen) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("wait for signals")?;
    let pod = match &args.id {
        Some(text) => Some(id_of(&find(client, text).await?)?),
        None => None,
    };
    let mut reader = client.events(pod.as_ref(), None).await?;
    tokio::select! {
        ended = follow(&mut reader, &args, screen) => ended,
        // That is how it ends.
        _ = signals.next() => Ok(()),
    }
}

async fn follow(reader: &mut EventReader, args: &PodWatchArgs, screen: Screen) -> anyhow::Result<()> {
    loop {
        let Some(item) = reader.next().await? else {
            bail!("the service has ended: what happens to the pods is not known any more");
        };
        let line = match item {
            StreamItem::Event(event) if !is_wanted(&event, args.namespace.as_deref()) => continue,
            StreamItem::Event(event) => match args.output {
                EventFormat::Text => text(&event, screen),
                EventFormat::Json => serde_json::to_string(&event)? + "\n",
            },
            StreamItem::Lost(lost) => match args.output {
                EventFormat::Text => lost_text(&lost),
                EventFormat::Json => serde_json::to_string(&serde_json::json!({ "lost": lost }))? + "\n",
            },
        };
        if !show(&line)? {
            return Ok(());
        }
    }
}

fn is_wanted(event: &Event, namespace: Option<&str>) -> bool {
    namespace.is_none_or(|wanted| event.namespace.as_deref() == Some(wanted))
}

fn text(event: &Event, screen: Screen) -> String {
    let name = match (&event.namespace, &event.name) {
        (Some(namespace), Some(name)) => clean(&format!("{namespace}/{name}")),
        _ => NONE.to_owned(),
    };
    let id: String = clean(&event.pod).chars().take(ID_SHOWN).collect();
    let (kind, colour) = kind(event.kind);
    let kind = screen.paint(&format!("{kind:<7}"), colour);
    format!("{} {kind} {name} {id} {}: {}\n", event.time, clean(&event.reason), clean(&event.message))
}

fn lost_text(lost: &Lost) -> String {
    match lost.count {
        Some(count) => format!("({count} events were lost: they came faster than they were read)\n"),
        None => "(events were lost: the service was restarted)\n".to_owned(),
    }
}
