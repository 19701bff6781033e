//! The text of a log line, in each style.

use std::fmt::{self, Write as _};

use secure_comms_keys::text::one_line;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// Most bytes of a line's text. The texts of strangers are bounded where they are received; this bounds the rest.
const TEXT_MAX: usize = 8192;
/// Digits of a pod's id on a terminal, as container runtimes show them.
const SHORT_ID: usize = 12;
/// Shortest id that is cut.
const LONG_ID: usize = 32;

/// How a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// For a person who looks on: `08:31:06Z pod 0123456789ab: ...`.
    Terminal,
    /// For systemd's journal: a priority (sd-daemon(3)) and the text. The journal adds the time and the name.
    Journal,
    /// For a file or another program.
    Plain,
    /// One JSON object a line.
    Json,
}

/// An event of the process.
pub(super) struct Entry {
    time: String,
    level: Level,
    target: String,
    message: String,
}

/// The time now, as RFC 3339 in UTC.
pub(crate) fn now() -> String {
    let mut time = String::new();
    // A String takes every text.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

impl Entry {
    pub(super) fn of(event: &Event<'_>) -> Self {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let target = fields.target.unwrap_or_else(|| metadata.target().to_owned());
        Self { time: now(), level: *metadata.level(), target, message: fields.message + &fields.others }
    }

    /// The target, if it helps: of other crates always, of ours for developers.
    fn prefix(&self) -> String {
        let ours = self.target.starts_with("secure_comms");
        let shown = if ours { self.level > Level::INFO } else { true };
        if shown { format!("{}: ", self.target) } else { String::new() }
    }
}

impl Style {
    /// The line of an event, without the newline.
    pub(super) fn line(self, entry: &Entry) -> String {
        let text = || one_line(&format!("{}{}", entry.prefix(), entry.message), TEXT_MAX);
        match self {
            Self::Terminal => {
                let label = match entry.level {
                    Level::INFO => "",
                    Level::ERROR => "error: ",
                    Level::WARN => "warning: ",
                    Level::DEBUG => "debug: ",
                    Level::TRACE => "trace: ",
                };
                let seconds = entry.time.get(11..19).unwrap_or_default();
                format!("{seconds}Z {label}{}", with_short_id(&text()))
            }
            Self::Journal => {
                let priority = match entry.level {
                    Level::ERROR => 3,
                    Level::WARN => 4,
                    Level::INFO => 6,
                    Level::DEBUG | Level::TRACE => 7,
                };
                format!("<{priority}>{}", text())
            }
            Self::Plain => format!("{} {:>5} {}", entry.time, entry.level, text()),
            Self::Json => json_line([
                ("time", entry.time.as_str().into()),
                ("level", entry.level.as_str().to_ascii_lowercase().into()),
                ("target", one_line(&entry.target, TEXT_MAX).into()),
                ("message", one_line(&entry.message, TEXT_MAX).into()),
            ]),
        }
    }
}

/// A JSON object on one line.
fn json_line<const N: usize>(fields: [(&str, Value); N]) -> String {
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value));
    Value::Object(fields.collect::<Map<_, _>>()).to_string()
}

/// Cuts a container's id after `pod `, which takes half a terminal's width.
fn with_short_id(text: &str) -> String {
    let cut = text.strip_prefix("pod ").and_then(|rest| {
        let (id, rest) = rest.split_once(':')?;
        let is_long = id.len() >= LONG_ID && id.bytes().all(|c| c.is_ascii_hexdigit());
        is_long.then(|| format!("pod {}:{rest}", id.get(..SHORT_ID).unwrap_or(id)))
    });
    cut.unwrap_or_else(|| text.to_owned())
}

/// The fields of an event. Those of a record of the `log` crate carry its target.
#[derive(Default)]
struct Fields {
    message: String,
    others: String,
    target: Option<String>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            "log.target" => self.target = Some(value.to_owned()),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // A String takes every text.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name if name.starts_with("log.") => Ok(()),
            name => write!(self.others, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(level: Level, target: &str, message: &str) -> Entry {
        let time = "2026-11-27T00:38:11.613407Z".to_owned();
        Entry { time, level, target: target.to_owned(), message: message.to_owned() }
    }

    const OURS: &str = "secure_comms_adaptor::pod";

    #[test]
    fn each_style_has_its_form() {
        let id = "0123456789abcdef".repeat(4);
        let up = entry(Level::INFO, OURS, &format!("pod {id}: kubernetes phase up at [::1]:2222"));
        let down = entry(Level::WARN, OURS, "pod p: channel down: no answer");
        let foreign = entry(Level::ERROR, "russh::client", "broken");
        let lines = |style: Style| [&up, &down, &foreign].map(|entry| style.line(entry));
        assert_eq!(
            lines(Style::Terminal),
            [
                "00:38:11Z pod 0123456789ab: kubernetes phase up at [::1]:2222",
                "00:38:11Z warning: pod p: channel down: no answer",
                "00:38:11Z error: russh::client: broken",
            ]
        );
        assert_eq!(
            lines(Style::Journal),
            [
                format!("<6>pod {id}: kubernetes phase up at [::1]:2222"),
                "<4>pod p: channel down: no answer".to_owned(),
                "<3>russh::client: broken".to_owned(),
            ]
        );
        assert_eq!(
            Style::Plain.line(&down),
            "2026-11-27T00:38:11.613407Z  WARN pod p: channel down: no answer"
        );
        let json: Value = serde_json::from_str(&Style::Json.line(&down)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "time": "2026-11-27T00:38:11.613407Z",
                "level": "warn",
                "target": OURS,
                "message": "pod p: channel down: no answer",
            })
        );
    }

    #[test]
    fn only_the_id_of_a_container_is_cut() {
        let long = "a".repeat(64);
        let name = "pod-with-a-very-long-name-that-is-no-container-id";
        for text in [format!("pod {name}: up"), format!("delete default/pp-{long}/privateKey: by hand")] {
            assert_eq!(with_short_id(&text), text);
        }
    }

    #[test]
    fn an_event_stays_one_line_with_any_text() {
        let forged = "pod a\n2026 INFO forged\r\x1b[2J\u{9b}31m\u{2028} \u{e4}";
        for style in [Style::Terminal, Style::Journal, Style::Plain, Style::Json] {
            let line = style.line(&entry(Level::INFO, OURS, forged));
            assert!(!line.contains(|c: char| c.is_control() || c == '\u{2028}'), "{line:?}");
            assert!(style.line(&entry(Level::INFO, OURS, &"\n".repeat(100_000))).len() < 3 * TEXT_MAX);
        }
        assert!(
            Style::Plain
                .line(&entry(Level::INFO, OURS, forged))
                .ends_with("pod a\\n2026 INFO forged\\r\\u{1b}[2J\\u{9b}31m\\u{2028} \u{e4}")
        );
    }
}
