//! `chaos [LIFETIMES] [--seed N] [--at-once N]`: runs pod lifetimes under faults, one per seed; exits with 1 if a
//!  requirement was violated. With `SECURE_COMMS_OLD_BIN_DIR`, the same lifetimes run with the programs there as well, and
//!  the connections that both lost are printed together. Needs root.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use secure_comms_simulators::args::until_signal;
use secure_comms_tests::chaos::leftovers::Leftovers;
use secure_comms_tests::chaos::lifetime::{Outcome, live};
use secure_comms_tests::chaos::script::Script;
use secure_comms_tests::chaos::soak::soak;
use secure_comms_tests::chaos::summary::Report;
use secure_comms_tests::harness::process::{Binaries, ensure_built, old_binaries};
use secure_comms_tests::usage::is_help;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Command line.
struct Asked {
    lifetimes: u64,
    seed: u64,
    at_once: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    if is_help("usage: chaos [LIFETIMES] [--seed N] [--at-once N]") {
        return ExitCode::SUCCESS;
    }
    let asked = match Asked::read(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("chaos: {error:#}; usage: chaos [LIFETIMES] [--seed N] [--at-once N]");
            return ExitCode::from(2);
        }
    };
    let ran = tokio::select! {
        ran = run(&asked) => ran,
        // A panic would skip the clean-up of namespaces and mounts.
        signal = until_signal() => signal.and_then(|()| bail!("ended by a signal")),
    };
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Asked {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Self> {
        // Another seed in each run, and printed: one run may find what another misses.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_secs();
        let mut asked = Self { lifetimes: 100, seed: now, at_once: 6 };
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a number"));
            match word.as_str() {
                "--seed" => asked.seed = value()?.parse().context("--seed")?,
                "--at-once" => asked.at_once = value()?.parse().context("--at-once")?,
                lifetimes => asked.lifetimes = lifetimes.parse().with_context(|| format!("{lifetimes:?}"))?,
            }
        }
        if asked.lifetimes == 0 || asked.at_once == 0 {
            bail!("nothing to do");
        }
        Ok(asked)
    }
}

/// Starts all lifetimes, a few at a time.
fn spawn(asked: &Asked, binaries: &Binaries) -> JoinSet<Outcome> {
    let (room, mut lifetimes) = (Arc::new(Semaphore::new(asked.at_once)), JoinSet::new());
    for number in 0..asked.lifetimes {
        let (room, script) = (Arc::clone(&room), Script::draw(asked.seed.wrapping_add(number)));
        let binaries = binaries.clone();
        lifetimes.spawn(async move {
            let _place = room.acquire().await;
            live(script, binaries).await
        });
    }
    lifetimes
}

async fn run(asked: &Asked) -> Result<bool> {
    let (binaries, old) = (ensure_built().await?, old_binaries()?);
    let (began, before) = (Instant::now(), Leftovers::now()?);
    println!("{} lifetimes from seed {}, {} at a time", asked.lifetimes, asked.seed, asked.at_once);
    let mut lifetimes = spawn(asked, binaries);
    let soaked = tokio::spawn(soak(usize::try_from(asked.lifetimes)?.clamp(10, 100)));
    let mut report = Report::default();
    while let Some(outcome) = lifetimes.join_next().await {
        println!("{}", report.add(&outcome?));
    }
    let soaked = soaked.await?;
    if let Some(old) = &old {
        println!("the same lifetimes with the old programs, for the connections that they lose");
        let mut lifetimes = spawn(asked, old);
        while let Some(outcome) = lifetimes.join_next().await {
            report.add_old(&outcome?);
        }
    }
    match &soaked {
        Ok(soaked) => println!("{soaked}"),
        Err(error) => println!("FAILED: one pod that reconnects: {error:#}"),
    }
    let left = Leftovers::now()?.beyond(&before);
    for what in &left {
        println!("FAILED: chaos itself has left {what}");
    }
    println!("\n{report}\ntook                      {:.0} s", began.elapsed().as_secs_f64());
    Ok(report.is_good() && soaked.is_ok() && left.is_empty())
}
