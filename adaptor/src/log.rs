//! Log lines on stderr, one for each event, whatever strangers write into them.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use secure_comms_keys::text::escape;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(LevelFilter);

impl Default for Level {
    fn default() -> Self {
        Self(LevelFilter::INFO)
    }
}

/// Why a text is not a level.
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

/// Starts logging. A second call changes nothing.
pub fn init(level: Level) {
    // Their lower levels show what passes through them, keys and tokens included.
    let quiet = ["russh", "hyper", "hyper_util", "reqwest", "rustls"];
    let capped = level.0.min(LevelFilter::WARN);
    let filter = Targets::new().with_default(level.0).with_targets(quiet.map(|target| (target, capped)));
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(EscapedStderr);
    // Fails only if there is a log already (a test that runs us as a library).
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// Stderr without control characters.
struct EscapedStderr;

impl<'a> MakeWriter<'a> for EscapedStderr {
    type Writer = Escaped<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Escaped(io::stderr())
    }
}

/// Escapes every control character of what is written at once, but for the newline at its end.
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
    fn an_event_stays_one_line_whatever_it_says() {
        let mut out = Escaped(Vec::new());
        out.write_all("pod a\n2026 INFO forged\r\x1b[2J\u{9b}31m \u{e4}\n".as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8(out.0).unwrap(),
            "pod a\\n2026 INFO forged\\r\\u{1b}[2J\\u{9b}31m \u{e4}\n"
        );
    }
}
