//! The lines of the agent's log that it sends for the operator, shown once each, as the VM's.
//!
//! They come from a proven agent, but a VM may be compromised after its attestation: the connection sanitizes their texts, and
//! their number is limited here, whatever the VM sends.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use secure_comms_protocol::control::LogLine;
use secure_comms_protocol::limits::LOG_KEPT;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::status::{PodEvent, StatusReporter, VmLine};

/// Lines that may be shown at once: all that an agent keeps, and some new ones.
const BURST: u32 = LOG_KEPT as u32 + 10;
/// Time after which one more may be shown.
const REFILL: Duration = Duration::from_secs(1);
/// What was shown of a pod's VM, over all its connections.
#[derive(Debug)]
pub(super) struct VmLog {
    /// The process of the agent that the lines are numbered in.
    instance: String,
    /// Number of the last line that was shown.
    last: u64,
    /// Lines that may be shown now.
    budget: u32,
    refilled: Instant,
}

impl Default for VmLog {
    fn default() -> Self {
        Self { instance: String::new(), last: 0, budget: BURST, refilled: Instant::now() }
    }
}

impl VmLog {
    /// Shows the lines of one connection to the agent's process `instance`. Never returns; dropping the future loses no
    /// line that was received.
    pub(super) async fn show(
        &mut self,
        lines: Option<mpsc::Receiver<LogLine>>,
        instance: &str,
        status: &StatusReporter,
    ) -> Infallible {
        if self.instance != instance {
            (self.instance, self.last) = (instance.to_owned(), 0);
        }
        if let Some(mut lines) = lines {
            while let Some(line) = lines.recv().await {
                if let Some(line) = self.take(&line) {
                    status.emit(&PodEvent::VmLog(line));
                }
            }
        }
        pending().await
    }

    /// The line to show, unless it was shown before, or too many were.
    fn take(&mut self, line: &LogLine) -> Option<VmLine> {
        let missed = line.seq.checked_sub(self.last + 1)?;
        let refills = u32::try_from(self.refilled.elapsed().as_secs() / REFILL.as_secs()).unwrap_or(BURST);
        if refills > 0 {
            self.budget = self.budget.saturating_add(refills).min(BURST);
            self.refilled = Instant::now();
        }
        // A line that is left out is counted by the next one that is shown.
        self.budget = self.budget.checked_sub(1)?;
        // The last number of all leaves none for a next line.
        self.last = line.seq.min(u64::MAX - 1);
        let is_warning = matches!(line.level.as_str(), "warning" | "error");
        Some(VmLine { is_warning, text: line.text.clone(), age: line.age, missed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seq: u64) -> LogLine {
        LogLine { seq, age: 0, level: "warning".into(), text: format!("line {seq}") }
    }

    fn shown(log: &mut VmLog, seq: u64) -> Option<String> {
        log.take(&line(seq)).map(|line| line.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn each_line_is_shown_once_and_gaps_are_counted() {
        let mut log = VmLog::default();
        assert_eq!(shown(&mut log, 1).unwrap(), "VM: line 1");
        assert_eq!(shown(&mut log, 1), None, "after a reconnect");
        assert_eq!(shown(&mut log, 2).unwrap(), "VM: line 2");
        assert_eq!(shown(&mut log, 4).unwrap(), "VM: line 4 (1 line before it was left out)");
        assert_eq!(shown(&mut log, 3), None, "an older one");
        assert_eq!(shown(&mut log, 9).unwrap(), "VM: line 9 (4 lines before it were left out)");
        assert_eq!(shown(&mut log, 0), None);
        assert!(shown(&mut log, u64::MAX).is_some());
        assert_eq!(shown(&mut log, u64::MAX - 1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_limited_and_what_it_lost_is_said() {
        let mut log = VmLog::default();
        let count = (1..=10_000).filter(|seq| log.take(&line(*seq)).is_some()).count();
        assert_eq!(count, BURST as usize);
        tokio::time::advance(2 * REFILL).await;
        let next = log.take(&line(10_001)).unwrap();
        assert_eq!(next.missed, 10_000 - u64::from(BURST));
        assert!(log.take(&line(10_002)).is_some() && log.take(&line(10_003)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_line_says_its_age_and_an_unknown_level_is_no_warning() {
        let mut log = VmLog::default();
        let old = LogLine { age: 12, level: "notice".into(), ..line(1) };
        let shown = log.take(&old).unwrap();
        assert!(!shown.is_warning && shown.to_string() == "VM: line 1 (12 s ago)");
    }
}
