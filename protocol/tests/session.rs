//! What a peer says of a session, whatever it is: the originator address of a channel open, positions and ids.
#![allow(
    clippy::unwrap_used,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use proptest::prelude::*;
use secure_comms_protocol::session::{POSITION_BYTES, SessionIdError};
use secure_comms_protocol::{Opening, Position, SessionId};

fn any_position() -> impl Strategy<Value = Position> {
    let number = prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()];
    (number.clone(), number).prop_map(|(received, granted)| Position { received, granted })
}

/// Texts near those that mean something: right words, numbers and blanks in any order.
fn hostile_originator() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("resume".to_owned()),
        Just("again".to_owned()),
        Just("18446744073709551615".to_owned()),
        Just("18446744073709551616".to_owned()),
        Just("127.0.0.1".to_owned()),
        "[-+]?[0-9]{0,40}",
        "[\u{0660}-\u{0669}]{1,3}",
        "[ \t\r\n\0]{0,3}",
        ".{0,8}",
    ];
    let blank = prop_oneof![4 => Just(" "), 1 => Just(""), 1 => Just("  "), 1 => Just("\t"), 1 => Just("\n")];
    let words = prop::collection::vec((word, blank), 0..6)
        .prop_map(|parts| parts.into_iter().map(|(word, blank)| word + blank).collect());
    prop_oneof!["(resume|again) [-+0-9]{1,3} [-+0-9]{1,3}", words]
}

/// What the originator address must mean, written with a pattern instead of a split.
fn model(text: &str) -> Opening {
    let is_decimal =
        |digits: &str| !digits.is_empty() && digits.chars().all(|digit: char| digit.is_ascii_digit());
    let position = |rest: &str| {
        let (received, granted) = rest.split_once(' ')?;
        let both = is_decimal(received) && is_decimal(granted);
        both.then(|| Some(Position { received: received.parse().ok()?, granted: granted.parse().ok()? }))?
    };
    if let Some(position) = text.strip_prefix("resume ").and_then(position) {
        return Opening::Resume(position);
    }
    text.strip_prefix("again ").and_then(position).map_or(Opening::New, Opening::Again)
}

proptest! {
    #[test]
    fn a_hostile_originator_means_what_its_words_say(text in hostile_originator()) {
        prop_assert_eq!(Opening::from_originator(&text), model(&text));
    }

    #[test]
    fn any_text_is_an_originator(text in any::<String>()) {
        prop_assert_eq!(Opening::from_originator(&text), model(&text));
    }

    #[test]
    fn an_opening_is_read_as_it_was_written(position in any_position(), resumes in any::<bool>()) {
        let opening = if resumes { Opening::Resume(position) } else { Opening::Again(position) };
        prop_assert_eq!(Opening::from_originator(&opening.to_string()), opening);
    }

    #[test]
    fn an_opening_with_anything_around_it_is_new(
        position in any_position(),
        before in "[ \t\n0-9a-z]{0,2}",
        after in "[ \t\n\0a-z]{0,2}",
    ) {
        prop_assume!(!(before.is_empty() && after.is_empty()));
        let text = format!("{before}{}{after}", Opening::Resume(position));
        prop_assert_eq!(Opening::from_originator(&text), Opening::New);
    }

    #[test]
    fn a_position_has_16_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let position = Position::from_bytes(&bytes);
        prop_assert_eq!(position.is_some(), bytes.len() == POSITION_BYTES);
        if let Some(position) = position {
            prop_assert_eq!(position.to_bytes().to_vec(), bytes);
        }
    }

    #[test]
    fn only_32_lower_case_hex_digits_are_an_id(
        text in prop_oneof!["[0-9a-f]{30,34}", "[0-9a-fA-F]{32}", any::<String>()]
    ) {
        let is_digit = |digit: char| digit.is_ascii_hexdigit() && !digit.is_ascii_uppercase();
        let expected = if text.len() == 32 && text.chars().all(is_digit) { Ok(text.clone()) } else { Err(SessionIdError) };
        prop_assert_eq!(text.parse::<SessionId>().map(|id| id.to_string()), expected);
    }

    #[test]
    fn an_id_of_random_bits_is_one(bits in any::<u128>()) {
        let id = SessionId::from_random(bits);
        prop_assert_eq!(id.to_string().parse::<SessionId>(), Ok(id));
    }
}
