//! Protobuf's wire format: fields, without message definitions (<https://protobuf.dev/programming-guides/encoding/>).

/// The wire type of numbers of variable length.
const VARINT: u64 = 0;
/// The wire type of strings, bytes and messages.
const LENGTH_DELIMITED: u64 = 2;

/// Why bytes are not a protobuf message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes end within a field.
    #[error("it ends within a field")]
    Truncated,
    /// A field number or wire type is invalid, or a number has more than 64 bits.
    #[error("invalid tag or wire type")]
    InvalidField,
    /// A message that there may be one of comes several times. Protobuf merges them; the kata agent's decoder (the crate
    /// `protobuf` 3) takes the last.
    #[error("it has several '{0}', and decoders differ in which counts")]
    Repeated(&'static str),
}

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<'a> {
    /// Field number.
    pub number: u32,
    /// The whole field, encoded.
    pub raw: &'a [u8],
    /// Content of a string, of bytes or of a message; none for numbers.
    pub content: Option<&'a [u8]>,
}

/// Reads a varint from the beginning of `data`; returns it and the rest.
///
/// # Errors
/// `data` does not begin with a varint of at most 64 bits.
pub fn varint(data: &[u8]) -> Result<(u64, &[u8]), Malformed> {
    let mut value = 0_u64;
    for (at, byte) in data.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        // Nine bytes hold 63 bits: the tenth may have only one.
        if at == 9 && bits > 1 {
            return Err(Malformed::InvalidField);
        }
        value |= bits << (7 * at);
        if byte & 0x80 == 0 {
            return Ok((value, data.get(at + 1..).unwrap_or_default()));
        }
    }
    Err(if data.len() < 10 { Malformed::Truncated } else { Malformed::InvalidField })
}

/// Reads the key of a field: its number, its wire type, and the rest of `data`.
fn key(data: &[u8]) -> Result<(u32, u64, &[u8]), Malformed> {
    let (key, rest) = varint(data)?;
    match u32::try_from(key >> 3) {
        Ok(number) if number > 0 && number < 1 << 29 => Ok((number, key & 7, rest)),
        _ => Err(Malformed::InvalidField),
    }
}

/// The number of the first field in `data`, which may be incomplete.
pub fn number(data: &[u8]) -> Option<u32> {
    key(data).ok().map(|(number, _, _)| number)
}

fn skip(data: &[u8], length: u64) -> Result<(&[u8], &[u8]), Malformed> {
    let length = usize::try_from(length).map_err(|_| Malformed::Truncated)?;
    data.split_at_checked(length).ok_or(Malformed::Truncated)
}

/// Iterates over the fields of a message, in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields of `message`.
    pub fn of(message: &'a [u8]) -> Self {
        Self(message)
    }

    /// What is still to be read.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    fn read(&self) -> Result<(Field<'a>, &'a [u8]), Malformed> {
        let (number, kind, mut rest) = key(self.0)?;
        let mut content = None;
        // Groups are deprecated and may be nested. Their end tags are counted, not matched.
        let (mut kind, mut depth) = (kind, 0_usize);
        loop {
            match kind {
                0 => rest = varint(rest)?.1,
                1 => rest = skip(rest, 8)?.1,
                LENGTH_DELIMITED => {
                    let (length, after) = varint(rest)?;
                    let (inner, after) = skip(after, length)?;
                    content = Some(inner).filter(|_| depth == 0);
                    rest = after;
                }
                3 => depth += 1,
                4 if depth > 0 => depth -= 1,
                5 => rest = skip(rest, 4)?.1,
                _ => return Err(Malformed::InvalidField),
            }
            if depth == 0 {
                break;
            }
            (_, kind, rest) = key(rest)?;
        }
        let raw = self.0.get(..self.0.len() - rest.len()).unwrap_or_default();
        Ok((Field { number, raw, content }, rest))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.read() {
            Ok((field, rest)) => {
                self.0 = rest;
                Some(Ok(field))
            }
            Err(malformed) => {
                self.0 = &[];
                Some(Err(malformed))
            }
        }
    }
}

/// The contents of all strings, bytes or messages with this field number, in order.
///
/// # Errors
/// `message` is malformed.
pub fn contents(message: &[u8], wanted: u32) -> Result<Vec<&[u8]>, Malformed> {
    let mut found = Vec::new();
    for field in Fields::of(message) {
        let field = field?;
        if field.number == wanted {
            found.extend(field.content);
        }
    }
    Ok(found)
}

/// The content of the only message with this field number, whose `name` an error has; none if there is none.
///
/// # Errors
/// `message` is malformed, or has several.
pub fn only<'a>(message: &'a [u8], wanted: u32, name: &'static str) -> Result<Option<&'a [u8]>, Malformed> {
    match *contents(message, wanted)? {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => Err(Malformed::Repeated(name)),
    }
}

/// The content of the string or bytes with this field number. The last of several counts; a missing one is empty.
///
/// # Errors
/// `message` is malformed.
pub fn last(message: &[u8], wanted: u32) -> Result<&[u8], Malformed> {
    Ok(contents(message, wanted)?.pop().unwrap_or_default())
}

/// The number in this field. The last of several counts; none if there is none.
///
/// # Errors
/// `message` is malformed.
pub fn last_number(message: &[u8], wanted: u32) -> Result<Option<u64>, Malformed> {
    let mut found = None;
    for field in Fields::of(message) {
        let field = field?;
        let (_, kind, value) = key(field.raw)?;
        if field.number == wanted && kind == VARINT {
            found = Some(varint(value)?.0);
        }
    }
    Ok(found)
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a number field.
pub fn put_number(number: u32, value: u64, out: &mut Vec<u8>) {
    put_varint(u64::from(number) << 3, out);
    put_varint(value, out);
}

/// Writes a field that is a string, bytes or a message.
pub fn put(number: u32, content: &[u8], out: &mut Vec<u8>) {
    put_varint(u64::from(number) << 3 | LENGTH_DELIMITED, out);
    put_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

#[cfg(test)]
#[path = "protobuf_tests.rs"]
mod tests;
