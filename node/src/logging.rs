//! The log on stderr: one line for each event, also if it quotes a stranger's text.

mod format;
pub mod names;
mod writer;

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::str::FromStr;

use nix::sys::stat::fstat;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

pub(crate) use self::format::now;
use self::format::{Entry, Style};
pub use self::writer::Writer;

/// The least severe level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(LevelFilter);

impl Default for Level {
    fn default() -> Self {
        Self(LevelFilter::INFO)
    }
}

/// The text is not a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected error, warn, info, debug or trace")]
pub struct LevelError;

impl FromStr for Level {
    type Err = LevelError;

    fn from_str(text: &str) -> Result<Self, LevelError> {
        match text.to_ascii_lowercase().as_str() {
            "error" => Ok(Self(LevelFilter::ERROR)),
            "warn" => Ok(Self(LevelFilter::WARN)),
            "info" => Ok(Self(LevelFilter::INFO)),
            "debug" => Ok(Self(LevelFilter::DEBUG)),
            "trace" => Ok(Self(LevelFilter::TRACE)),
            _ => Err(LevelError),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The form of the log's lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people: short on a terminal, with priorities for the journal, with full times elsewhere.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The text is not a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected text or json")]
pub struct LogFormatError;

impl FromStr for LogFormat {
    type Err = LogFormatError;

    fn from_str(text: &str) -> Result<Self, LogFormatError> {
        match text.to_ascii_lowercase().as_str() {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogFormatError),
        }
    }
}

/// Installs the log of the process, which goes to `stderr`. A second call changes nothing. `journal` is the value of
/// `JOURNAL_STREAM`.
pub fn init(level: Level, format: LogFormat, journal: Option<&str>, stderr: Writer) {
    let style = match format {
        LogFormat::Json => Style::Json,
        LogFormat::Text if is_journal(journal) => Style::Journal,
        LogFormat::Text if io::stderr().is_terminal() => Style::Terminal,
        LogFormat::Text => Style::Plain,
    };
    // At lower levels these crates log the data that they handle, keys and tokens included.
    let quiet = ["russh", "hyper", "hyper_util", "reqwest", "rustls"];
    let capped = level.0.min(LevelFilter::WARN);
    let filter = Targets::new().with_default(level.0).with_targets(quiet.map(|target| (target, capped)));
    let lines = Lines { style, stderr };
    // Fails only if the process has a log already, as in a test that calls the library.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// Whether stderr is the stream of systemd's journal that the variable names, as DEVICE:INODE. A program that we are
/// started by may have redirected stderr and left the variable.
fn is_journal(variable: Option<&str>) -> bool {
    let named = variable.and_then(|text| text.split_once(':'));
    let named = named.and_then(|(device, inode)| Some((device.parse().ok()?, inode.parse().ok()?)));
    let stderr = fstat(io::stderr().as_fd()).ok().map(|status| (status.st_dev, status.st_ino));
    named.is_some() && named == stderr
}

/// Writes each event of the process as a line.
struct Lines {
    style: Style,
    stderr: Writer,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.stderr.line(&self.style.line(&Entry::of(event)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_and_a_format_are_read_in_any_case() {
        assert_eq!("INFO".parse(), Ok(Level::default()));
        assert_eq!("Warn".parse(), Ok(Level(LevelFilter::WARN)));
        assert_eq!("JSON".parse(), Ok(LogFormat::Json));
        assert_eq!("loud".parse::<Level>(), Err(LevelError));
        assert_eq!("xml".parse::<LogFormat>(), Err(LogFormatError));
    }

    #[test]
    fn a_variable_left_from_another_stream_is_no_journal() {
        for variable in [None, Some(""), Some("8:1"), Some("x:y"), Some(":")] {
            assert!(!is_journal(variable), "{variable:?}");
        }
        let status = fstat(io::stderr().as_fd()).unwrap();
        assert!(is_journal(Some(&format!("{}:{}", status.st_dev, status.st_ino))));
    }
}
