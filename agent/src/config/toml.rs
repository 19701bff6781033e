//! The pairs of a flat TOML document: `key = "text"`, nothing nested.
//!
//! The grammar is toml_parser's. What it reports is reduced to a line number: its texts and spans are the document's.

use std::borrow::Cow;
use std::fmt;

use toml_parser::decoder::Encoding;
use toml_parser::decoder::ScalarKind;
use toml_parser::parser::{EventReceiver, parse_document};
use toml_parser::{ErrorSink, ParseError, Source, Span};

/// Why a text is not a flat TOML document.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TomlFault {
    /// Not UTF-8.
    NotText,
    /// A line breaks TOML's grammar.
    Syntax {
        /// Number of the line, from 1.
        line: usize,
    },
    /// A table or a dotted key.
    Nested {
        /// Number of the line, from 1.
        line: usize,
    },
}

impl fmt::Display for TomlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText => f.write_str("not TOML: not UTF-8"),
            Self::Syntax { line } => write!(f, "line {line}: not TOML"),
            Self::Nested { line } => {
                write!(f, "line {line}: a table or a dotted key; expected lines such as key = \"text\"")
            }
        }
    }
}

/// The pairs of `text` in their order; a value that is not a string is none.
pub(super) fn pairs(text: &[u8]) -> Result<Vec<(String, Option<String>)>, TomlFault> {
    let text = std::str::from_utf8(text).map_err(|_| TomlFault::NotText)?;
    let source = Source::new(text);
    let tokens = source.lex().into_vec();
    let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let mut pairs = Pairs { source, found: Vec::new(), nested: None };
    let mut error: Option<ParseError> = None;
    parse_document(&tokens, &mut pairs, &mut error);
    if let Some(error) = error {
        let at = error.unexpected().or(error.context()).map_or(text.len(), |span| span.start());
        return Err(TomlFault::Syntax { line: line(at) });
    }
    match pairs.nested {
        Some(at) => Err(TomlFault::Nested { line: line(at) }),
        None => Ok(pairs.found),
    }
}

struct Pairs<'i> {
    source: Source<'i>,
    found: Vec<(String, Option<String>)>,
    /// Where the first table or dotted key begins.
    nested: Option<usize>,
}

impl Pairs<'_> {
    fn nests(&mut self, span: Span) {
        self.nested.get_or_insert(span.start());
    }
}

impl EventReceiver for Pairs<'_> {
    fn std_table_open(&mut self, span: Span, _: &mut dyn ErrorSink) {
        self.nests(span);
    }

    fn array_table_open(&mut self, span: Span, _: &mut dyn ErrorSink) {
        self.nests(span);
    }

    fn key_sep(&mut self, span: Span, _: &mut dyn ErrorSink) {
        self.nests(span);
    }

    /// Not entered, so that depth costs nothing; the key's value stays none.
    fn inline_table_open(&mut self, _: Span, _: &mut dyn ErrorSink) -> bool {
        false
    }

    /// As an inline table.
    fn array_open(&mut self, _: Span, _: &mut dyn ErrorSink) -> bool {
        false
    }

    fn simple_key(&mut self, span: Span, encoding: Option<Encoding>, error: &mut dyn ErrorSink) {
        let mut key = Cow::Borrowed("");
        if let Some(raw) = self.source.get(span) {
            toml_parser::Raw::new_unchecked(raw.as_str(), encoding, span).decode_key(&mut key, error);
        }
        self.found.push((key.into_owned(), None));
    }

    /// Decoding finds characters that no comment may have.
    fn comment(&mut self, span: Span, error: &mut dyn ErrorSink) {
        if let Some(raw) = self.source.get(span) {
            toml_parser::Raw::new_unchecked(raw.as_str(), None, span).decode_comment(error);
        }
    }

    /// Decoding finds a carriage return alone.
    fn newline(&mut self, span: Span, error: &mut dyn ErrorSink) {
        if let Some(raw) = self.source.get(span) {
            toml_parser::Raw::new_unchecked(raw.as_str(), None, span).decode_newline(error);
        }
    }

    fn scalar(&mut self, span: Span, encoding: Option<Encoding>, error: &mut dyn ErrorSink) {
        let mut value = Cow::Borrowed("");
        let Some(raw) = self.source.get(span) else { return };
        let raw = toml_parser::Raw::new_unchecked(raw.as_str(), encoding, span);
        let kind = raw.decode_scalar(&mut value, error);
        if let Some((_, text)) = self.found.last_mut()
            && kind == ScalarKind::String
        {
            *text = Some(value.into_owned());
        }
    }
}
