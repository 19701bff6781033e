//! Lines of the machine's log: on standard error (the journal), and for faults also on the console, which a cloud shows even of a
//! machine that can't be reached.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

/// Limit of a line in bytes, without what precedes it.
const LINE_LIMIT: usize = 600;
/// Limit of distinct lines that are remembered, and so written, before [`Console::fatal`].
const LINES_LIMIT: usize = 100;

/// Where lines go.
pub struct Console {
    program: &'static str,
    log: Box<dyn Write>,
    console: Option<Box<dyn Write>>,
    written: BTreeSet<String>,
}

impl Console {
    /// Standard error and `/dev/console`, if it can be opened and is not what standard error is.
    #[must_use]
    pub fn of_machine(program: &'static str) -> Self {
        let console =
            open_console(Path::new("/dev/console")).map(|console| Box::new(console) as Box<dyn Write>);
        Self::new(program, Box::new(std::io::stderr()), console)
    }

    /// Writes to `log`, and faults to `console` as well.
    #[must_use]
    pub fn new(program: &'static str, log: Box<dyn Write>, console: Option<Box<dyn Write>>) -> Self {
        Self { program, log, console, written: BTreeSet::new() }
    }

    /// What was done; not for the console.
    pub fn note(&mut self, text: &str) {
        let line = self.line(text);
        self.write(&line, false);
    }

    /// A fault that may pass. The same one is written once.
    pub fn fault(&mut self, text: &str) {
        let line = self.line(text);
        if self.written.len() < LINES_LIMIT && self.written.insert(line.clone()) {
            self.write(&line, true);
        }
    }

    /// The fault that ends the program; always written.
    pub fn fatal(&mut self, text: &str) {
        let line = self.line(text);
        self.write(&line, true);
    }

    fn line(&self, text: &str) -> String {
        format!("{}: {}\n", self.program, one_line(text))
    }

    fn write(&mut self, line: &str, is_fault: bool) {
        // A log that is gone or full is no reason to stop: the machine may still come up.
        let _ = self.log.write_all(line.as_bytes());
        if let Some(console) = self.console.as_mut().filter(|_| is_fault) {
            // A console needs the carriage return if a program has set it to raw mode. It is as dispensable as the log.
            let _ = console.write_all(line.trim_end().as_bytes()).and_then(|()| console.write_all(b"\r\n"));
        }
    }
}

/// Without waiting: a serial console whose other end is stopped must not stop the boot.
fn open_console(path: &Path) -> Option<File> {
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let console = OpenOptions::new().append(true).custom_flags(flags.bits()).open(path).ok()?;
    let is_log = fs::metadata("/proc/self/fd/2").ok().zip(console.metadata().ok());
    match is_log {
        Some((log, console)) if log.rdev() == console.rdev() && log.rdev() != 0 => None,
        _ => Some(console),
    }
}

/// `text` on one line, of visible characters, and at most [`LINE_LIMIT`] bytes.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars() {
        if character.is_control() || !character.is_ascii() {
            // Writing to a String does not fail.
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
        if line.len() > LINE_LIMIT {
            line.push_str("...");
            break;
        }
    }
    line
}

/// An error with its causes, each once.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::rc::Rc;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Rc<RefCell<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn text(&self) -> String {
            String::from_utf8(self.0.borrow().clone()).unwrap()
        }
    }

    fn console() -> (Console, Written, Written) {
        let (log, console) = (Written::default(), Written::default());
        (Console::new("p", Box::new(log.clone()), Some(Box::new(console.clone()))), log, console)
    }

    #[test]
    fn a_repeated_fault_is_written_once() {
        let (mut lines, log, console) = console();
        for text in ["a", "b", "a", "b"] {
            lines.fault(text);
        }
        lines.note("n");
        lines.fatal("a");
        assert_eq!(log.text(), "p: a\np: b\np: n\np: a\n");
        assert_eq!(console.text(), "p: a\r\np: b\r\np: a\r\n");
    }

    #[test]
    fn ever_new_faults_end_at_the_limit() {
        let (mut lines, log, _) = console();
        for number in 0..10 * LINES_LIMIT {
            lines.fault(&number.to_string());
        }
        assert_eq!(log.text().lines().count(), LINES_LIMIT);
        lines.fatal("last");
        assert!(log.text().ends_with("p: last\n"));
    }

    #[test]
    fn a_line_is_one_visible_and_bounded() {
        let (mut lines, log, _) = console();
        lines.note(&format!("a\nb\x1b[2Jc\u{202e}{}", "d".repeat(5000)));
        let text = log.text();
        assert!(text.starts_with("p: a\\nb\\u{1b}[2Jc\\u{202e}ddd"), "{text}");
        assert!(text.ends_with("d...\n") && text.len() < LINE_LIMIT + 20 && text.lines().count() == 1);
    }
}
