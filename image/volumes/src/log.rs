//! Log lines, on standard error: systemd gives them to its journal and, where the unit says so, to the console.

use std::fmt;
use std::io::{self, Write};

use crate::text::message_line;

/// Writes a line.
pub fn line(text: fmt::Arguments<'_>) {
    // There is no other place to report that the log can't be written.
    drop(writeln!(io::stderr(), "podvm-volumes: {}", message_line(&text.to_string())));
}
