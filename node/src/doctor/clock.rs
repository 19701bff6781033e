//! The clock of this node. The KBS refuses an admin token from its future or its far past.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::processes::Processes;
use super::report::Finding;

/// A difference from which an admin token may be refused.
const SKEW_MAX: Duration = Duration::from_secs(30);
/// Written by systemd-timesyncd when it has set the clock.
const TIMESYNCD: &str = "/run/systemd/timesync/synchronized";
/// Programs that keep the clock.
const KEEPERS: [&str; 5] = ["chronyd", "ntpd", "ntpd-rs", "ptp4l", "phc2sys"];

/// Looks for what keeps the clock. The kernel says whether it is synchronised by adjtimex(2) only, which needs unsafe code;
/// so this says what was looked at.
pub(super) fn check(processes: &Processes) -> Finding {
    keeper(Path::new(TIMESYNCD), processes)
}

fn keeper(timesyncd: &Path, processes: &Processes) -> Finding {
    const CHECK: &str = "clock-kept";
    if timesyncd.exists() {
        return Finding::ok(CHECK, "the clock is synchronised, as systemd-timesyncd says");
    }
    let keeper = KEEPERS.into_iter().find(|name| !processes.named(name).is_empty());
    match keeper {
        Some(name) => Finding::ok(CHECK, format!("the clock is kept: {name} runs")),
        None => Finding::warning(
            CHECK,
            "the clock is kept",
            "neither systemd-timesyncd's mark nor a process of chronyd, ntpd, ntpd-rs, ptp4l or phc2sys was found; in a \
             container they may be hidden",
            "on the node: timedatectl; then enable systemd-timesyncd or chrony",
        ),
    }
}

/// Compares our clock with the KBS's, as its answer's header `Date` has it, in whole seconds.
pub(super) fn skew(date: Option<&str>, now: SystemTime) -> Finding {
    const CHECK: &str = "kbs-clock";
    let title = "our clock agrees with the KBS's";
    let Some(date) = date else { return Finding::not_checked(CHECK, title, "its answer has no header Date") };
    let Ok(theirs) = httpdate::parse_http_date(date) else {
        return Finding::not_checked(CHECK, title, format!("its header Date cannot be read: {date}"));
    };
    let (apart, which) = match now.duration_since(theirs) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    };
    if apart > SKEW_MAX {
        let found =
            format!("our clock is {} s {which} the KBS's: it may refuse our admin token", apart.as_secs());
        return Finding::fault(CHECK, title, found, "set the clock here or there: timedatectl on both");
    }
    Finding::ok(CHECK, format!("{title}, within {} s", apart.as_secs().max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn a_clock_that_is_off_is_a_fault() {
        let date = "Fri, 27 Nov 2026 18:57:00 GMT";
        let theirs = httpdate::parse_http_date(date).unwrap();
        assert_eq!(skew(Some(date), theirs + Duration::from_secs(2)).outcome, Outcome::Ok);
        assert_eq!(skew(Some(date), theirs - Duration::from_secs(2)).outcome, Outcome::Ok);
        for (now, word) in [
            (theirs + Duration::from_secs(3600), "3600 s ahead"),
            (theirs - Duration::from_secs(40), "40 s behind"),
        ] {
            let Outcome::Fault { found, .. } = skew(Some(date), now).outcome else { panic!() };
            assert!(found.contains(word), "{found}");
        }
        for date in [None, Some("yesterday")] {
            assert!(matches!(skew(date, theirs).outcome, Outcome::NotChecked { .. }));
        }
    }

    #[test]
    fn something_must_keep_the_clock() {
        let dir = tempfile::tempdir().unwrap();
        let processes = Processes::of(dir.path());
        let mark = dir.path().join("synchronized");
        assert!(matches!(keeper(&mark, &processes).outcome, Outcome::Warning { .. }));
        std::fs::create_dir(dir.path().join("77")).unwrap();
        std::fs::write(dir.path().join("77/comm"), "chronyd\n").unwrap();
        assert!(keeper(&mark, &processes).title.contains("chronyd"));
        std::fs::write(&mark, "").unwrap();
        assert!(keeper(&mark, &processes).title.contains("systemd-timesyncd"));
    }
}
