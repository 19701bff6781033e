//! `pod start`, `pod stop` and `pod forget`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::bail;
use tokio::time::sleep;

use super::find::{find, find_or_orphan, id_of};
use super::select::word;
use crate::api::client::{Client, ClientError, Ended};
use crate::api::types::{Phase, Pod, PodRef, PodSpec, StartOrder};
use crate::cli::service::{PodForgetArgs, PodStartArgs, PodStopArgs};
use crate::commands::screen::{clean, note, show};
use crate::settings::PodStartSettings;

/// Between two looks at a pod that an earlier call has started.
const POLL: Duration = Duration::from_millis(500);

/// Publishes the pod's keys, connects to its VM, and waits until it can be used. May be repeated: what is left out then stays
/// as it is, and a start that was begun is waited for.
pub(super) async fn start(client: &Client, args: PodStartArgs) -> anyhow::Result<()> {
    let settings = PodStartSettings::read(args)?;
    let begin = Instant::now();
    let spec = spec(client, &settings).await?;
    client.prepare(&settings.pod, &spec, Some(settings.deadline)).await?;
    let left = settings.deadline.saturating_sub(begin.elapsed()).as_secs().max(1);
    let order = StartOrder {
        addresses: settings.addresses.iter().map(ToString::to_string).collect(),
        deadline_seconds: u32::try_from(left).ok(),
        wait: settings.wait,
    };
    let pod = match client.start(&settings.pod, &order).await {
        Err(ClientError::Problem(problem)) if problem.word() == "already-started" => {
            let pod = client.pod(&settings.pod).await?;
            if !has_addresses(&pod, &order.addresses) {
                return Err(ClientError::Problem(problem).into());
            }
            if settings.wait { until_up(client, pod, begin, settings.deadline).await? } else { pod }
        }
        started => started?,
    };
    let mut text = format!("pod {}: {}\n", clean(&pod.id), word(pod.phase));
    for endpoint in &pod.endpoints {
        text += &format!("  {} {}\n", clean(&endpoint.tunnel), clean(&endpoint.local));
    }
    show(&text).map(drop)
}

/// What the pod is to be: what the service knows of it, where the flags leave something out.
async fn spec(client: &Client, settings: &PodStartSettings) -> anyhow::Result<PodSpec> {
    let known = match client.pod(&settings.pod).await {
        Ok(pod) => Some(pod),
        Err(ClientError::Problem(problem)) if problem.word() == "not-found" => None,
        Err(error) => return Err(error.into()),
    };
    let (known_ref, known_digest) = known.map_or((None, None), |pod| {
        let names = pod.namespace.zip(pod.name);
        (names.map(|(namespace, name)| PodRef { namespace, name }), pod.init_data_digest)
    });
    let pod_ref = settings.name.clone().map(|(namespace, name)| PodRef { namespace, name });
    let digest = settings.init_data.as_ref().map(ToString::to_string);
    Ok(PodSpec { pod_ref: pod_ref.or(known_ref), init_data_digest: digest.or(known_digest) })
}

/// Whether the pod was started at these addresses, in any order.
fn has_addresses(pod: &Pod, addresses: &[String]) -> bool {
    let of_pod: BTreeSet<_> = pod.addresses.iter().collect();
    of_pod == addresses.iter().collect()
}

/// Waits for the start that an earlier call has begun.
async fn until_up(client: &Client, mut pod: Pod, begin: Instant, limit: Duration) -> anyhow::Result<Pod> {
    let id = id_of(&pod)?;
    loop {
        let reason = pod.reason.as_deref().map(|reason| format!(": {}", clean(reason))).unwrap_or_default();
        let phase = word(pod.phase);
        match pod.phase {
            Phase::Up => return Ok(pod),
            Phase::Connecting | Phase::Attesting | Phase::Upgrading | Phase::Down => {}
            _ => bail!("pod {id}: it was started before, and is {phase} now{reason}"),
        }
        if begin.elapsed() >= limit {
            bail!("start pod {id}: not up within {} s; last seen: {phase}{reason}", limit.as_secs());
        }
        sleep(POLL).await;
        pod = client.pod(&id).await?;
    }
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
