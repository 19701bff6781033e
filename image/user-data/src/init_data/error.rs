//! Why a file is not init-data.

use std::fmt;

/// Why init-data can't be used. No text holds a byte of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitDataError {
    /// There is nothing.
    #[error("init-data: empty")]
    Empty,
    /// Digits of base64, but their number is no multiple of four.
    #[error("init-data: base64 that ends too early")]
    CutBase64,
    /// Not standard base64 with padding.
    #[error("init-data: not base64 (standard, with padding)")]
    Base64,
    /// What the base64 holds is not gzip, or something follows it.
    #[error("init-data: not gzip, or something follows it")]
    Gzip,
    /// The gzip ends too early.
    #[error("init-data: gzip that ends too early")]
    CutGzip,
    /// The compressed bytes make no sense.
    #[error("init-data: damaged gzip")]
    Damaged,
    /// The checksum or the length of gzip differs.
    #[error("init-data: checksum or length of gzip differs")]
    Checksum,
    /// The TOML is longer than allowed.
    #[error("init-data: more than 1 MiB of TOML")]
    TooLarge,
    /// The TOML is none, or has more in it than init-data may.
    #[error("init-data: line {line}: {fault}")]
    Toml {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        fault: TomlFault,
    },
    /// A key is missing.
    #[error("init-data: no {0}")]
    Missing(&'static str),
    /// The algorithm is not known.
    #[error("init-data: line {line}: unknown algorithm; expected sha256, sha384 or sha512")]
    Algorithm {
        /// The line, from 1.
        line: usize,
    },
    /// The version is not known.
    #[error("init-data: line {line}: unknown version; expected 0.1.0")]
    Version {
        /// The line, from 1.
        line: usize,
    },
    /// A key that is almost a known one: other readers may take it for that.
    #[error(
        "init-data: line {line}: a key that differs from a known one only in case or path; write it exactly"
    )]
    Doubtful {
        /// The line, from 1.
        line: usize,
    },
}

impl InitDataError {
    /// Whether the same text would come again: false where a part of it seems to be missing.
    pub const fn is_permanent(&self) -> bool {
        !matches!(self, Self::Empty | Self::CutBase64 | Self::CutGzip)
    }
}

/// Why a text is not the TOML of init-data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TomlFault {
    /// Not UTF-8.
    NotUtf8,
    /// A byte order mark.
    ByteOrderMark,
    /// Against TOML's grammar.
    Syntax,
    /// A table that is not `[data]`, or `[data]` twice.
    Table,
    /// `[[...]]`.
    ArrayOfTables,
    /// `a.b = ...`.
    DottedKey,
    /// `{...}`.
    InlineTable,
    /// `[...]` as a value.
    Array,
    /// A value that is not a string: a number, a date, true.
    NotText,
    /// An escape of TOML 1.1.
    Escape,
    /// A key twice.
    Duplicate,
    /// Too many keys.
    TooManyKeys,
}

impl fmt::Display for TomlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotUtf8 => "not UTF-8",
            Self::ByteOrderMark => "a byte order mark; expected none",
            Self::Syntax => "not TOML",
            Self::Table => "a table; expected one table, [data]",
            Self::ArrayOfTables => "an array of tables; expected one table, [data]",
            Self::DottedKey => "a dotted key; expected quotes around the name of a file",
            Self::InlineTable => "an inline table; expected a string",
            Self::Array => "an array; expected a string",
            Self::NotText => "a value that is not a string",
            Self::Escape => "an escape that only TOML 1.1 has; expected one of TOML 1.0",
            Self::Duplicate => "a key that stands there twice",
            Self::TooManyKeys => "more than 64 keys",
        })
    }
}
