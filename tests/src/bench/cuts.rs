//! Cuts of the line between worker node and VM: how soon the kata agent answers once it is back, and what was lost.
//!
//! Each pod has real programs in namespaces of its own, a runtime with the calls that it keeps open (WaitProcess,
//! GetOOMEvent, a Check every 5 s), and a stream in each of two other tunnels with a byte every 100 ms. The router between
//! worker node and VM drops every packet for the time of a cut, so TCP's backoff grows as it does in a real cut. OpenSSH
//! has no figures here: its streams end with their connection.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::SeedableRng as _;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom as _;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::harness::busy_pod::BusyPod;
use crate::harness::routed_path::Drops;
use crate::harness::session_pod::RunningPod;

/// Shortest cut.
const SHORTEST: Duration = Duration::from_secs(1);
/// Pods that are cut at a time: most of a cut is waiting.
const PODS: usize = 8;
/// Time in which the kata agent must answer once the line is back: the runtime's own limit for a Check.
const ANSWER: Duration = Duration::from_secs(30);
/// Streams that are open during a cut: the runtime's, and one in each of two other tunnels.
const STREAMS: usize = 3;
/// Order of the lengths: the same in every run.
const SEED: u64 = 28;
/// Goals, in seconds.
const P50: f64 = 0.3;
const P99: f64 = 1.0;

/// Number and lengths of the cuts.
#[derive(Clone, Copy, Debug)]
pub struct Cuts {
    /// Number of cuts.
    pub count: usize,
    /// The longest; the lengths are evenly spread from 1 s to it.
    pub longest: Duration,
}

/// Few enough for a minute: the full form is 200.
pub const DEFAULT: Cuts = Cuts { count: 16, longest: Duration::from_secs(20) };

/// What the cuts did.
#[derive(Debug, Default)]
pub struct Measured {
    /// Times from the return of the line to the next answer of the kata agent, the shortest first.
    answers: Vec<Duration>,
    /// Streams that ended, each with the length of the cut.
    lost: Vec<String>,
}

impl Cuts {
    /// Runs them all.
    ///
    /// # Errors
    /// If a pod does not come up, or the line can't be cut. A lost stream is no error here: [`Measured::is_good`].
    pub async fn run(self) -> Result<Measured> {
        ensure!(self.count > 0 && self.longest >= SHORTEST, "cuts of 1 s or more are wanted");
        let mut lengths = self.lengths();
        lengths.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(SEED));
        let lengths = Arc::new(Mutex::new(VecDeque::from(lengths)));
        let mut pods = JoinSet::new();
        for _ in 0..PODS.min(self.count) {
            pods.spawn(one_pod(Arc::clone(&lengths)));
        }
        let mut all = Measured::default();
        while let Some(pod) = pods.join_next().await {
            let Measured { answers, lost } = pod??;
            all.answers.extend(answers);
            all.lost.extend(lost);
        }
        all.answers.sort_unstable();
        Ok(all)
    }

    /// The lengths, the shortest first.
    fn lengths(self) -> Vec<Duration> {
        let steps = u32::try_from(self.count.saturating_sub(1)).unwrap_or(u32::MAX).max(1);
        (0..self.count)
            .zip(0..)
            .map(|(_, step)| SHORTEST + (self.longest - SHORTEST) * step / steps)
            .collect()
    }
}

/// Cuts a pod again and again, until all lengths are taken. A pod that has lost a stream gets a successor.
async fn one_pod(lengths: Arc<Mutex<VecDeque<Duration>>>) -> Result<Measured> {
    let mut measured = Measured::default();
    let mut pod = None;
    loop {
        let next = lengths.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(length) = next else { break };
        let mut busy = match pod.take() {
            Some(busy) => busy,
            None => BusyPod::new(RunningPod::on_a_path().await?).await?,
        };
        let (answered, lost) = cut(&mut busy, length).await?;
        measured.answers.extend(answered);
        if lost.is_empty() {
            pod = Some(busy);
        }
        measured.lost.extend(lost.into_iter().map(|what| format!("cut of {length:.1?}: {what}")));
    }
    if let Some(busy) = pod {
        // Every byte of the streams, and the answers of the calls that were open all the time.
        busy.finish().await.context("after the last cut")?;
    }
    Ok(measured)
}

/// Cuts the line once. Returns the time from its return to the next answer, and the streams that have ended.
async fn cut(busy: &mut BusyPod, length: Duration) -> Result<(Option<Duration>, Vec<String>)> {
    let path = busy.pod.pod.path()?;
    path.drops(Drops::All).await?;
    sleep(length).await;
    // Before nftables lets packets pass: the figure is never too small.
    let back = Instant::now();
    path.drops(Drops::Nothing).await?;
    let check = timeout(ANSWER, busy.runtime.calls().check()).await;
    let answered = matches!(check, Ok(Ok(_))).then(|| back.elapsed());
    let runtime = match check {
        Ok(Ok(_)) => busy.runtime.lives(),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(anyhow!("no answer within {ANSWER:?}")),
    };
    let others = busy.steady.iter_mut().map(|steady| steady.lives());
    let lost: Vec<_> =
        std::iter::once(runtime).chain(others).filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    if lost.is_empty() {
        // New calls and streams, with every byte checked.
        busy.works().await.with_context(|| format!("after a cut of {length:.1?}"))?;
    }
    Ok((answered, lost))
}

impl Measured {
    /// Whether no stream was lost. A slow answer is no fault, as in the other measurements.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.lost.is_empty()
    }

    /// A table in Markdown, as the other groups have, and what was lost.
    #[must_use]
    pub fn table(&self, cuts: Cuts) -> String {
        let Cuts { count, longest } = cuts;
        let mut text = format!(
            "### {count} cuts of the line, of {} to {} s\n\n\
             | measured | unit | ours | goal | |\n| --- | --- | ---: | --- | --- |\n",
            SHORTEST.as_secs(),
            longest.as_secs()
        );
        let mut row = |name: &str, unit: &str, figure: &str, goal: Option<(String, bool)>| {
            let (goal, met) = goal.unwrap_or_else(|| ("less is better".to_owned(), true));
            let verdict = if met { "met" } else { "missed" };
            let verdict = if goal.starts_with("less") { "" } else { verdict };
            // Writing to a string can't fail.
            let _ = writeln!(text, "| {name} | {unit} | {figure} | {goal} | {verdict} |");
        };
        for (percent, goal) in [(50, Some(P50)), (99, Some(P99)), (100, None)] {
            let name = match percent {
                100 => "the same, at most".to_owned(),
                _ => format!("from the line's return to the kata agent's next answer, p{percent}"),
            };
            let figure = self.percentile(percent);
            let goal = goal.map(|goal| (format!("≤ {goal}"), figure <= goal));
            row(&name, "s", &format!("{figure:.3}"), goal);
        }
        let lost = format!("{} of {}", self.lost.len(), count * STREAMS);
        row("streams lost", "", &lost, Some(("0".to_owned(), self.is_good())));
        for lost in &self.lost {
            let _ = writeln!(text, "\nLOST: {lost}");
        }
        text
    }

    /// In seconds; not a number if nothing was answered.
    fn percentile(&self, percent: usize) -> f64 {
        // The nearest rank: of 16 cuts, p99 is the slowest.
        let rank = (self.answers.len() * percent).div_ceil(100).saturating_sub(1);
        self.answers.get(rank).map_or(f64::NAN, Duration::as_secs_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lengths_are_spread_from_the_shortest_to_the_longest() {
        let seconds = |count| {
            let lengths = Cuts { count, longest: Duration::from_secs(28) }.lengths();
            lengths.iter().map(Duration::as_secs).collect::<Vec<_>>()
        };
        assert_eq!(seconds(4), [1, 10, 19, 28]);
        assert_eq!(seconds(1), [1]);
    }

    #[test]
    fn a_lost_stream_and_a_slow_answer_show_in_the_table() {
        let cuts = Cuts { count: 4, longest: Duration::from_secs(28) };
        let milliseconds = |times: [u64; 4]| times.map(Duration::from_millis).to_vec();
        let mut measured = Measured { answers: milliseconds([80, 90, 100, 900]), lost: Vec::new() };
        let table = measured.table(cuts);
        for row in
            ["p50 | s | 0.090 | ≤ 0.3 | met |", "p99 | s | 0.900 | ≤ 1 | met |", "| 0 of 12 | 0 | met |"]
        {
            assert!(table.contains(row), "{row} in {table}");
        }
        assert!(measured.is_good());
        measured.answers = milliseconds([80, 400, 500, 1100]);
        measured.lost.push("cut of 9.0s: KATAAGENT".to_owned());
        let table = measured.table(cuts);
        for row in [
            "| 0.400 | ≤ 0.3 | missed |",
            "| 1.100 | ≤ 1 | missed |",
            "1 of 12 | 0 | missed |",
            "LOST: cut of",
        ] {
            assert!(table.contains(row), "{row} in {table}");
        }
        assert!(!measured.is_good());
    }
}
