//! What was found, and how it is shown.

use std::fmt::Write as _;

use secure_comms_keys::text::one_line;
use serde::Serialize;

/// Longest text of a finding that is shown, in bytes.
const TEXT_MAX: usize = 600;

/// The outcome of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works, or may work, but not as it should.
    Warning {
        /// What was found.
        found: String,
        /// What to do.
        fix: String,
    },
    /// It cannot work.
    Fault {
        /// What was found.
        found: String,
        /// What to do.
        fix: String,
    },
    /// It could not be looked at.
    NotChecked {
        /// Why.
        reason: String,
    },
}

/// A check, and its outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's word, which stays the same over releases.
    pub check: &'static str,
    /// What is checked, with what was found if it is as it should be.
    pub title: String,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Finding {
    /// It is as it should be.
    pub fn ok(check: &'static str, title: impl Into<String>) -> Self {
        Self::new(check, title, Outcome::Ok)
    }

    /// It is not quite as it should be.
    pub fn warning(
        check: &'static str,
        title: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(check, title, Outcome::Warning { found: line(found), fix: line(fix) })
    }

    /// It cannot work.
    pub fn fault(
        check: &'static str,
        title: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(check, title, Outcome::Fault { found: line(found), fix: line(fix) })
    }

    /// It could not be looked at.
    pub fn not_checked(check: &'static str, title: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::new(check, title, Outcome::NotChecked { reason: line(reason) })
    }

    fn new(check: &'static str, title: impl Into<String>, outcome: Outcome) -> Self {
        Self { check, title: line(title), outcome }
    }
}

/// Peers and files have a say in the texts: nothing in them reaches a terminal as it is.
fn line(text: impl Into<String>) -> String {
    one_line(&text.into(), TEXT_MAX)
}

/// Checks of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// What they are about.
    pub name: &'static str,
    /// The findings, in the order in which they depend on each other.
    pub findings: Vec<Finding>,
}

/// All that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The groups.
    pub groups: Vec<Group>,
}

/// The marks before each line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Whether the terminal shows more than ASCII.
    pub utf8: bool,
    /// Whether it shows colours.
    pub colours: bool,
}

impl Marks {
    /// The mark of an outcome.
    pub fn of(self, outcome: &Outcome) -> String {
        let (mark, ascii, colour) = match outcome {
            Outcome::Ok => ("√", "ok", "32"),
            Outcome::Warning { .. } => ("‼", "!!", "33"),
            Outcome::Fault { .. } => ("×", "xx", "31"),
            Outcome::NotChecked { .. } => ("-", "--", "2"),
        };
        let mark = if self.utf8 { mark } else { ascii };
        if self.colours { format!("\u{1b}[{colour}m{mark}\u{1b}[0m") } else { mark.to_owned() }
    }
}

impl Report {
    /// Adds a group.
    pub fn add(&mut self, name: &'static str, findings: Vec<Finding>) {
        self.groups.push(Group { name, findings });
    }

    /// Whether something cannot work.
    pub fn has_faults(&self) -> bool {
        self.count(|outcome| matches!(outcome, Outcome::Fault { .. })) > 0
    }

    fn count(&self, which: fn(&Outcome) -> bool) -> usize {
        self.groups.iter().flat_map(|group| &group.findings).filter(|finding| which(&finding.outcome)).count()
    }

    /// For people: a line for each check, and more below it where something is wrong.
    pub fn to_text(&self, marks: Marks) -> String {
        let mut text = String::new();
        for Group { name, findings } in &self.groups {
            // Writing to a String cannot fail, here and below.
            let _ = writeln!(text, "{name}\n{}", "-".repeat(name.chars().count()));
            for Finding { title, outcome, .. } in findings {
                let _ = writeln!(text, "{} {title}", marks.of(outcome));
                let _ = match outcome {
                    Outcome::Ok => Ok(()),
                    Outcome::Warning { found, fix } | Outcome::Fault { found, fix } => {
                        writeln!(text, "    {found}\n    fix: {fix}")
                    }
                    Outcome::NotChecked { reason } => writeln!(text, "    not checked: {reason}"),
                };
            }
            text.push('\n');
        }
        text + &self.summary() + "\n"
    }

    fn summary(&self) -> String {
        let counts = [
            (self.count(|outcome| matches!(outcome, Outcome::Fault { .. })), "fault", "faults"),
            (self.count(|outcome| matches!(outcome, Outcome::Warning { .. })), "warning", "warnings"),
            (
                self.count(|outcome| matches!(outcome, Outcome::NotChecked { .. })),
                "check not made",
                "checks not made",
            ),
        ];
        let counts = counts.into_iter().filter(|(count, ..)| *count > 0);
        let texts: Vec<_> = counts
            .map(|(count, one, many)| format!("{count} {}", if count == 1 { one } else { many }))
            .collect();
        if texts.is_empty() { "nothing is wrong".to_owned() } else { texts.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.add(
            "store",
            vec![
                Finding::ok("store-private", "it is private"),
                Finding::fault(
                    "store-writable",
                    "it can be written",
                    "read-only\n\u{1b}[2J",
                    "mount it read-write",
                ),
                Finding::warning("store-space", "there is room", "3 MiB", "make room"),
                Finding::not_checked("store-x", "x", "not root"),
            ],
        );
        report
    }

    #[test]
    fn a_report_has_a_line_a_mark_and_a_fix() {
        let text = report().to_text(Marks { utf8: true, colours: false });
        let expected = "store\n-----\n√ it is private\n× it can be written\n    read-only\\n\\u{1b}[2J\n    \
                        fix: mount it read-write\n‼ there is room\n    3 MiB\n    fix: make room\n- x\n    \
                        not checked: not root\n\n1 fault, 1 warning, 1 check not made\n";
        assert_eq!(text, expected);
        assert!(report().has_faults());
    }

    #[test]
    fn marks_are_ascii_where_the_terminal_is() {
        let text = report().to_text(Marks { utf8: false, colours: false });
        assert!(text.is_ascii() && text.contains("\nok it is private\nxx it can"), "{text}");
        let coloured = report().to_text(Marks { utf8: false, colours: true });
        assert!(coloured.contains("\u{1b}[31mxx\u{1b}[0m it can"), "{coloured}");
    }

    #[test]
    fn a_report_without_faults_says_so() {
        let mut report = Report::default();
        report.add("a", vec![Finding::ok("b", "c")]);
        assert!(report.to_text(Marks { utf8: true, colours: false }).ends_with("\n\nnothing is wrong\n"));
        assert!(!report.has_faults());
    }

    #[test]
    fn json_has_the_outcome_in_a_word() {
        let json = serde_json::to_value(report()).unwrap();
        let finding = &json["groups"][0]["findings"][1];
        assert_eq!(finding["outcome"], "fault");
        assert_eq!(finding["check"], "store-writable");
        assert_eq!(finding["fix"], "mount it read-write");
    }
}
