//! What is said of JSON that can't be read.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;

/// The text of an error of `serde_json` without the string that it quotes: "a string" in its place.
///
/// The string may be a secret: a file that was written twice as JSON is one string, with the private key in it. It is quoted
/// by `{:?}`, which prints nothing in the agent that ships (docs/decisions/0033).
pub fn unquoted(error: &str) -> String {
    let parts = error.split_once("string ").and_then(|(before, rest)| {
        let (quoted, after) = rest.rsplit_once(", expected ")?;
        (quoted.is_empty() || quoted.starts_with('"')).then_some((before, after))
    });
    match parts {
        Some((before, after)) => format!("{before}a string, expected {after}"),
        None => error.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_a_string_without_its_content() {
        let cut = "invalid type: a string, expected u32 at line 1 column 3";
        for (error, said) in [
            ("invalid type: string \"a key\", expected u32 at line 1 column 3", cut),
            ("invalid type: string \"a, expected \\\"b\\\"\", expected u32 at line 1 column 3", cut),
            // As without Debug texts.
            ("invalid type: string , expected u32 at line 1 column 3", cut),
        ] {
            assert_eq!(unquoted(error), said);
        }
        for error in [
            "EOF while parsing a string at line 2 column 8",
            "invalid type: integer `7`, expected a string at line 1 column 3",
            "invalid length 1, expected a string of 2, expected 3",
            "",
        ] {
            assert_eq!(unquoted(error), error);
        }
    }

    #[test]
    fn the_parser_quotes_as_is_looked_for_here() {
        let error = serde_json::from_str::<u32>("\"a key\"").unwrap_err();
        let said = unquoted(&format!("{error}"));
        assert!(said.starts_with("invalid type: a string, expected u32 at line 1"), "{said}");
    }
}
