//! The text of a log line, in each style.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use secure_comms_keys::text::one_line;
use secure_comms_protocol::PodId;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

use super::names;
use crate::init_data::PodName;

/// Most bytes of a line's text. The texts of strangers are bounded where they are received; this bounds the rest.
const TEXT_MAX: usize = 8192;
/// Digits of a pod's id on a terminal, as container runtimes show them.
const SHORT_ID: usize = 12;
/// Shortest id that is cut.
const LONG_ID: usize = 32;

/// The pod that a line is about, with its name where that is known.
pub(super) struct About {
    id: PodId,
    name: Option<PodName>,
}

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
    pod: Option<About>,
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
        let message = fields.message + &fields.others;
        let pod = pod_of(&message).and_then(|(id, _)| id.parse().ok());
        let pod = pod.map(|id| About { name: names::of(&id), id });
        Self { time: now(), level: *metadata.level(), target, message, pod }
    }

    /// The message, with the pod's name where it is known: `pod namespace/name (short id): ...`.
    fn named(&self) -> Cow<'_, str> {
        match (&self.pod, pod_of(&self.message)) {
            (Some(About { name: Some(name), .. }), Some((id, rest))) => {
                Cow::Owned(format!("pod {name} ({}):{rest}", short(id)))
            }
            _ => Cow::Borrowed(&self.message),
        }
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
        let text = || one_line(&format!("{}{}", entry.prefix(), entry.named()), TEXT_MAX);
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
            Self::Json => json_line(entry),
        }
    }
}

/// A JSON object on one line.
fn json_line(entry: &Entry) -> String {
    let mut fields: Vec<(&str, Value)> = vec![
        ("time", entry.time.as_str().into()),
        ("level", entry.level.as_str().to_ascii_lowercase().into()),
        ("target", one_line(&entry.target, TEXT_MAX).into()),
        ("message", one_line(&entry.message, TEXT_MAX).into()),
    ];
    if let Some(pod) = &entry.pod {
        fields.push(("pod", pod.id.as_str().into()));
        if let Some(name) = &pod.name {
            fields.extend([("namespace", name.namespace().into()), ("name", name.name().into())]);
        }
    }
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value));
    Value::Object(fields.collect::<Map<_, _>>()).to_string()
}

/// The pod that a message is about, and the rest: `pod ID: ...`.
fn pod_of(message: &str) -> Option<(&str, &str)> {
    message.strip_prefix("pod ")?.split_once(':')
}

fn short(id: &str) -> &str {
    let is_long = id.len() >= LONG_ID && id.bytes().all(|c| c.is_ascii_hexdigit());
    if is_long { id.get(..SHORT_ID).unwrap_or(id) } else { id }
}

/// Cuts a container's id after `pod `, which takes half a terminal's width.
fn with_short_id(text: &str) -> String {
    match pod_of(text) {
        Some((id, rest)) if short(id) != id => format!("pod {}:{rest}", short(id)),
        _ => text.to_owned(),
    }
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
        let pod = pod_of(message).and_then(|(id, _)| id.parse().ok()).map(|id| About { id, name: None });
        Entry { time, level, target: target.to_owned(), message: message.to_owned(), pod }
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
                "pod": "p",
            })
        );
    }

    #[test]
    fn a_pod_is_named_where_its_name_is_known() {
        let id = "0123456789abcdef".repeat(4);
        let mut up = entry(Level::INFO, OURS, &format!("pod {id}: stopped: at last"));
        up.pod.as_mut().unwrap().name = Some("shop/web-1".parse().unwrap());
        assert_eq!(Style::Terminal.line(&up), "00:38:11Z pod shop/web-1 (0123456789ab): stopped: at last");
        assert_eq!(Style::Journal.line(&up), "<6>pod shop/web-1 (0123456789ab): stopped: at last");
        let json: Value = serde_json::from_str(&Style::Json.line(&up)).unwrap();
        assert_eq!(
            (&json["pod"], &json["namespace"], &json["name"]),
            (&id.as_str().into(), &"shop".into(), &"web-1".into())
        );
        assert_eq!(json["message"], format!("pod {id}: stopped: at last"));
        let other = entry(Level::INFO, OURS, "pod /x: y");
        assert!(other.pod.is_none());
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
