//! Text for log lines and error messages, one line each.

use std::error::Error;

use secure_comms_keys::text::one_line;

/// Longest quote of an unproven peer's text, in bytes.
const QUOTE_MAX: usize = 300;

/// Hexadecimal digits from which on a word is an id that is shortened, and how many of them are shown.
const ID_MIN: usize = 32;
const ID_SHOWN: usize = 8;

/// An unproven peer's text, cut to [`QUOTE_MAX`] bytes and escaped. Ids in it are shortened first, so that the end, which
/// has the advice, is shown: a pod's id has 64 digits, and stands twice in the agent's key errors.
pub(crate) fn quote(text: &str) -> String {
    one_line(&shorten_ids(text), QUOTE_MAX)
}

/// Long runs of hexadecimal digits, cut to their first digits.
fn shorten_ids(text: &str) -> String {
    let mut short = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_digit = |c: char| c.is_ascii_hexdigit();
        let (word, others) = rest.split_at(if is_digit(first) {
            rest.find(|c| !is_digit(c)).unwrap_or(rest.len())
        } else {
            rest.find(is_digit).unwrap_or(rest.len())
        });
        if word.len() >= ID_MIN && is_digit(first) {
            short.extend([word.get(..ID_SHOWN).unwrap_or(word), "..."]);
        } else {
            short.push_str(word);
        }
        rest = others;
    }
    short
}

/// The error and its causes, joined by colons. A cause that stands in the text already is not repeated.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let shown = cause.to_string();
        if !text.contains(&shown) {
            text = format!("{text}: {shown}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_error_with_a_long_pod_id_keeps_its_advice() {
        let id = "0123456789abcdef".repeat(4);
        let path = format!("default/pp-{id}/privateKey");
        let error = format!(
            "fetching {path} through api-server-rest: fetching {path} from api-server-rest: status 500: ttrpc request \
             error; check that the KBS has the resource, that its policy allows this VM, and the log of the CDH"
        );
        let shown = quote(&error);
        assert!(shown.ends_with("allows this VM, and the log of the CDH"), "{shown}");
        assert!(shown.starts_with("fetching default/pp-01234567.../privateKey through"), "{shown}");
    }

    #[test]
    fn only_long_ids_are_shortened() {
        for kept in [
            "",
            "deadbeef",
            "ü face 12 ü",
            "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
            &"z".repeat(80),
        ] {
            assert_eq!(shorten_ids(kept), kept);
        }
        let id = "a".repeat(ID_MIN);
        assert_eq!(shorten_ids(&format!("ü{id}ü{id}")), "üaaaaaaaa...üaaaaaaaa...");
        assert_eq!(quote(&"f".repeat(1_000_000)), "ffffffff...");
        assert!(quote(&"x\u{202e}".repeat(100_000)).len() < QUOTE_MAX + 60);
    }
}
