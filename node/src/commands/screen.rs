//! What a person reads: tables as kubectl's, ages, colours on a terminal only. Names come from pods, so nothing reaches a
//! terminal as it is.

use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use secure_comms_keys::text::one_line;

use crate::doctor::Marks;
use crate::settings::Env;

/// Longest cell of a table, in bytes: a namespace and a name have at most 253 each.
const CELL_MAX: usize = 512;
/// Between two columns.
const GAP: &str = "   ";
/// What stands for an absent value, as kubectl has it.
pub(super) const NONE: &str = "<none>";

/// Writes a line to standard error.
pub(super) fn note(text: &str) {
    // Standard error may be closed; the exit code does not depend on it.
    let _ = writeln!(io::stderr(), "{text}");
}

/// A colour of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
}

/// What the terminal can show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    colours: bool,
    utf8: bool,
}

impl Screen {
    /// That of standard output. NO_COLOR (no-color.org) switches colours off.
    pub(super) fn of_stdout(env: Env<'_>) -> Self {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        // The first that is set counts, as setlocale(3) has it.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set);
        let locale = locale.map(|locale| locale.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        Self {
            colours: io::stdout().is_terminal() && !dumb && set("NO_COLOR").is_none(),
            utf8: locale.contains("utf-8") || locale.contains("utf8"),
        }
    }

    /// The marks before the lines of a report.
    pub(super) fn marks(self) -> Marks {
        Marks { utf8: self.utf8, colours: self.colours }
    }

    /// A text in a colour, where there are colours.
    pub(super) fn paint(self, text: &str, colour: Option<Colour>) -> String {
        let code = match colour {
            Some(Colour::Green) => 32,
            Some(Colour::Yellow) => 33,
            Some(Colour::Red) => 31,
            None => return text.to_owned(),
        };
        if self.colours { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Writes to standard output. False: its reader is gone, as `head` is after its last line; nothing is wrong then, and
/// nothing more is to be written.
///
/// # Errors
/// It cannot be written, as on a full disk.
pub(super) fn show(text: &str) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("write to standard output"),
    }
}

/// A text of a stranger, as one line that is fit for a terminal.
pub(super) fn clean(text: &str) -> String {
    one_line(text, CELL_MAX)
}

/// A table.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: Vec<Vec<(String, Option<Colour>)>>,
}

impl Table {
    /// A table with a line of headers.
    pub(super) fn with_headers(headers: &[&str]) -> Self {
        let mut table = Self::default();
        table.row(headers.iter().map(|header| ((*header).to_owned(), None)));
        table
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = (String, Option<Colour>)>) {
        let clean = |(text, colour): (String, _)| (clean(if text.is_empty() { NONE } else { &text }), colour);
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    /// Its lines, each after `indent`.
    pub(super) fn to_text(&self, screen: Screen, indent: &str) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|(text, _)| text.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut lines = String::new();
        for row in &self.rows {
            lines.push_str(indent);
            for (at, ((text, colour), width)) in row.iter().zip(&widths).enumerate() {
                lines.push_str(&screen.paint(text, *colour));
                if at + 1 < row.len() {
                    lines.push_str(&" ".repeat(width - text.chars().count()));
                    lines.push_str(GAP);
                }
            }
            lines.push('\n');
        }
        lines
    }
}

/// The time since `then`, as kubectl prints ages: two units while they matter.
pub(super) fn age(then: SystemTime, now: SystemTime) -> String {
    match now.duration_since(then) {
        Ok(age) => in_units(age),
        // The clock was set back; or it was read a moment too late.
        Err(ahead) if ahead.duration() < Duration::from_secs(2) => "0s".to_owned(),
        Err(_) => "<invalid>".to_owned(),
    }
}

/// As HumanDuration of k8s.io/apimachinery, so that both show one pod's age alike.
fn in_units(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |count: u64, unit: char, rest: u64, small: char| {
        if rest == 0 { format!("{count}{unit}") } else { format!("{count}{unit}{rest}{small}") }
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 192 => two(days, 'd', hours % 24, 'h'),
        () if days < 730 => format!("{days}d"),
        () if days < 2920 => two(days / 365, 'y', days % 365, 'd'),
        () => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    const PLAIN: Screen = Screen { colours: false, utf8: true };

    #[test]
    fn ages_are_those_of_kubectl() {
        const HOUR: u64 = 3600;
        const DAY: u64 = 24 * HOUR;
        for (seconds, text) in [
            (0, "0s"),
            (5, "5s"),
            (119, "119s"),
            (120, "2m"),
            (200, "3m20s"),
            (599, "9m59s"),
            (600, "10m"),
            (179 * 60, "179m"),
            (3 * HOUR, "3h"),
            (3 * HOUR + 61, "3h1m"),
            (8 * HOUR + 60, "8h"),
            (47 * HOUR, "47h"),
            (2 * DAY, "2d"),
            (2 * DAY + HOUR, "2d1h"),
            (8 * DAY + HOUR, "8d"),
            (729 * DAY, "729d"),
            (730 * DAY, "2y"),
            (731 * DAY, "2y1d"),
            (3000 * DAY, "8y"),
        ] {
            assert_eq!(in_units(Duration::from_secs(seconds)), text, "{seconds}");
        }
        let now = SystemTime::now();
        assert_eq!(age(now + Duration::from_secs(1), now), "0s");
        assert_eq!(age(now + Duration::from_secs(60), now), "<invalid>");
    }

    #[test]
    fn a_table_is_aligned_and_clean() {
        let mut table = Table::with_headers(&["NAME", "PHASE"]);
        table.row([("a\u{1b}[2J\nb".to_owned(), None), ("Up".to_owned(), Some(Colour::Green))]);
        table.row([("ü".to_owned(), None), (String::new(), None)]);
        assert_eq!(
            table.to_text(PLAIN, ""),
            "NAME            PHASE\na\\u{1b}[2J\\nb   Up\nü               <none>\n"
        );
    }

    #[test]
    fn a_colour_does_not_move_the_columns() {
        let screen = Screen { colours: true, utf8: true };
        let mut table = Table::default();
        table.row([("Up".to_owned(), Some(Colour::Green)), ("1".to_owned(), None)]);
        table.row([("Failed".to_owned(), Some(Colour::Red)), ("2".to_owned(), None)]);
        let text = table.to_text(screen, "");
        assert_eq!(text, "\u{1b}[32mUp\u{1b}[0m       1\n\u{1b}[31mFailed\u{1b}[0m   2\n");
    }

    #[test]
    fn the_locale_decides_what_is_shown() {
        let utf8 = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> =
                set.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
            Screen::of_stdout(&move |name| {
                set.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
            })
            .utf8
        };
        assert!(utf8(&[("LANG", "de_DE.UTF-8")]));
        assert!(utf8(&[("LC_ALL", "C.utf8"), ("LANG", "C")]));
        assert!(!utf8(&[("LC_ALL", "C"), ("LANG", "de_DE.UTF-8")]));
        assert!(utf8(&[("LC_ALL", ""), ("LANG", "en_US.utf8")]));
        assert!(!utf8(&[]));
    }
}
