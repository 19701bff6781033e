//! From bytes to lines: what is not text is refused by its kind.

use super::error::{CloudConfigError, Fault};

/// The shortest text that is taken for base64, in bytes: shorter ones are words.
const BASE64_MIN: usize = 16;

/// The text of `bytes` without its byte order mark.
pub(super) fn of(bytes: &[u8]) -> Result<&str, CloudConfigError> {
    if let Some(kind) = kind(bytes) {
        return Err(CloudConfigError::new(kind));
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            // Without a length the text ends within a character.
            let unfinished = error.error_len().is_none().then_some(line);
            return Err(CloudConfigError::at(line, Fault::NotUtf8).cut_at(unfinished));
        }
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (line, text) in (1..).zip(text.split_inclusive('\n')) {
        let text = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
        if let Some(fault) = text.chars().find_map(forbidden) {
            return Err(CloudConfigError::at(line, fault).cut_at(unfinished_line(bytes)));
        }
    }
    Ok(text)
}

/// The number of the last line, if no line break ends it.
pub(super) fn unfinished_line(bytes: &[u8]) -> Option<usize> {
    (!bytes.ends_with(b"\n")).then(|| 1 + bytes.iter().filter(|byte| **byte == b'\n').count())
}

/// The kind of what is no text, or another text than cloud-config.
fn kind(bytes: &[u8]) -> Option<Fault> {
    let starts_with =
        |word: &str| bytes.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()));
    if bytes.starts_with(&[0x1f, 0x8b]) {
        Some(Fault::Gzip)
    } else if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        Some(Fault::Utf16)
    } else if starts_with("content-type:") || starts_with("mime-version:") {
        Some(Fault::Mime)
    } else if is_base64(bytes) {
        Some(Fault::Base64)
    } else {
        None
    }
}

fn is_base64(bytes: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=\r\n".contains(byte);
    bytes.len() >= BASE64_MIN && bytes.iter().all(is_digit)
}

/// YAML's rule for what is printable.
fn forbidden(character: char) -> Option<Fault> {
    match character {
        '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => Some(Fault::LineBreak),
        '\t' => None,
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => Some(Fault::ControlCharacter),
        _ => None,
    }
}

/// A line without its line break.
#[derive(Clone, Copy)]
pub(super) struct Line<'t> {
    /// Its number, from 1.
    pub(super) number: usize,
    pub(super) text: &'t str,
    /// Whether a line break ends it.
    pub(super) is_ended: bool,
}

impl<'t> Line<'t> {
    /// How many spaces begin it.
    pub(super) fn indent(&self) -> usize {
        self.text.len() - self.content().len()
    }

    /// What comes after those.
    pub(super) fn content(&self) -> &'t str {
        self.text.trim_start_matches(' ')
    }
}

/// The lines of a text, with one line of foresight.
pub(super) struct Lines<'t> {
    rest: &'t str,
    number: usize,
}

impl<'t> Lines<'t> {
    pub(super) const fn of(text: &'t str) -> Self {
        Self { rest: text, number: 1 }
    }

    /// The next line; none at the end.
    pub(super) fn peek(&self) -> Option<Line<'t>> {
        if self.rest.is_empty() {
            return None;
        }
        let (text, is_ended) =
            self.rest.split_once('\n').map_or((self.rest, false), |(line, _)| (line, true));
        let text = if is_ended { text.strip_suffix('\r').unwrap_or(text) } else { text };
        Some(Line { number: self.number, text, is_ended })
    }

    /// Goes on to the line after the next.
    pub(super) fn skip(&mut self) {
        self.rest = self.rest.split_once('\n').map_or("", |(_, rest)| rest);
        self.number += 1;
    }

    /// The next line that is neither blank nor a comment; it is checked for what may stand in no line of the structure.
    pub(super) fn structure(&mut self) -> Result<Option<Line<'t>>, CloudConfigError> {
        while let Some(line) = self.peek() {
            let content = line.content();
            if !content.is_empty() && !content.starts_with('#') {
                return match forbidden_in_structure(line.text) {
                    Some(fault) => Err(CloudConfigError::at(line.number, fault)),
                    None => Ok(Some(line)),
                };
            }
            self.skip();
        }
        Ok(None)
    }
}

fn forbidden_in_structure(line: &str) -> Option<Fault> {
    let is_marker = |marker| {
        line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
    };
    if is_marker("---") || is_marker("...") {
        Some(Fault::DocumentMarker)
    } else if line.starts_with('%') {
        Some(Fault::Directive)
    } else if line.contains('\t') {
        Some(Fault::Tab)
    } else {
        None
    }
}
