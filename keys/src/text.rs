//! Texts that strangers send, made fit for one line of a log or a terminal.

/// Escapes what could forge a line: control characters, line separators, and marks that reorder text on a screen.
pub fn escape(text: &str) -> String {
    one_line(text, usize::MAX)
}

/// Like [`escape`], cut after about `max` bytes. A line that was cut says how many bytes of `text` are missing.
pub fn one_line(text: &str, max: usize) -> String {
    let mut line = String::with_capacity(text.len().min(max));
    for (index, c) in text.char_indices() {
        if line.len() >= max {
            line.push_str(&format!("... ({} bytes more)", text.len() - index));
            break;
        }
        if c.is_control() || forges_lines(c) {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// Line and paragraph separator, and the characters with Unicode's property `Bidi_Control` (UAX #9).
fn forges_lines(c: char) -> bool {
    matches!(
        c,
        '\u{2028}' | '\u{2029}'
            | '\u{061c}' | '\u{200e}' | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 1900;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape("a\nb\r\x1b[2J\0\u{7f}\u{9b}31m ü"), "a\\nb\\r\\u{1b}[2J\\u{0}\\u{7f}\\u{9b}31m ü");
    }

    #[test]
    fn line_separators_are_escaped() {
        assert_eq!(escape("a\u{85}b\u{2028}c\u{2029}d"), "a\\u{85}b\\u{2028}c\\u{2029}d");
    }

    #[test]
    fn marks_that_reorder_text_are_escaped() {
        let marks = ['\u{61c}', '\u{200e}', '\u{200f}'].into_iter();
        for mark in marks.chain('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}') {
            assert_eq!(escape(&format!("a{mark}b")), format!("a\\u{{{:x}}}b", u32::from(mark)));
        }
    }

    #[test]
    fn a_long_text_is_cut_and_says_how_much_is_missing() {
        let line = one_line(&"ü".repeat(5000), MAX);
        assert!(
            line.len() < MAX + 40 && line.ends_with(&format!("... ({} bytes more)", 10_000 - MAX)),
            "{line}"
        );
        assert!(one_line(&"\n".repeat(5000), MAX).len() < MAX + 40);
        assert_eq!(one_line("four", 4), "four");
        assert_eq!(one_line("", 0), "");
    }

    proptest! {
        #[test]
        fn any_text_becomes_one_bounded_line(text: String, max in 0..200_usize) {
            let line = one_line(&text, max);
            prop_assert!(!line.chars().any(|c| c.is_control() || forges_lines(c)), "{:?}", line);
            prop_assert!(line.len() < max + 60);
        }

        #[test]
        fn printable_text_is_kept(text in "[ -~äöü€😀]{0,100}") {
            prop_assert_eq!(escape(&text), text);
        }
    }
}
