//! The cloud-config that cloud-api-adaptor writes into a VM's user data: a small part of YAML.
//!
//! Only what its generator writes is needed, so only that and what is as plain is read: one key, `write_files`, with a list of
//! items that have a `path` and a `content`. Everything else of YAML is refused by its name and line.

mod error;
mod scalar;
mod text;

use serde::de::IgnoredAny;

pub use error::{CloudConfigError, Fault};
use scalar::{BlockHeader, Chomping, Value};
use text::{Line, Lines};

use crate::files::{DIRECTORY, FileName, SkipReason, Skipped, UserData};

/// The longest user data, in bytes: what the largest cloud takes.
pub const USER_DATA_MAX: usize = 256 * 1024;
/// The most items of `write_files`.
pub const ITEMS_MAX: usize = 64;

/// Reads the user data of a pod VM. They must bring a complete apf.json: without it there is no pod.
///
/// # Errors
/// The first fault and its line; see [`CloudConfigError::is_permanent`].
pub fn parse(bytes: &[u8]) -> Result<UserData, CloudConfigError> {
    let user_data = read(bytes)?;
    let content = |name| user_data.files.iter().find(|(file, _)| *file == name).map(|(_, content)| content);
    let apf = content(FileName::Apf).ok_or(CloudConfigError::new(Fault::NoDaemonConfig))?;
    let is_complete = |name, content: &[u8]| {
        if is_json_object(content) { Ok(()) } else { Err(CloudConfigError::new(Fault::Incomplete(name))) }
    };
    is_complete(FileName::Apf, apf)?;
    content(FileName::Auth).map_or(Ok(()), |auth| is_complete(FileName::Auth, auth))?;
    Ok(user_data)
}

/// Reads the files of a cloud-config, whichever they are.
///
/// # Errors
/// The first fault and its line.
pub fn read(bytes: &[u8]) -> Result<UserData, CloudConfigError> {
    if bytes.len() > USER_DATA_MAX {
        return Err(CloudConfigError::new(Fault::TooLarge));
    }
    let text = text::of(bytes)?;
    let items = document(&mut Lines::of(text));
    items.and_then(files).map_err(|error| error.cut_at(text::unfinished_line(bytes)))
}

fn is_json_object(content: &[u8]) -> bool {
    content.trim_ascii_start().starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(content).is_ok()
}

/// An item of `write_files`.
struct Item {
    /// Where it begins.
    line: usize,
    path: Option<Field>,
    content: Option<Field>,
}

/// The value of a key.
struct Field {
    /// None is YAML's null.
    text: Option<String>,
    /// The line with its end.
    last_line: usize,
    /// Whether its end can be seen: a quote or a line break.
    is_ended: bool,
}

/// The files of the items: of two with one path the last.
fn files(items: Vec<Item>) -> Result<UserData, CloudConfigError> {
    let mut user_data = UserData::default();
    let last = items.len();
    for (number, item) in (1..).zip(items) {
        let Some(Field { text: Some(path), last_line, is_ended }) = item.path else {
            // The path may come after the content.
            if number == last {
                return Err(CloudConfigError::at(item.line, Fault::NoPath));
            }
            user_data.skipped.push(Skipped { line: item.line, reason: SkipReason::NoPath });
            continue;
        };
        let name = path.strip_prefix(DIRECTORY).and_then(|rest| rest.strip_prefix('/'));
        let Some(name) = FileName::USER_DATA.into_iter().find(|known| Some(known.as_str()) == name) else {
            if !is_ended {
                return Err(CloudConfigError::at(last_line, Fault::Cut));
            }
            user_data.skipped.push(Skipped { line: item.line, reason: SkipReason::Path });
            continue;
        };
        let content = content(name, item.line, item.content)?;
        user_data.files.retain(|(earlier, _)| *earlier != name);
        user_data.files.push((name, content.into_bytes()));
    }
    Ok(user_data)
}

fn content(name: FileName, line: usize, field: Option<Field>) -> Result<String, CloudConfigError> {
    // The format of the others shows whether they are complete.
    let has_no_end = matches!(
        name,
        FileName::AttestationAgent | FileName::ConfidentialDataHub | FileName::ScratchSpaceMarker
    );
    match field {
        Some(Field { text: Some(_), last_line, is_ended: false }) if has_no_end => {
            Err(CloudConfigError::at(last_line, Fault::Cut))
        }
        Some(Field { text: Some(text), .. }) => Ok(text),
        _ if name == FileName::ScratchSpaceMarker => Ok(String::new()),
        _ => Err(CloudConfigError::at(line, Fault::NoContent)),
    }
}

/// Reads the one key of the document.
fn document(lines: &mut Lines<'_>) -> Result<Vec<Item>, CloudConfigError> {
    let mut items = None;
    while let Some(line) = lines.structure()? {
        let fault = |fault| CloudConfigError::at(line.number, fault);
        if line.indent() > 0 {
            return Err(fault(Fault::Indentation));
        }
        let (key, rest) = scalar::entry(line.content()).map_err(fault)?;
        if key != "write_files" {
            return Err(fault(Fault::UnknownKey));
        }
        if items.is_some() {
            return Err(fault(Fault::DuplicateKey));
        }
        if !scalar::is_end(rest) {
            // Also a null that is written: YAML takes no list after it.
            scalar::value(rest).map_err(fault)?;
            return Err(fault(Fault::WrongType));
        }
        lines.skip();
        items = Some(list(lines)?);
    }
    items.filter(|items| !items.is_empty()).ok_or(CloudConfigError::new(Fault::Empty))
}

/// Reads the items: all begin in one column, which may be the first.
fn list(lines: &mut Lines<'_>) -> Result<Vec<Item>, CloudConfigError> {
    let mut items: Vec<Item> = Vec::new();
    let mut column = None;
    while let Some(line) = lines.structure()? {
        let fault = |fault| CloudConfigError::at(line.number, fault);
        if !scalar::is_indicator(line.content(), '-') {
            match line.indent() {
                0 => break,
                _ if items.is_empty() => return Err(fault(Fault::WrongType)),
                _ => return Err(fault(Fault::Indentation)),
            }
        }
        if *column.get_or_insert(line.indent()) != line.indent() {
            return Err(fault(Fault::Indentation));
        }
        if items.len() == ITEMS_MAX {
            return Err(fault(Fault::TooManyItems));
        }
        items.push(item(lines, line)?);
    }
    Ok(items)
}

/// Where a key stands.
#[derive(Clone, Copy)]
struct Key<'t> {
    line: Line<'t>,
    column: usize,
    /// The line from the key on.
    text: &'t str,
}

/// Reads the item that begins with the dash of `dash`.
fn item<'t>(lines: &mut Lines<'t>, dash: Line<'t>) -> Result<Item, CloudConfigError> {
    let mut item = Item { line: dash.number, path: None, content: None };
    let mut key = first_key(lines, dash)?;
    loop {
        let fault = |fault| CloudConfigError::at(key.line.number, fault);
        let (name, rest) = scalar::entry(key.text).map_err(fault)?;
        let field = match name.as_str() {
            "path" => &mut item.path,
            "content" => &mut item.content,
            _ => return Err(fault(Fault::UnknownKey)),
        };
        if field.is_some() {
            return Err(fault(Fault::DuplicateKey));
        }
        lines.skip();
        let value = scalar::value(rest).map_err(fault)?;
        let is_block = matches!(value, Value::Block(_));
        *field = Some(take(lines, key, value)?);
        let Some(line) = lines.structure()?.filter(|line| line.indent() > dash.indent()) else {
            return Ok(item);
        };
        if line.indent() != key.column {
            let is_more = line.indent() > key.column && !is_block;
            let fault = if is_more { Fault::MultiLine } else { Fault::Indentation };
            return Err(CloudConfigError::at(line.number, fault));
        }
        key = Key { line, column: key.column, text: line.content() };
    }
}

/// The first key of an item: behind its dash, or in a line of its own.
fn first_key<'t>(lines: &mut Lines<'t>, dash: Line<'t>) -> Result<Key<'t>, CloudConfigError> {
    let after = dash.content().strip_prefix('-').unwrap_or_default();
    if !scalar::is_end(after) {
        let text = after.trim_start_matches(' ');
        return Ok(Key { line: dash, column: dash.text.len() - text.len(), text });
    }
    lines.skip();
    let line = lines.structure()?.filter(|line| line.indent() > dash.indent());
    let line = line.ok_or(CloudConfigError::at(dash.number, Fault::WrongType))?;
    Ok(Key { line, column: line.indent(), text: line.content() })
}

/// The field for `value`, whose key was `key`; the lines of a block are taken from `lines`.
fn take(lines: &mut Lines<'_>, key: Key<'_>, value: Value) -> Result<Field, CloudConfigError> {
    let field = |text, is_ended| Field { text, last_line: key.line.number, is_ended };
    Ok(match value {
        Value::Null => field(None, key.line.is_ended),
        Value::Plain(text) => field(Some(text), key.line.is_ended),
        Value::Quoted(text) => field(Some(text), true),
        Value::Block(header) => block(lines, key, header)?,
    })
}

/// Reads the text of a block.
fn block(lines: &mut Lines<'_>, key: Key<'_>, header: BlockHeader) -> Result<Field, CloudConfigError> {
    let mut text = String::new();
    let mut indent = header.indent.map(|more| key.column + more);
    let mut last = key.line;
    // Line breaks of blank lines: they count if text follows, or if all are kept.
    let mut breaks = String::new();
    // The most spaces of a blank line before the first line with text.
    let mut widest = 0;
    while let Some(line) = lines.peek() {
        if line.content().is_empty() && indent.is_none_or(|indent| line.indent() <= indent) {
            widest = widest.max(line.indent());
        } else {
            let is_tab = line.content().starts_with('\t');
            let is_first = indent.is_none();
            let is_over = line.indent() < indent.unwrap_or(key.column + 1);
            // YAML refuses both as the first line: the column of the text would be doubtful.
            if is_tab && (is_over || is_first) {
                return Err(CloudConfigError::at(line.number, Fault::Tab));
            }
            if is_over {
                break;
            }
            if is_first && widest > line.indent() {
                return Err(CloudConfigError::at(line.number, Fault::Indentation));
            }
            text.push_str(&std::mem::take(&mut breaks));
            text.push_str(line.text.get(*indent.get_or_insert(line.indent())..).unwrap_or_default());
        }
        if line.is_ended {
            breaks.push('\n');
        }
        last = line;
        lines.skip();
    }
    match header.chomping {
        Chomping::Keep => text.push_str(&breaks),
        Chomping::Clip if !text.is_empty() && !breaks.is_empty() => text.push('\n'),
        Chomping::Clip | Chomping::Strip => {}
    }
    // A block of nothing is nothing: the text of a real one follows.
    let text = (!text.is_empty()).then_some(text);
    Ok(Field { text, last_line: last.number, is_ended: last.is_ended })
}

#[cfg(test)]
#[path = "cloud_config_tests.rs"]
mod tests;
