//! `pod start`, `pod stop` and `pod forget`.

use std::time::Instant;

use super::find::{find, find_or_orphan, id_of};
use super::select::word;
use crate::api::client::{Client, Ended};
use crate::api::types::{PodRef, PodSpec, StartOrder};
use crate::cli::service::{PodForgetArgs, PodStartArgs, PodStopArgs};
use crate::commands::screen::{clean, note, show};
use crate::settings::PodStartSettings;

/// Publishes the pod's keys, connects to its VM, and waits until it can be used.
pub(super) async fn start(client: &Client, args: PodStartArgs) -> anyhow::Result<()> {
    let settings = PodStartSettings::read(args)?;
    let begin = Instant::now();
    let spec = PodSpec {
        pod_ref: settings.name.map(|(namespace, name)| PodRef { namespace, name }),
        init_data_digest: settings.init_data.map(|digest| digest.to_string()),
    };
    client.prepare(&settings.pod, &spec, Some(settings.deadline)).await?;
    let left = settings.deadline.saturating_sub(begin.elapsed()).as_secs().max(1);
    let order = StartOrder {
        addresses: settings.addresses.iter().map(ToString::to_string).collect(),
        deadline_seconds: u32::try_from(left).ok(),
        wait: settings.wait,
    };
    let pod = client.start(&settings.pod, &order).await?;
    let mut text = format!("pod {}: {}\n", clean(&pod.id), word(pod.phase));
    for endpoint in &pod.endpoints {
        text += &format!("  {} {}\n", clean(&endpoint.tunnel), clean(&endpoint.local));
    }
    show(&text).map(drop)
}

/// Ends the pod, and deletes its keys.
pub(super) async fn stop(client: &Client, args: &PodStopArgs) -> anyhow::Result<()> {
    let id = id_of(&find(client, &args.id).await?)?;
    let ended = client.stop(&id, args.force).await?;
    show(&format!("pod {id}: stopped\n"))?;
    if let Ended::Deleting(deletion) = ended {
        let what = deletion.resource.as_deref().unwrap_or("its record in the store");
        note(&format!(
            "{} is not deleted yet: {}; the service tries again until it is",
            clean(what),
            clean(&deletion.reason)
        ));
    }
    Ok(())
}

/// Deletes the pod here without the KBS: a pod that is served, or an orphan.
pub(super) async fn forget(client: &Client, args: &PodForgetArgs) -> anyhow::Result<()> {
    let id = find_or_orphan(client, &args.id).await?;
    let forgotten = client.forget(&id, args.force).await?;
    show(&format!("pod {id}: forgotten\n"))?;
    if !forgotten.resources.is_empty() {
        let resources = clean(&forgotten.resources.join(", "));
        note(&format!("{resources} may stay in the KBS: delete it there by hand"));
    }
    Ok(())
}
