//! Summary of many lifetimes.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::lifetime::{GOAL, Outcome};
use super::resources::Resources;

/// Sum of many lifetimes.
#[derive(Debug, Default)]
pub struct Report {
    lifetimes: usize,
    failed: Vec<u64>,
    recoveries: Vec<Duration>,
    finished: u64,
    by_network: usize,
    by_others: u64,
    old: Option<Old>,
    bytes: u64,
    agent: Resources,
    adaptor: Resources,
}

/// Connections of clients that the same lifetimes ended with the programs of an earlier version.
#[derive(Clone, Copy, Debug, Default)]
struct Old {
    by_network: usize,
    by_others: u64,
}

impl Report {
    /// Adds the same lifetime with the programs of an earlier version: only the connections that it ended count.
    pub fn add_old(&mut self, outcome: &Outcome) {
        let old = self.old.get_or_insert_default();
        old.by_network += outcome.ended.by_network.len();
        old.by_others += outcome.ended.by_others;
    }

    /// Adds a lifetime; returns its report: one line, or several if it failed or was slow.
    pub fn add(&mut self, outcome: &Outcome) -> String {
        self.lifetimes += 1;
        self.recoveries.extend(outcome.recovery);
        self.finished += outcome.seen.finished;
        self.by_network += outcome.ended.by_network.len();
        self.by_others += outcome.ended.by_others;
        self.bytes += outcome.seen.bytes;
        self.agent = self.agent.max(outcome.agent);
        self.adaptor = self.adaptor.max(outcome.adaptor);
        let seed = outcome.script.seed;
        let came_up = outcome.recovery.map(|time| format!("up in {:.2} s", time.as_secs_f64()));
        let mut text = format!("{seed}: {} {}", outcome.script, came_up.as_deref().unwrap_or("never up"));
        if outcome.recovery.is_some_and(|time| time > GOAL) {
            text += &format!("\n  SLOW: more than {} s{}", GOAL.as_secs(), kept(outcome));
        }
        let ended = outcome.ended.by_network.iter();
        let ended = ended.map(|what| format!("{what}, which no fault but one of the network can have ended"));
        let violations: Vec<_> = outcome.violations.iter().cloned().chain(ended).collect();
        if !violations.is_empty() {
            self.failed.push(seed);
            for violation in violations {
                text += &format!("\n  FAILED: {violation}");
            }
            text += &format!("\n  run again: tests/chaos 1 --seed {seed}{}", kept(outcome));
        }
        text
    }

    /// Whether no lifetime failed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failed.is_empty()
    }
}

/// Writes the logs to a file, for analysis.
fn kept(outcome: &Outcome) -> String {
    let path: PathBuf = std::env::temp_dir().join(format!("secure-comms-chaos-{}.log", outcome.script.seed));
    let text = format!("{}\n{}\n{}", outcome.script, outcome.violations.join("\n"), outcome.logs);
    match std::fs::write(&path, text) {
        Ok(()) => format!("; logs in {}", path.display()),
        Err(error) => format!("; {}: {error}", path.display()),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut recoveries: Vec<_> = self.recoveries.iter().map(Duration::as_secs_f64).collect();
        recoveries.sort_by(f64::total_cmp);
        let part = |percent: usize| {
            let last = recoveries.len().saturating_sub(1);
            recoveries.get(last * percent / 100).copied().unwrap_or_default()
        };
        let slow = recoveries.iter().filter(|time| **time > GOAL.as_secs_f64()).count();
        writeln!(f, "lifetimes                 {}", self.lifetimes)?;
        writeln!(f, "failed                    {} {:?}", self.failed.len(), self.failed)?;
        writeln!(
            f,
            "up after the last fault   p50 {:.2} s, p90 {:.2} s, p99 {:.2} s, max {:.2} s; {slow} above {} s",
            part(50),
            part(90),
            part(99),
            part(100),
            GOAL.as_secs()
        )?;
        let Old { by_network, by_others } = self.old.unwrap_or_default();
        let old = |count: &dyn fmt::Display| match self.old {
            Some(_) => format!(" (of the old programs {count})"),
            None => String::new(),
        };
        let excused = "after a process or server ended, or before the pod was up";
        writeln!(f, "connections               {} completed", self.finished)?;
        writeln!(f, "ended by the network      {}{}; 0 is required", self.by_network, old(&by_network))?;
        writeln!(f, "ended by other faults     {}{}: {excused}", self.by_others, old(&by_others))?;
        writeln!(
            f,
            "bytes there and back      {:.1} MiB, each checked",
            self.bytes as f64 / (1 << 20) as f64
        )?;
        writeln!(f, "agent, idle, at most      {}", self.agent)?;
        write!(f, "adaptor, idle, at most    {}", self.adaptor)
    }
}

#[cfg(test)]
mod tests {
    use super::super::lifetime::Ended;
    use super::super::script::Script;
    use super::super::traffic::Seen;
    use super::*;

    fn outcome(seconds: u64, violations: &[&str]) -> Outcome {
        Outcome {
            script: Script::draw(seconds),
            recovery: Some(Duration::from_secs(seconds)),
            seen: Seen::default(),
            ended: Ended::default(),
            agent: Resources::default(),
            adaptor: Resources::default(),
            violations: violations.iter().map(|text| (*text).to_owned()).collect(),
            logs: String::new(),
        }
    }

    #[test]
    fn a_violation_is_reported_with_the_command_that_repeats_it() {
        let mut report = Report::default();
        report.add(&outcome(1, &[]));
        assert!(report.is_good());
        let text = report.add(&outcome(2, &["a byte was lost"]));
        assert!(!report.is_good());
        for part in ["FAILED: a byte was lost", "tests/chaos 1 --seed 2"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_connection_that_the_network_ended_fails_the_run() {
        let mut report = Report::default();
        let mut ended = outcome(1, &[]);
        ended.ended.by_others = 3;
        report.add_old(&ended);
        report.add(&ended);
        assert!(report.is_good());
        ended.ended.by_network.push("a client of KATAAGENT: reset".to_owned());
        report.add_old(&ended);
        assert!(report.is_good(), "old programs may lose connections");
        let text = report.add(&ended);
        assert!(!report.is_good() && text.contains("FAILED: a client of KATAAGENT: reset"), "{text}");
        let summary = report.to_string();
        for line in
            ["ended by the network      1 (of the old programs 1)", "faults     6 (of the old programs 6)"]
        {
            assert!(summary.contains(line), "{summary}");
        }
    }

    #[test]
    fn a_slow_lifetime_is_reported_and_does_not_fail() {
        let mut report = Report::default();
        let text = report.add(&outcome(11, &[]));
        assert!(text.contains("SLOW: more than 10 s"), "{text}");
        assert!(report.is_good() && report.to_string().contains("max 11.00 s; 1 above 10 s"));
    }
}
