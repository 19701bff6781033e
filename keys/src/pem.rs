//! PEM, as writers of keys differ in it: any text before and after, lines of any length.

use zeroize::Zeroizing;

use crate::base64;
use crate::error::PrivateKeyFault;

/// No label that is in use is longer ("ENCRYPTED PRIVATE KEY"), nor a word of one ("CERTIFICATE").
const LABEL_MAX: usize = 32;
const LABEL_WORD_MAX: usize = 12;

/// The first PEM text in a file, not decoded yet.
pub(crate) struct Pem<'a> {
    /// The kind of content, as the first line names it.
    pub(crate) label: &'a str,
    rest: &'a str,
}

impl<'a> Pem<'a> {
    pub(crate) fn find(text: &'a str) -> Result<Self, PrivateKeyFault> {
        let (_, rest) = text.split_once("-----BEGIN ").ok_or(PrivateKeyFault::NotPem)?;
        let (label, rest) = rest.split_once("-----").ok_or_else(|| bad("a cut '-----BEGIN' line"))?;
        // The label is quoted in errors; in a damaged text the key itself may stand in its place.
        if is_label(label) { Ok(Self { label, rest }) } else { Err(bad("a damaged '-----BEGIN' line")) }
    }

    pub(crate) fn decode(&self) -> Result<Zeroizing<Vec<u8>>, PrivateKeyFault> {
        let end = format!("-----END {}-----", self.label);
        let (body, _) = self.rest.split_once(&end).ok_or_else(|| bad(format!("no '{end}' line")))?;
        base64::decode(body).ok_or_else(|| bad("not base64"))
    }
}

/// Whether it reads as the label of a PEM text (RFC 7468).
fn is_label(text: &str) -> bool {
    let is_word = |word: &str| {
        (1..=LABEL_WORD_MAX).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_uppercase())
    };
    text.len() <= LABEL_MAX && text.split(' ').all(is_word)
}

fn bad(fault: impl Into<String>) -> PrivateKeyFault {
    PrivateKeyFault::BadPem(fault.into())
}
