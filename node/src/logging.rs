//! Log lines on stderr: one line for each event, also if it quotes a stranger's text.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use secure_comms_keys::text::escape;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

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
        match text {
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

/// Installs the log of the process. A second call changes nothing.
pub fn init(level: Level) {
    // At lower levels these crates log the data that they handle, keys and tokens included.
    let quiet = ["russh", "hyper", "hyper_util", "reqwest", "rustls"];
    let capped = level.0.min(LevelFilter::WARN);
    let filter = Targets::new().with_default(level.0).with_targets(quiet.map(|target| (target, capped)));
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(EscapedStderr);
    // Fails only if the process has a log already, as in a test that calls the library.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// Stderr, with control characters escaped.
struct EscapedStderr;

impl<'a> MakeWriter<'a> for EscapedStderr {
    type Writer = Escaped<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Escaped(io::stderr())
    }
}

/// Escapes every control character of an event, except the newline at its end. Each write is one event.
struct Escaped<W>(W);

impl<W: Write> Write for Escaped<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        self.0.write_all(format!("{}\n", escape(line)).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stays_one_line_with_any_text() {
        let mut out = Escaped(Vec::new());
        out.write_all("pod a\n2026 INFO forged\r\x1b[2J\u{9b}31m \u{e4}\n".as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8(out.0).unwrap(),
            "pod a\\n2026 INFO forged\\r\\u{1b}[2J\\u{9b}31m \u{e4}\n"
        );
    }
}
