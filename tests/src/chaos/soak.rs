//! One pod that reconnects many times; each end is measured while the other one is restarted.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::lifetime::up;
use super::pod_scene::{PodScene, Route};
use super::resources::Resources;
use super::script::{Hit, Path, Script, Side, UserData};
use crate::harness::process::ensure_built;

/// Restarts of the adaptor: few, because each backoff is longer than the last.
const CUTS: usize = 8;
/// Reconnections until both ends have allocated all they ever need.
const WARM: usize = 5;
const BOUND: Duration = Duration::from_secs(60);
/// Time until what has ended is released.
const SETTLE: Duration = Duration::from_millis(100);
const SETTLES: usize = 100;
/// Allowed growth of memory: allocators keep some.
const SLACK_KIB: u64 = 2 * 1024;

/// Kills the adaptor `times` times, and resets its connection a few times; the other end's resources must not grow.
///
/// # Errors
/// If they grow, or the pod does not come back.
pub async fn soak(times: usize) -> Result<String> {
    let script = Script {
        seed: 0,
        path: Path::Proxy,
        hit: Hit::Kubernetes,
        https: false,
        attacker: false,
        user_data: UserData::Empty,
        request: 200,
        faults: Vec::new(),
    };
    let scene = PodScene::new(&script, ensure_built().await?).await?;
    up(scene.kata_inbound, BOUND).await?;
    let adaptor_again = async || {
        scene.adaptor.end(Signal::SIGKILL, Duration::ZERO).await?;
        up(scene.kata_inbound, BOUND).await
    };
    for _ in 0..WARM {
        adaptor_again().await?;
    }
    let agent = held(&scene, Side::Agent)?;
    for _ in 0..times {
        adaptor_again().await?;
    }
    let agent_after = settled(&scene, Side::Agent, agent).await.context("the agent")?;
    let Route::Proxy(proxy, _) = &scene.route else { bail!("no proxy") };
    proxy.cut();
    up(scene.kata_inbound, BOUND).await?;
    let adaptor = held(&scene, Side::Adaptor)?;
    for _ in 0..CUTS {
        proxy.cut();
        up(scene.kata_inbound, BOUND).await?;
    }
    let adaptor_after = settled(&scene, Side::Adaptor, adaptor).await.context("the adaptor")?;
    Ok(format!(
        "agent, {times} adaptors later   {agent} then {agent_after}\nadaptor, {CUTS} cuts later      {adaptor} \
         then {adaptor_after}"
    ))
}

fn held(scene: &PodScene, side: Side) -> Result<Resources> {
    Resources::of(scene.program(side).pid().context("it does not run")?)
}

/// Resources of a process, once they are no more than before.
async fn settled(scene: &PodScene, side: Side, before: Resources) -> Result<Resources> {
    // The first measurement may include a probe or two, or not.
    let most = Resources {
        files: before.files + 2,
        threads: before.threads + 2,
        rss_kib: before.rss_kib + SLACK_KIB,
    };
    for _ in 0..SETTLES {
        let now = held(scene, side)?;
        if now.over(&most).is_none() {
            return Ok(now);
        }
        sleep(SETTLE).await;
    }
    bail!("held {before}, and now holds {}", held(scene, side)?)
}
