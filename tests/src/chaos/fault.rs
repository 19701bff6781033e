//! Injects a fault, and removes it again.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio::time::sleep;

use super::hostile_cloud::HostileCloud;
use super::pod_scene::{MOVED, PodScene, Route};
use super::script::{Fault, Forgery, Planned, Side};
use crate::simulators::impaired_link::{DEVICE, Impairment};
use crate::simulators::kbs::Fault as KbsFault;

/// Time that a reboot takes after the VM may have taken forged keys.
const REBOOT: Duration = Duration::from_millis(300);

/// Injects a fault when it is due, and removes it when its time is over.
///
/// # Errors
/// If it can't be injected or removed: the lifetime proves nothing then.
pub(super) async fn inject_fault(scene: &PodScene, planned: Planned) -> Result<()> {
    sleep(planned.at).await;
    let done = hit(scene, planned.fault, planned.lasts).await;
    done.with_context(|| format!("{:?}", planned.fault))
}

async fn hit(scene: &PodScene, fault: Fault, lasts: Duration) -> Result<()> {
    match fault {
        Fault::Kill(side) => scene.program(side).end(Signal::SIGKILL, lasts).await,
        Fault::Abort(side) => scene.program(side).end(Signal::SIGABRT, lasts).await,
        Fault::Clock(side, seconds) => {
            scene.set_clock(side, seconds);
            scene.program(side).end(Signal::SIGKILL, lasts).await
        }
        Fault::Freeze(side) => freeze(scene, side, lasts).await,
        Fault::NoFiles(side, spare) => no_files(scene, side, spare, lasts).await,
        Fault::Reboot => reboot(scene, lasts).await,
        Fault::Reset => reset(scene).await,
        Fault::KbsDown => {
            scene.kbs.kill().await?;
            sleep(lasts).await;
            scene.kbs.restart().await
        }
        Fault::KbsSlow(millis) => {
            kbs(scene, KbsFault::Slow(Duration::from_millis(millis.into())), lasts).await
        }
        Fault::KbsSilent => kbs(scene, KbsFault::Silent, lasts).await,
        Fault::KbsGarbage => kbs(scene, KbsFault::Garbage(b"no key at all".to_vec()), lasts).await,
        Fault::KbsForged(forgery) => forged(scene, forgery, lasts).await,
        Fault::KbsRefuses => kbs(scene, KbsFault::Refuse, lasts).await,
        Fault::KbsBroken => kbs(scene, KbsFault::Status(500), lasts).await,
        Fault::KbsClock(ahead) => {
            scene.kbs.set_clock_ahead(if ahead { 3600 } else { -3600 });
            sleep(lasts).await;
            scene.kbs.set_clock_ahead(0);
            Ok(())
        }
        Fault::RestDown => {
            drop(scene.rest.lock().await.take());
            sleep(lasts).await;
            scene.begin_rest().await
        }
        Fault::KataDown => {
            scene.kata.end().await;
            sleep(lasts).await;
            scene.kata.begin().await
        }
        Fault::StoreFull => {
            scene.store.fill()?;
            let killed = scene.adaptor.end(Signal::SIGKILL, lasts / 2);
            let emptied = async {
                sleep(lasts).await;
                scene.store.empty()
            };
            tokio::try_join!(killed, emptied).map(drop)
        }
        Fault::StoreReadOnly => {
            scene.store.writable(false).await?;
            let killed = scene.adaptor.end(Signal::SIGKILL, lasts / 2);
            let writable = async {
                sleep(lasts).await;
                scene.store.writable(true).await
            };
            tokio::try_join!(killed, writable).map(drop)
        }
        Fault::StateFull => {
            scene.state.fill()?;
            let killed = scene.agent.end(Signal::SIGKILL, lasts / 2);
            let emptied = async {
                sleep(lasts).await;
                scene.state.empty()
            };
            tokio::try_join!(killed, emptied).map(drop)
        }
        Fault::Blackhole => match &scene.route {
            Route::Proxy(proxy, _) => {
                proxy.freeze();
                sleep(lasts).await;
                proxy.thaw();
                Ok(())
            }
            Route::ImpairedLink(..) => link(scene, lasts, |link, on| link.blackhole = on).await,
        },
        Fault::Loss(loss) => link(scene, lasts, |link, on| link.loss = chance(loss, on)).await,
        Fault::Duplicate(twice) => link(scene, lasts, |link, on| link.duplicate = chance(twice, on)).await,
        Fault::Delay(millis) => {
            let millis = Duration::from_millis(millis.into());
            link(scene, lasts, |link, on| link.delay = if on { millis } else { Duration::ZERO }).await
        }
        Fault::Reorder(late) => {
            link(scene, lasts, |link, on| {
                (link.reorder, link.reorder_delay) = (chance(late, on), Duration::from_millis(5));
            })
            .await
        }
        Fault::LinkDown => {
            device(scene, &["link", "set", DEVICE, "down"]).await?;
            sleep(lasts).await;
            device(scene, &["link", "set", DEVICE, "up"]).await
        }
        Fault::Move => match &scene.route {
            Route::ImpairedLink(link, _) => link.lock().await.b.readdress(MOVED),
            Route::Proxy(..) => bail!("only over an impaired link"),
        },
    }
}

fn chance(thousandth: u16, on: bool) -> f64 {
    if on { f64::from(thousandth) / 1000.0 } else { 0.0 }
}

async fn kbs(scene: &PodScene, fault: KbsFault, lasts: Duration) -> Result<()> {
    scene.kbs.set_fault(fault);
    sleep(lasts).await;
    scene.kbs.set_fault(KbsFault::None);
    Ok(())
}

/// A man in the middle between the VM and the KBS.
async fn forged(scene: &PodScene, forgery: Forgery, lasts: Duration) -> Result<()> {
    // Over HTTPS he has no certificate that the VM takes.
    if scene.kbs.ca_pem().is_some() {
        return kbs(scene, KbsFault::Refuse, lasts).await;
    }
    let forged = scene.cloud.forged(forgery, scene.store.path())?;
    kbs(scene, KbsFault::Garbage(forged), lasts).await?;
    if HostileCloud::can_be_taken(forgery) {
        reboot(scene, REBOOT).await?;
    }
    Ok(())
}

async fn reboot(scene: &PodScene, lasts: Duration) -> Result<()> {
    // A running agent could write the files again that are wiped.
    let gone = scene.agent.end(Signal::SIGKILL, lasts);
    let wipe = async {
        sleep(lasts / 2).await;
        scene.state.wipe()
    };
    tokio::try_join!(gone, wipe).map(drop)
}

/// Changes the impaired link for a while; several faults may overlap.
async fn link(scene: &PodScene, lasts: Duration, change: impl Fn(&mut Impairment, bool)) -> Result<()> {
    let Route::ImpairedLink(link, now) = &scene.route else { bail!("only over an impaired link") };
    for on in [true, false] {
        let changed = {
            let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut now, on);
            *now
        };
        link.lock().await.set_both(changed);
        if on {
            sleep(lasts).await;
        }
    }
    Ok(())
}

async fn device(scene: &PodScene, args: &[&str]) -> Result<()> {
    let Route::ImpairedLink(link, _) = &scene.route else { bail!("only over an impaired link") };
    link.lock().await.b.netns.ip(args.iter().copied())
}

async fn freeze(scene: &PodScene, side: Side, lasts: Duration) -> Result<()> {
    let program = scene.program(side);
    program.signal(Signal::SIGSTOP).await?;
    sleep(lasts).await;
    // If the process was killed in between, its successor gets the signal, which is harmless.
    program.signal(Signal::SIGCONT).await
}

async fn reset(scene: &PodScene) -> Result<()> {
    match &scene.route {
        Route::Proxy(proxy, _) => {
            proxy.cut();
            Ok(())
        }
        Route::ImpairedLink(link, _) => {
            // The kernel ends the connection at this end, and sends a reset to the other one.
            let mut command = link.lock().await.b.netns.command("ss");
            command.args(["-K", "-t", "state", "established", "sport", "=", ":2222"]);
            run(command).await
        }
    }
}

async fn no_files(scene: &PodScene, side: Side, spare: u8, lasts: Duration) -> Result<()> {
    let Some(pid) = scene.program(side).pid() else { return Ok(()) };
    let proc = PathBuf::from(format!("/proc/{pid}"));
    // A process that was killed in between has no limit to restore.
    let Ok(open) = std::fs::read_dir(proc.join("fd")).map(Iterator::count) else { return Ok(()) };
    let Ok(limits) = std::fs::read_to_string(proc.join("limits")) else { return Ok(()) };
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = soft.and_then(|rest| rest.split_whitespace().next()).context("no limit of open files")?;
    let limit = async |limit: String| {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &pid.to_string(), &format!("--nofile={limit}:")]);
        let done = run(command).await;
        if proc.exists() { done } else { Ok(()) }
    };
    limit((open + usize::from(spare)).to_string()).await?;
    sleep(lasts).await;
    limit(soft.to_owned()).await
}

async fn run(mut command: Command) -> Result<()> {
    let output = command.output().await?;
    if !output.status.success() {
        bail!("{:?}: {}", command.as_std(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
