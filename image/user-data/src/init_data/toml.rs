//! The TOML of init-data: keys with strings, and one table.
//!
//! The grammar is toml_parser's. What it reports is reduced to a line number: its texts and spans are the document's.

use std::borrow::Cow;

use toml_parser::decoder::{Encoding, ScalarKind};
use toml_parser::parser::{EventReceiver, parse_document};
use toml_parser::{ErrorSink, ParseError, Raw, Source, Span};

use super::error::{InitDataError, TomlFault};

/// The most keys of a document.
const KEYS_MAX: usize = 64;

/// A key and its string.
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: String,
    /// The line of the key, from 1.
    pub(super) line: usize,
}

/// The entries in their order; no key stands there twice.
pub(super) struct Document {
    /// Those before `[data]`.
    pub(super) top: Vec<Entry>,
    /// Those of `[data]`.
    pub(super) data: Vec<Entry>,
}

/// Reads a document.
pub(super) fn read(text: &[u8]) -> Result<Document, InitDataError> {
    let line = |at: usize| 1 + text.iter().take(at).filter(|byte| **byte == b'\n').count();
    let fault = |at: usize, fault| InitDataError::Toml { line: line(at), fault };
    let text = std::str::from_utf8(text).map_err(|error| fault(error.valid_up_to(), TomlFault::NotUtf8))?;
    if text.starts_with('\u{feff}') {
        return Err(fault(0, TomlFault::ByteOrderMark));
    }
    let source = Source::new(text);
    let mut reader = Reader { source, place: Place::Top, found: Vec::new(), has_data: false, refused: None };
    let mut error: Option<ParseError> = None;
    parse_document(&source.lex().into_vec(), &mut reader, &mut error);
    let refused = reader.refused;
    if let Some(error) = error {
        let at = error.unexpected().or(error.context()).map_or(text.len(), |span| span.start());
        // What we refuse may be what the parser stumbles over afterwards.
        let (at, named) = refused.filter(|(refused, _)| *refused <= at).unwrap_or((at, TomlFault::Syntax));
        return Err(fault(at, named));
    }
    if let Some((at, named)) = refused {
        return Err(fault(at, named));
    }
    let mut document = Document { top: Vec::new(), data: Vec::new() };
    for Found { in_data, key, at, value } in reader.found {
        // Each key has a value: without one the parser reports an error, or the value was refused.
        let value = value.ok_or(fault(at, TomlFault::Syntax))?;
        let entries = if in_data { &mut document.data } else { &mut document.top };
        if entries.iter().any(|entry| entry.key == key) {
            return Err(fault(at, TomlFault::Duplicate));
        }
        entries.push(Entry { key, value, line: line(at) });
    }
    let twice = document.top.iter().find(|entry| entry.key == "data" && reader.has_data);
    match twice {
        Some(entry) => Err(InitDataError::Toml { line: entry.line, fault: TomlFault::Duplicate }),
        None => Ok(document),
    }
}

/// Where the parser is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Top,
    /// Between the brackets of a table's header; its key has not come yet.
    Header,
    Data,
}

struct Found {
    in_data: bool,
    key: String,
    at: usize,
    value: Option<String>,
}

struct Reader<'i> {
    source: Source<'i>,
    place: Place,
    found: Vec<Found>,
    has_data: bool,
    /// The first thing of TOML that init-data may not have.
    refused: Option<(usize, TomlFault)>,
}

impl<'i> Reader<'i> {
    fn refuse(&mut self, span: Span, fault: TomlFault) {
        self.refused.get_or_insert((span.start(), fault));
    }

    /// Refuses `\e` and `\xHH`: TOML 1.1 has them, the readers of TOML 1.0 among a pod's programs do not.
    fn refuse_new_escapes(&mut self, raw: &str, span: Span, encoding: Option<Encoding>) {
        if !matches!(encoding, Some(Encoding::BasicString | Encoding::MlBasicString)) {
            return;
        }
        // Two backslashes are one, and what follows is no escape.
        let mut rest = raw;
        while let Some((_, escape)) = rest.split_once('\\') {
            if escape.starts_with(['e', 'x']) {
                return self.refuse(span, TomlFault::Escape);
            }
            rest = escape.strip_prefix('\\').unwrap_or(escape);
        }
    }

    fn raw(&self, span: Span, encoding: Option<Encoding>) -> Option<Raw<'i>> {
        self.source.get(span).map(|raw| Raw::new_unchecked(raw.as_str(), encoding, span))
    }
}

impl EventReceiver for Reader<'_> {
    fn std_table_open(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.place = Place::Header;
    }

    fn std_table_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.place = Place::Data;
    }

    fn array_table_open(&mut self, span: Span, _: &mut dyn ErrorSink) {
        self.place = Place::Header;
        self.refuse(span, TomlFault::ArrayOfTables);
    }

    fn array_table_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.place = Place::Data;
    }

    fn key_sep(&mut self, span: Span, _: &mut dyn ErrorSink) {
        let fault = if self.place == Place::Header { TomlFault::Table } else { TomlFault::DottedKey };
        self.refuse(span, fault);
    }

    /// Not entered, so that depth costs nothing.
    fn inline_table_open(&mut self, span: Span, _: &mut dyn ErrorSink) -> bool {
        self.refuse(span, TomlFault::InlineTable);
        false
    }

    /// As an inline table.
    fn array_open(&mut self, span: Span, _: &mut dyn ErrorSink) -> bool {
        self.refuse(span, TomlFault::Array);
        false
    }

    fn simple_key(&mut self, span: Span, encoding: Option<Encoding>, error: &mut dyn ErrorSink) {
        let mut key = Cow::Borrowed("");
        if let Some(raw) = self.raw(span, encoding) {
            self.refuse_new_escapes(raw.as_str(), span, encoding);
            raw.decode_key(&mut key, error);
        }
        if self.place == Place::Header {
            if self.has_data || key != "data" {
                self.refuse(span, TomlFault::Table);
            }
            self.has_data = true;
        } else if self.found.len() == KEYS_MAX {
            self.refuse(span, TomlFault::TooManyKeys);
        } else {
            let in_data = self.place == Place::Data;
            self.found.push(Found { in_data, key: key.into_owned(), at: span.start(), value: None });
        }
    }

    /// Decoding finds characters that no comment may have.
    fn comment(&mut self, span: Span, error: &mut dyn ErrorSink) {
        if let Some(raw) = self.raw(span, None) {
            raw.decode_comment(error);
        }
    }

    fn newline(&mut self, span: Span, error: &mut dyn ErrorSink) {
        if let Some(raw) = self.raw(span, None) {
            raw.decode_newline(error);
        }
    }

    fn scalar(&mut self, span: Span, encoding: Option<Encoding>, error: &mut dyn ErrorSink) {
        let Some(raw) = self.raw(span, encoding) else { return };
        self.refuse_new_escapes(raw.as_str(), span, encoding);
        let mut value = Cow::Borrowed("");
        if raw.decode_scalar(&mut value, error) != ScalarKind::String {
            return self.refuse(span, TomlFault::NotText);
        }
        if let Some(found) = self.found.last_mut() {
            found.value = Some(value.into_owned());
        }
    }
}
