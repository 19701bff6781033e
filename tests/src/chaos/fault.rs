//! How a fault is done, and undone.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio::time::sleep;

use super::pod_scene::{MOVED, Route, Site};
use super::script::{Fault, Planned, Side};
use crate::simulators::impaired_link::{DEVICE, Impairment};
use crate::simulators::kbs::Fault as KbsFault;

/// A fault that begins when it is due; returns once it is over.
///
/// # Errors
/// It could not be done or undone: the life says nothing then.
pub async fn strike(site: &Site, planned: Planned) -> Result<()> {
    sleep(planned.at).await;
    let done = hit(site, planned.fault, planned.lasts).await;
    done.with_context(|| format!("{:?}", planned.fault))
}

async fn hit(site: &Site, fault: Fault, lasts: Duration) -> Result<()> {
    match fault {
        Fault::Kill(side) => site.program(side).end(Signal::SIGKILL, lasts).await,
        Fault::Abort(side) => site.program(side).end(Signal::SIGABRT, lasts).await,
        Fault::Clock(side, seconds) => {
            site.set_clock(side, seconds);
            site.program(side).end(Signal::SIGKILL, lasts).await
        }
        Fault::Freeze(side) => freeze(site, side, lasts).await,
        Fault::NoFiles(side, spare) => no_files(site, side, spare, lasts).await,
        Fault::Reboot => {
            // What is wiped while it still runs it could write again.
            let gone = site.agent.end(Signal::SIGKILL, lasts);
            let wipe = async {
                sleep(lasts / 2).await;
                site.state.wipe()
            };
            tokio::try_join!(gone, wipe).map(drop)
        }
        Fault::Reset => reset(site).await,
        Fault::KbsDown => {
            site.kbs.kill().await?;
            sleep(lasts).await;
            site.kbs.restart().await
        }
        Fault::KbsSlow(millis) => {
            kbs(site, KbsFault::Slow(Duration::from_millis(millis.into())), lasts).await
        }
        Fault::KbsSilent => kbs(site, KbsFault::Silent, lasts).await,
        Fault::KbsGarbage => kbs(site, KbsFault::Garbage(b"no key at all".to_vec()), lasts).await,
        Fault::KbsRefuses => kbs(site, KbsFault::Refuse, lasts).await,
        Fault::KbsBroken => kbs(site, KbsFault::Status(500), lasts).await,
        Fault::KbsClock(ahead) => {
            site.kbs.set_clock_ahead(if ahead { 3600 } else { -3600 });
            sleep(lasts).await;
            site.kbs.set_clock_ahead(0);
            Ok(())
        }
        Fault::RestDown => {
            drop(site.rest.lock().await.take());
            sleep(lasts).await;
            site.begin_rest().await
        }
        Fault::KataDown => {
            site.kata.end().await;
            sleep(lasts).await;
            site.kata.begin().await
        }
        Fault::StoreFull => {
            site.store.fill()?;
            let killed = site.adaptor.end(Signal::SIGKILL, lasts / 2);
            let emptied = async {
                sleep(lasts).await;
                site.store.empty()
            };
            tokio::try_join!(killed, emptied).map(drop)
        }
        Fault::StoreReadOnly => {
            site.store.writable(false).await?;
            let killed = site.adaptor.end(Signal::SIGKILL, lasts / 2);
            let writable = async {
                sleep(lasts).await;
                site.store.writable(true).await
            };
            tokio::try_join!(killed, writable).map(drop)
        }
        Fault::StateFull => {
            site.state.fill()?;
            let killed = site.agent.end(Signal::SIGKILL, lasts / 2);
            let emptied = async {
                sleep(lasts).await;
                site.state.empty()
            };
            tokio::try_join!(killed, emptied).map(drop)
        }
        Fault::Blackhole => match &site.route {
            Route::Cable(cable, _) => {
                cable.freeze();
                sleep(lasts).await;
                cable.thaw();
                Ok(())
            }
            Route::Line(..) => line(site, lasts, |line, on| line.blackhole = on).await,
        },
        Fault::Loss(loss) => line(site, lasts, |line, on| line.loss = chance(loss, on)).await,
        Fault::Duplicate(twice) => line(site, lasts, |line, on| line.duplicate = chance(twice, on)).await,
        Fault::Delay(millis) => {
            let millis = Duration::from_millis(millis.into());
            line(site, lasts, |line, on| line.delay = if on { millis } else { Duration::ZERO }).await
        }
        Fault::Reorder(late) => {
            line(site, lasts, |line, on| {
                (line.reorder, line.reorder_delay) = (chance(late, on), Duration::from_millis(5));
            })
            .await
        }
        Fault::LinkDown => {
            device(site, &["link", "set", DEVICE, "down"]).await?;
            sleep(lasts).await;
            device(site, &["link", "set", DEVICE, "up"]).await
        }
        Fault::Move => match &site.route {
            Route::Line(line, _) => line.lock().await.b.readdress(MOVED),
            Route::Cable(..) => bail!("only over a line"),
        },
    }
}

fn chance(thousandth: u16, on: bool) -> f64 {
    if on { f64::from(thousandth) / 1000.0 } else { 0.0 }
}

async fn kbs(site: &Site, fault: KbsFault, lasts: Duration) -> Result<()> {
    site.kbs.set_fault(fault);
    sleep(lasts).await;
    site.kbs.set_fault(KbsFault::None);
    Ok(())
}

/// Changes the line for a while; other faults of it may go on meanwhile.
async fn line(site: &Site, lasts: Duration, change: impl Fn(&mut Impairment, bool)) -> Result<()> {
    let Route::Line(line, now) = &site.route else { bail!("only over a line") };
    for on in [true, false] {
        let changed = {
            let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut now, on);
            *now
        };
        line.lock().await.set_both(changed);
        if on {
            sleep(lasts).await;
        }
    }
    Ok(())
}

async fn device(site: &Site, args: &[&str]) -> Result<()> {
    let Route::Line(line, _) = &site.route else { bail!("only over a line") };
    line.lock().await.b.netns.ip(args.iter().copied())
}

async fn freeze(site: &Site, side: Side, lasts: Duration) -> Result<()> {
    let program = site.program(side);
    program.signal(Signal::SIGSTOP).await?;
    sleep(lasts).await;
    // If it was killed meanwhile, its successor is told, which does not mind.
    program.signal(Signal::SIGCONT).await
}

async fn reset(site: &Site) -> Result<()> {
    match &site.route {
        Route::Cable(cable, _) => {
            cable.cut();
            Ok(())
        }
        Route::Line(line, _) => {
            // The kernel ends the connection for both sides: to the other one it sends a reset.
            let mut command = line.lock().await.b.netns.command("ss");
            command.args(["-K", "-t", "state", "established", "sport", "=", ":2222"]);
            run(command).await
        }
    }
}

async fn no_files(site: &Site, side: Side, spare: u8, lasts: Duration) -> Result<()> {
    let Some(pid) = site.program(side).pid() else { return Ok(()) };
    let proc = PathBuf::from(format!("/proc/{pid}"));
    // Whoever was killed meanwhile has no files either.
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
