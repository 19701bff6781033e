//! Keys and values of one line.

use super::error::Fault;

/// The text after `key:`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing, or YAML's null.
    Null,
    /// A plain value: its end is the line's.
    Plain(String),
    /// A quoted value: it has an end of its own.
    Quoted(String),
    /// The text is in the lines that follow.
    Block(BlockHeader),
}

/// What `|` and its signs say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockHeader {
    pub(super) chomping: Chomping,
    /// The columns of the text beyond those of its key, where it is not the first line that says it.
    pub(super) indent: Option<usize>,
}

/// Which of the line breaks at its end belong to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chomping {
    /// One: `|`.
    Clip,
    /// None: `|-`.
    Strip,
    /// All: `|+`.
    Keep,
}

/// Splits `key: value`; the value is as it stands there.
pub(super) fn entry(text: &str) -> Result<(String, &str), Fault> {
    let (key, rest) = match text.chars().next() {
        Some('"' | '\'') => {
            let (key, rest) = quoted(text)?;
            (key, rest.trim_start_matches(' ').strip_prefix(':').ok_or(Fault::WrongType)?)
        }
        Some('?') if is_indicator(text, '?') => return Err(Fault::ComplexKey),
        Some('-') if is_indicator(text, '-') => return Err(Fault::WrongType),
        Some(first) => {
            refuse_indicator(first)?;
            let at = text.match_indices(':').map(|(at, _)| at).find(|at| {
                let after = text.get(at + 1..).unwrap_or_default();
                after.is_empty() || after.starts_with(' ')
            });
            let (key, rest) = at.and_then(|at| text.split_at_checked(at)).ok_or(Fault::WrongType)?;
            (key.trim_end_matches(' ').to_owned(), rest.strip_prefix(':').unwrap_or_default())
        }
        None => return Err(Fault::WrongType),
    };
    if key == "<<" {
        Err(Fault::MergeKey)
    } else if rest.is_empty() || rest.starts_with(' ') {
        Ok((key, rest))
    } else {
        Err(Fault::WrongType)
    }
}

/// Whether `text` begins with `indicator` alone: a dash of a list, for example, not one of a word.
pub(super) fn is_indicator(text: &str, indicator: char) -> bool {
    text.strip_prefix(indicator).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

/// Whether only a comment may follow, or nothing does.
pub(super) fn is_end(rest: &str) -> bool {
    let text = rest.trim_start_matches(' ');
    text.is_empty() || (text.starts_with('#') && text.len() < rest.len())
}

/// Reads what stands after `key:`.
pub(super) fn value(rest: &str) -> Result<Value, Fault> {
    if is_end(rest) {
        return Ok(Value::Null);
    }
    let text = rest.trim_start_matches(' ');
    match text.chars().next() {
        Some('"' | '\'') => {
            let (value, rest) = quoted(text)?;
            if is_end(rest) { Ok(Value::Quoted(value)) } else { Err(Fault::Trailing) }
        }
        Some('|') => block_header(text).map(Value::Block),
        Some('?') if is_indicator(text, '?') => Err(Fault::ComplexKey),
        Some('-') if is_indicator(text, '-') => Err(Fault::WrongType),
        Some(first) => {
            refuse_indicator(first)?;
            plain(text)
        }
        None => Ok(Value::Null),
    }
}

/// Refuses by name what begins anything but a plain value.
fn refuse_indicator(first: char) -> Result<(), Fault> {
    match first {
        '&' => Err(Fault::Anchor),
        '*' => Err(Fault::Alias),
        '!' => Err(Fault::Tag),
        '{' | '[' | '}' | ']' | ',' => Err(Fault::FlowStyle),
        '>' => Err(Fault::Folded),
        '|' => Err(Fault::WrongType),
        '@' | '`' | '%' => Err(Fault::Reserved),
        _ => Ok(()),
    }
}

fn plain(text: &str) -> Result<Value, Fault> {
    let text = text.split_once(" #").map_or(text, |(text, _)| text).trim_end_matches(' ');
    if text.contains(": ") || text.ends_with(':') {
        return Err(Fault::Colon);
    }
    Ok(match text {
        "~" | "null" | "Null" | "NULL" => Value::Null,
        text => Value::Plain(text.to_owned()),
    })
}

fn block_header(text: &str) -> Result<BlockHeader, Fault> {
    let mut header = BlockHeader { chomping: Chomping::Clip, indent: None };
    let mut rest = text.strip_prefix('|').unwrap_or_default();
    loop {
        let mut after = rest.chars();
        match after.next() {
            Some('-') if header.chomping == Chomping::Clip => header.chomping = Chomping::Strip,
            Some('+') if header.chomping == Chomping::Clip => header.chomping = Chomping::Keep,
            Some(digit @ '1'..='9') if header.indent.is_none() => {
                header.indent = digit.to_digit(10).and_then(|digit| usize::try_from(digit).ok());
            }
            _ if is_end(rest) => return Ok(header),
            _ => return Err(Fault::BlockHeader),
        }
        rest = after.as_str();
    }
}

/// Reads a quoted value; also what stands after its end.
fn quoted(text: &str) -> Result<(String, &str), Fault> {
    let mut rest = text.chars();
    let quote = rest.next();
    let mut value = String::new();
    loop {
        match rest.next().ok_or(Fault::OpenQuote)? {
            '\'' if quote == Some('\'') => match rest.as_str().strip_prefix('\'') {
                Some(after) => {
                    value.push('\'');
                    rest = after.chars();
                }
                None => return Ok((value, rest.as_str())),
            },
            '"' if quote == Some('"') => return Ok((value, rest.as_str())),
            '\\' if quote == Some('"') => {
                let (character, after) = escape(rest.as_str())?;
                value.push(character);
                rest = after.chars();
            }
            character => value.push(character),
        }
    }
}

/// Reads an escape after its backslash: those of YAML 1.1.
fn escape(text: &str) -> Result<(char, &str), Fault> {
    let mut rest = text.chars();
    // A backslash at the end of the line continues the value in the next.
    let character = match rest.next().ok_or(Fault::OpenQuote)? {
        '0' => '\0',
        'a' => '\u{7}',
        'b' => '\u{8}',
        't' => '\t',
        'n' => '\n',
        'v' => '\u{b}',
        'f' => '\u{c}',
        'r' => '\r',
        'e' => '\u{1b}',
        same @ (' ' | '"' | '\\') => same,
        'N' => '\u{85}',
        '_' => '\u{a0}',
        'L' => '\u{2028}',
        'P' => '\u{2029}',
        'x' => return code(rest.as_str(), 2),
        'u' => return code(rest.as_str(), 4),
        'U' => return code(rest.as_str(), 8),
        _ => return Err(Fault::Escape),
    };
    Ok((character, rest.as_str()))
}

fn code(text: &str, digits: usize) -> Result<(char, &str), Fault> {
    let (code, rest) = text.split_at_checked(digits).ok_or(Fault::Escape)?;
    // from_str_radix would take a sign.
    let is_hex = code.bytes().all(|digit| digit.is_ascii_hexdigit());
    let code = u32::from_str_radix(code, 16).ok().filter(|_| is_hex);
    Ok((code.and_then(char::from_u32).ok_or(Fault::Escape)?, rest))
}
