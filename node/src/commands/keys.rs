//! `keys`: the worker node's keys, in the store. The service may run: it reads them whenever it prepares a pod.

use secure_comms_adaptor::store::Store as _;
use serde::Serialize;

use super::open_store;
use super::pod::{print_json, print_yaml};
use super::screen::{Screen, Table, note, show};
use crate::cli::keys::{KeysArgs, KeysCommand, KeysListArgs};
use crate::cli::service::Format;
use crate::settings::{Env, KeysSettings};

/// Pods that a line names.
const PODS_NAMED: usize = 3;

/// A valid key.
#[derive(Debug, Serialize)]
struct Key {
    fingerprint: String,
    /// Whether pods that are launched now get it.
    current: bool,
    /// The pods that it drives.
    pods: Vec<String>,
}

#[derive(Debug, Serialize)]
struct KeyList {
    items: Vec<Key>,
}

/// Lists, rotates or prunes the keys.
///
/// # Errors
/// The flags are invalid, or the store cannot be read or written.
pub async fn run(args: KeysArgs, env: Env<'_>) -> anyhow::Result<()> {
    let store = open_store(&KeysSettings::read(args.store, args.config, env)?.store)?;
    match args.command {
        KeysCommand::List(args) => print_list(keys(&store).await?, &args, Screen::of_stdout(env)),
        KeysCommand::Rotate => {
            let key = store.rotate_worker_node_key().await?;
            show(&(key.public()?.authorized_keys_line()? + "\n"))?;
            note("pods that run go on with their keys; delete those with keys prune once no pod needs them");
            Ok(())
        }
        KeysCommand::Prune => {
            let pruned = store.prune().await?;
            let mut text = String::new();
            for fingerprint in &pruned.removed {
                text += &format!("{fingerprint}: removed\n");
            }
            for (fingerprint, pods) in &pruned.needed {
                let pods: Vec<String> = pods.iter().map(ToString::to_string).collect();
                text += &format!("{fingerprint}: kept for {}\n", some(&pods));
            }
            show(&text).map(drop)
        }
    }
}

async fn keys(store: &secure_comms_adaptor::store::DirectoryStore) -> anyhow::Result<Vec<Key>> {
    let mut keys: Vec<Key> = store
        .worker_node_keys()
        .await?
        .iter()
        .enumerate()
        .map(|(at, key)| Key { fingerprint: key.fingerprint(), current: at == 0, pods: Vec::new() })
        .collect();
    for pod in store.pods().await? {
        let own = store.pod_worker_nodes(&pod).await?.own.fingerprint();
        if let Some(key) = keys.iter_mut().find(|key| key.fingerprint == own) {
            key.pods.push(pod.to_string());
        }
    }
    Ok(keys)
}

fn print_list(items: Vec<Key>, args: &KeysListArgs, screen: Screen) -> anyhow::Result<()> {
    match args.output {
        Format::Json => return print_json(&KeyList { items }),
        Format::Yaml => return print_yaml(&KeyList { items }),
        _ if items.is_empty() => {
            note("no keys found: the first pod, or keygen, makes one");
            return Ok(());
        }
        Format::Table | Format::Wide => {}
    }
    let wide = args.output == Format::Wide;
    let mut columns = vec!["FINGERPRINT", "CURRENT", "PODS"];
    columns.extend(wide.then_some("IDS"));
    let mut table = if args.no_headers { Table::default() } else { Table::with_headers(&columns) };
    for key in items {
        let current = if key.current { "yes" } else { "no" };
        let mut cells = vec![key.fingerprint, current.to_owned(), key.pods.len().to_string()];
        cells.extend(wide.then(|| key.pods.join(",")));
        table.row(cells.into_iter().map(|text| (text, None)));
    }
    show(&table.to_text(screen, "")).map(drop)
}

/// The first of many ids.
fn some(ids: &[String]) -> String {
    let named: Vec<&str> = ids.iter().take(PODS_NAMED).map(String::as_str).collect();
    match ids.len().saturating_sub(PODS_NAMED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}
