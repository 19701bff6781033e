//! `pod orphans`: what pods that no launcher will end have left behind.

use std::time::SystemTime;

use anyhow::bail;
use secure_comms_protocol::PodId;

use super::list::launcher_word;
use super::{print_json, print_yaml};
use crate::api::client::{Client, Ended};
use crate::api::types::{Orphan, OrphanList};
use crate::cli::service::{Format, PodOrphansArgs};
use crate::commands::screen::{Screen, Table, age, clean, note, show};

pub(super) async fn run(client: &Client, args: &PodOrphansArgs, screen: Screen) -> anyhow::Result<()> {
    let items = client.orphans().await?;
    if args.collect {
        return collect(client, &items).await;
    }
    match args.form.output {
        Format::Json => print_json(&OrphanList { items }),
        Format::Yaml => print_yaml(&OrphanList { items }),
        _ if items.is_empty() => {
            note("no orphans found");
            Ok(())
        }
        format => {
            let table = table(&items, format == Format::Wide, !args.no_headers, SystemTime::now());
            show(&table.to_text(screen, "")).map(drop)
        }
    }
}

fn table(orphans: &[Orphan], wide: bool, headers: bool, now: SystemTime) -> Table {
    let mut columns = vec!["NAMESPACE", "NAME", "ID", "REASON", "AGE"];
    if wide {
        columns.extend(["LAUNCHER", "MESSAGE"]);
    }
    let mut table = if headers { Table::with_headers(&columns) } else { Table::default() };
    for orphan in orphans {
        let mut cells = vec![
            orphan.namespace.clone().unwrap_or_default(),
            orphan.name.clone().unwrap_or_default(),
            // Whole: `forget` and an admin of the KBS need it.
            orphan.id.clone(),
            orphan.reason.clone(),
            age(orphan.since.into(), now),
        ];
        if wide {
            cells.extend([
                orphan.launcher.map(launcher_word).unwrap_or_default().to_owned(),
                orphan.message.clone(),
            ]);
        }
        table.row(cells.into_iter().map(|text| (text, None)));
    }
    table
}

/// Ends all of them. One that cannot be ended does not keep the others.
async fn collect(client: &Client, orphans: &[Orphan]) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for orphan in orphans {
        let shown = clean(&orphan.id);
        let Ok(id) = orphan.id.parse::<PodId>() else {
            failed.push(format!("{shown}: the service's answer has no valid pod id"));
            continue;
        };
        match client.collect(&id).await {
            Ok(Ended::Gone) => drop(show(&format!("pod {id}: collected\n"))?),
            Ok(Ended::Deleting(deletion)) => failed.push(format!("{shown}: {}", clean(&deletion.reason))),
            Err(error) => failed.push(format!("{shown}: {}", clean(&error.to_string()))),
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} of {} orphans are not collected: {}", failed.len(), orphans.len(), failed.join("; "))
}
