//! Why a text is not user data. No error holds a byte of the text: it has credentials in it.

use std::fmt;

use crate::files::FileName;

/// Why user data can't be used, and the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct CloudConfigError {
    fault: Fault,
    line: Option<usize>,
    is_cut: bool,
}

impl CloudConfigError {
    pub(super) const fn new(fault: Fault) -> Self {
        Self { fault, line: None, is_cut: false }
    }

    pub(super) const fn at(line: usize, fault: Fault) -> Self {
        Self { fault, line: Some(line), is_cut: false }
    }

    /// For a fault of the line that has no line break: the text may be cut there.
    pub(super) fn cut_at(self, unfinished: Option<usize>) -> Self {
        Self { is_cut: self.line.is_some() && self.line == unfinished, ..self }
    }

    /// The class of the fault.
    pub const fn fault(&self) -> Fault {
        self.fault
    }

    /// Its line, from 1; none for a fault of the whole.
    pub const fn line(&self) -> Option<usize> {
        self.line
    }

    /// Whether the same text would come again: false where a part of it seems to be missing.
    pub const fn is_permanent(&self) -> bool {
        let is_partial = matches!(
            self.fault,
            Fault::Empty
                | Fault::NoContent
                | Fault::NoPath
                | Fault::Cut
                | Fault::NoDaemonConfig
                | Fault::Incomplete(_)
        );
        !self.is_cut && !is_partial
    }
}

impl fmt::Display for CloudConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        write!(f, "{}", self.fault)?;
        if self.is_cut {
            f.write_str("; this is the last line and has no line break: is the text cut?")
        } else {
            Ok(())
        }
    }
}

/// The class of a fault; its text says what came, then what is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Longer than user data may be.
    TooLarge,
    /// Compressed.
    Gzip,
    /// UTF-16 with a byte order mark.
    Utf16,
    /// A MIME message.
    Mime,
    /// Base64.
    Base64,
    /// Not UTF-8.
    NotUtf8,
    /// A character that no text has.
    ControlCharacter,
    /// A carriage return without a line feed, or a line break of Unicode.
    LineBreak,
    /// A tab outside the text of a block.
    Tab,
    /// `---` or `...`.
    DocumentMarker,
    /// `%` at the beginning of a line.
    Directive,
    /// `&name`.
    Anchor,
    /// `*name`.
    Alias,
    /// `!tag`.
    Tag,
    /// `<<`.
    MergeKey,
    /// `? key`.
    ComplexKey,
    /// `{`, `[` and what belongs to them.
    FlowStyle,
    /// `>`.
    Folded,
    /// A plain or quoted value that goes on in the next line.
    MultiLine,
    /// A character that YAML reserves begins a value.
    Reserved,
    /// A line begins in a wrong column.
    Indentation,
    /// A key that is not known.
    UnknownKey,
    /// A key twice.
    DuplicateKey,
    /// Something else than a list, an item or a text where one must stand.
    WrongType,
    /// `: ` in a plain value.
    Colon,
    /// A quote without its end in the same line.
    OpenQuote,
    /// Something after the end of a value.
    Trailing,
    /// An escape that YAML does not know.
    Escape,
    /// Something unknown after `|`.
    BlockHeader,
    /// Too many items.
    TooManyItems,
    /// Nothing, or no item.
    Empty,
    /// An item without a content, though its file needs one.
    NoContent,
    /// The last item has no path: it may come after the content.
    NoPath,
    /// The last line has no line break, and nothing else says that it is complete.
    Cut,
    /// No apf.json.
    NoDaemonConfig,
    /// A file that is not a complete JSON object.
    Incomplete(FileName),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "more than 256 KiB",
            Self::Gzip => "compressed by gzip; expected plain text",
            Self::Utf16 => "UTF-16; expected UTF-8",
            Self::Mime => "a MIME message; expected cloud-config alone",
            Self::Base64 => "base64; expected plain text: was it encoded twice?",
            Self::NotUtf8 => "not UTF-8",
            Self::ControlCharacter => "a control character; expected text",
            Self::LineBreak => "a line break that is neither LF nor CR LF",
            Self::Tab => "a tab; expected spaces",
            Self::DocumentMarker => "a document marker; expected one document without --- and ...",
            Self::Directive => "a YAML directive; expected none",
            Self::Anchor => "a YAML anchor; expected the value itself",
            Self::Alias => "a YAML alias; expected the value itself",
            Self::Tag => "a YAML tag; expected none",
            Self::MergeKey => "a YAML merge key; expected path or content",
            Self::ComplexKey => "a YAML complex key; expected key: value",
            Self::FlowStyle => "YAML's flow style; expected one item or key per line",
            Self::Folded => "a folded text; expected |",
            Self::MultiLine => "a value that goes on in this line; expected | before a text of several lines",
            Self::Reserved => "a value begins with a reserved character; expected quotes around it",
            Self::Indentation => "wrong indentation",
            Self::UnknownKey => "an unknown key; expected write_files with path and content",
            Self::DuplicateKey => "a key that stands there twice",
            Self::WrongType => "expected write_files: with a list of items that have a path and a content",
            Self::Colon => "a colon and a space in a plain value; expected quotes around it, or |",
            Self::OpenQuote => "a quote without its end in the same line",
            Self::Trailing => "something after the end of a value",
            Self::Escape => "an unknown escape in double quotes",
            Self::BlockHeader => "something unknown after |; expected |, |- or |+",
            Self::TooManyItems => "more than 64 items",
            Self::Empty => "no item in write_files: is the text cut, or for another program?",
            Self::NoContent => "an item without a content: is the text cut?",
            Self::NoPath => "the last item has no path: is the text cut?",
            Self::Cut => "the last line has no line break and may be cut",
            Self::NoDaemonConfig => {
                "no item for /run/peerpod/apf.json: is the text cut, or for another program?"
            }
            Self::Incomplete(file) => return write!(f, "{}: not a complete JSON object", file.as_str()),
        })
    }
}
