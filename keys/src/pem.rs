//! PEM, as writers of keys differ in it: any text and other PEM texts before and after, lines of any length, indented or not.

use zeroize::Zeroizing;

use crate::base64;
use crate::error::PrivateKeyFault;

/// No label that is in use is longer ("ENCRYPTED PRIVATE KEY"), nor a word of one ("CERTIFICATE").
const LABEL_MAX: usize = 32;
const LABEL_WORD_MAX: usize = 12;

/// The private key among the PEM texts of a file, not decoded yet.
pub(crate) struct Pem<'a> {
    /// The kind of content, as the first line names it.
    pub(crate) label: &'a str,
    rest: &'a str,
}

impl<'a> Pem<'a> {
    pub(crate) fn find(text: &'a str) -> Result<Self, PrivateKeyFault> {
        let (mut found, mut other) = (None, None);
        let mut left = text;
        while let Some((before, after)) = left.split_once("-----BEGIN ") {
            let starts_line =
                before.trim_end_matches([' ', '\t']).chars().next_back().is_none_or(|c| c == '\n');
            left = after;
            let Some((label, rest)) = after.split_once("-----") else {
                return Err(bad("a cut '-----BEGIN' line"));
            };
            if !is_label(label) {
                // A remark about keys, not a key.
                if !starts_line {
                    continue;
                }
                // Not quoted: in a damaged text the key itself may stand in place of the label.
                return Err(bad("a damaged '-----BEGIN' line"));
            }
            if !label.ends_with("PRIVATE KEY") {
                other.get_or_insert(label);
            } else if found.replace(Self { label, rest }).is_some() {
                return Err(PrivateKeyFault::Several);
            }
        }
        found.ok_or_else(|| match other {
            Some(label) => PrivateKeyFault::NotPrivateKey(content(label)),
            None => PrivateKeyFault::NotPem,
        })
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

/// What a PEM text without a private key holds. Only labels that are listed here are named: in a damaged text the key itself may
/// stand in a label's place.
fn content(label: &str) -> &'static str {
    match label {
        "PUBLIC KEY" => "a 'PUBLIC KEY'",
        "RSA PUBLIC KEY" => "an 'RSA PUBLIC KEY'",
        "CERTIFICATE" => "a 'CERTIFICATE'",
        _ => "a PEM text of another label",
    }
}

fn bad(fault: impl Into<String>) -> PrivateKeyFault {
    PrivateKeyFault::BadPem(fault.into())
}
