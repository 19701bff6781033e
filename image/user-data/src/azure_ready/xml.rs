//! The texts of a small XML document, by their path. Not a general reader: a document type, and so every entity of its own, is refused.

/// The deepest nesting.
const DEPTH: usize = 16;
/// The most elements.
const ELEMENTS: usize = 4096;
/// The longest name of an element, in bytes: each text is kept with its whole path.
const NAME_MAX: usize = 128;

/// Why a document can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XmlFault {
    /// Bytes that are no UTF-8, or another encoding is declared.
    #[error("not UTF-8")]
    Encoding,
    /// Another version than 1.0.
    #[error("not XML 1.0")]
    Version,
    /// It ends before its first element does.
    #[error("it ends too early")]
    Cut,
    /// No element, or something before the first.
    #[error("no XML")]
    NotXml,
    /// A tag or a comment is malformed, or an end tag does not belong there.
    #[error("a malformed tag")]
    Tag,
    /// A document type.
    #[error("a document type, which is refused")]
    DocType,
    /// A control character and the like.
    #[error("a character that XML does not have")]
    Character,
    /// An entity that XML does not know by itself.
    #[error("an unknown entity")]
    Entity,
    /// More or deeper elements than any answer needs.
    #[error("too many elements, or nested too deep")]
    TooLarge,
}

/// The text of each element, in the order in which they end, with the path of local names: `Versions/Supported/Version`. What
/// follows the first element is not looked at.
pub fn texts(document: &[u8]) -> Result<Vec<(String, String)>, XmlFault> {
    let document = std::str::from_utf8(document).map_err(|_| XmlFault::Encoding)?;
    if document.chars().any(is_forbidden) {
        return Err(XmlFault::Character);
    }
    // XML has one kind of line break.
    let document = document.replace("\r\n", "\n").replace('\r', "\n");
    let mut reader = Reader {
        rest: document.strip_prefix('\u{feff}').unwrap_or(&document),
        open: Vec::new(),
        texts: Vec::new(),
    };
    reader.prolog()?;
    loop {
        reader.text()?;
        if reader.markup()? {
            return Ok(reader.texts);
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
    /// The elements that have not ended: path, qualified name and text so far.
    open: Vec<(String, &'a str, String)>,
    texts: Vec<(String, String)>,
}

impl<'a> Reader<'a> {
    fn prolog(&mut self) -> Result<(), XmlFault> {
        self.rest = self.rest.trim_start();
        if self.rest.starts_with("<?") { self.instruction() } else { Ok(()) }
    }

    /// Takes a processing instruction. The declaration of XML is one.
    fn instruction(&mut self) -> Result<(), XmlFault> {
        let instruction = self.until("?>")?.strip_prefix("<?").and_then(|text| text.strip_suffix("?>"));
        let instruction = instruction.ok_or(XmlFault::Tag)?;
        let end = instruction.find([' ', '\t', '\r', '\n']).unwrap_or(instruction.len());
        let (target, content) = instruction.split_at_checked(end).ok_or(XmlFault::Tag)?;
        if !is_name(target) {
            return Err(XmlFault::Tag);
        }
        if target == "xml" {
            for (name, value) in attributes(content)? {
                match name {
                    "version" if value != "1.0" => return Err(XmlFault::Version),
                    "encoding" if !value.eq_ignore_ascii_case("utf-8") => return Err(XmlFault::Encoding),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Takes all up to and including `end`.
    fn until(&mut self, end: &str) -> Result<&'a str, XmlFault> {
        let at = self.rest.find(end).ok_or(XmlFault::Cut)?;
        let (taken, rest) = self.rest.split_at_checked(at + end.len()).ok_or(XmlFault::Cut)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Takes the text up to the next tag.
    fn text(&mut self) -> Result<(), XmlFault> {
        let at = self.rest.find('<').unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at_checked(at).unwrap_or((self.rest, ""));
        self.rest = rest;
        match self.open.last_mut() {
            None if text.trim().is_empty() => {}
            None => return Err(XmlFault::NotXml),
            Some(_) if text.contains("]]>") => return Err(XmlFault::Tag),
            Some((_, _, own)) => unescape(text, own)?,
        }
        match (rest.is_empty(), self.open.is_empty()) {
            (false, _) => Ok(()),
            (true, true) => Err(XmlFault::NotXml),
            (true, false) => Err(XmlFault::Cut),
        }
    }

    /// Takes a tag, a comment and the like; true after the end of the first element.
    fn markup(&mut self) -> Result<bool, XmlFault> {
        if let Some(comment) = self.rest.strip_prefix("<!--") {
            self.rest = comment;
            let comment = self.until("-->")?;
            if comment.find("--") != Some(comment.len() - 3) {
                return Err(XmlFault::Tag);
            }
        } else if self.rest.starts_with("<![CDATA[") {
            let data = self.until("]]>")?;
            let (_, _, own) = self.open.last_mut().ok_or(XmlFault::NotXml)?;
            let data = data.strip_prefix("<![CDATA[").and_then(|data| data.strip_suffix("]]>"));
            own.push_str(data.unwrap_or_default());
        } else if self.rest.starts_with("<?") {
            self.instruction()?;
        } else if self.rest.starts_with("<!") {
            return Err(XmlFault::DocType);
        } else if self.rest.starts_with("</") {
            let tag = self.until(">")?;
            let name = tag.strip_prefix("</").and_then(|tag| tag.strip_suffix('>'));
            return self.end(name.unwrap_or_default().trim_end());
        } else {
            return self.start();
        }
        Ok(false)
    }

    fn start(&mut self) -> Result<bool, XmlFault> {
        let tag = self.start_tag()?;
        let (inner, is_empty) = match tag.strip_suffix('/') {
            Some(inner) => (inner, true),
            None => (tag, false),
        };
        let name = inner.split_ascii_whitespace().next().filter(|_| !inner.starts_with(char::is_whitespace));
        let name = name.filter(|name| is_name(name) && name.len() <= NAME_MAX).ok_or(XmlFault::Tag)?;
        attributes(inner.strip_prefix(name).unwrap_or_default())?;
        if self.open.len() >= DEPTH || self.texts.len() >= ELEMENTS {
            return Err(XmlFault::TooLarge);
        }
        let local = name.rsplit(':').next().unwrap_or(name);
        let path = match self.open.last() {
            Some((parent, ..)) => format!("{parent}/{local}"),
            None => local.to_owned(),
        };
        self.open.push((path, name, String::new()));
        if is_empty { self.end(name) } else { Ok(false) }
    }

    /// What is between `<` and `>`; a `>` in quotes belongs to it.
    fn start_tag(&mut self) -> Result<&'a str, XmlFault> {
        let mut quote = None;
        for (at, character) in self.rest.char_indices().skip(1) {
            match (quote, character) {
                (None, '"' | '\'') => quote = Some(character),
                (Some(open), _) if open == character => quote = None,
                (None, '<') => return Err(XmlFault::Tag),
                (None, '>') => {
                    let tag = self.rest.get(1..at).ok_or(XmlFault::Tag)?;
                    self.rest = self.rest.get(at + 1..).ok_or(XmlFault::Tag)?;
                    return Ok(tag);
                }
                _ => {}
            }
        }
        Err(XmlFault::Cut)
    }

    fn end(&mut self, name: &str) -> Result<bool, XmlFault> {
        let (path, opened, text) = self.open.pop().ok_or(XmlFault::Tag)?;
        if name != opened {
            return Err(XmlFault::Tag);
        }
        self.texts.push((path, text));
        Ok(self.open.is_empty())
    }
}

fn is_forbidden(character: char) -> bool {
    (character < ' ' && !"\t\n\r".contains(character)) || matches!(character, '\u{fffe}' | '\u{ffff}')
}

/// The attributes of a tag: names and values as they stand there. None is used; they show whether the tag is whole.
fn attributes(text: &str) -> Result<Vec<(&str, &str)>, XmlFault> {
    let (mut rest, mut found) = (text.trim_ascii_start(), Vec::new());
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=').ok_or(XmlFault::Tag)?;
        let value = value.trim_ascii_start();
        let quote = value.chars().next().filter(|quote| "\"'".contains(*quote)).ok_or(XmlFault::Tag)?;
        let (value, after) =
            value.strip_prefix(quote).and_then(|value| value.split_once(quote)).ok_or(XmlFault::Tag)?;
        let name = name.trim_ascii_end();
        if !is_name(name) || value.contains('<') {
            return Err(XmlFault::Tag);
        }
        unescape(value, &mut String::new())?;
        found.push((name, value));
        rest = after.trim_ascii_start();
    }
    Ok(found)
}

fn is_name(name: &str) -> bool {
    let is_start = name.starts_with(|first: char| first.is_alphabetic() || first == '_');
    is_start && name.chars().all(|character| character.is_alphanumeric() || "_-.:".contains(character))
}

/// Appends a text with its references resolved.
fn unescape(text: &str, to: &mut String) -> Result<(), XmlFault> {
    let mut parts = text.split('&');
    to.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let (entity, rest) = part.split_once(';').ok_or(XmlFault::Entity)?;
        to.push(match entity {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            _ => number(entity).ok_or(XmlFault::Entity)?,
        });
        to.push_str(rest);
    }
    Ok(())
}

fn number(entity: &str) -> Option<char> {
    let number = entity.strip_prefix('#')?;
    let (digits, radix) = match number.strip_prefix('x') {
        Some(digits) => (digits, 16),
        None => (number, 10),
    };
    // from_str_radix takes a sign.
    let code = digits
        .starts_with(|digit: char| digit.is_digit(radix))
        .then(|| u32::from_str_radix(digits, radix).ok())??;
    char::from_u32(code).filter(|character| !is_forbidden(*character))
}

/// A text as it stands in an element. Line breaks and tabs as references: so they stay what they are.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&#34;"),
            '\'' => escaped.push_str("&#39;"),
            '\t' => escaped.push_str("&#x9;"),
            '\n' => escaped.push_str("&#xA;"),
            '\r' => escaped.push_str("&#xD;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
