//! Texts that strangers send, made fit for one line of a log or a terminal.

/// Escapes what could forge a line or hide a part of it: control characters, line separators, marks that reorder text
/// on a screen, and characters that are not seen.
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
        if is_unsafe(c) {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

fn is_unsafe(c: char) -> bool {
    c.is_control() || forges_lines(c) || is_invisible(c)
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

/// The other characters of Unicode's category `Cf` that have no shape of their own, variation selectors, and fillers:
/// text with them looks like another text, and a search does not find it.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{00ad}' | '\u{034f}' | '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200d}'
            | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
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
    fn characters_that_are_not_seen_are_escaped() {
        let invisible =
            "\u{ad}\u{200b}\u{200d}\u{2060}\u{fe0f}\u{feff}\u{fffb}\u{3164}\u{e0001}\u{e007f}\u{e0100}";
        for c in invisible.chars() {
            assert_eq!(escape(&format!("a{c}b")), format!("a\\u{{{:x}}}b", u32::from(c)));
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
            prop_assert!(!line.chars().any(is_unsafe), "{:?}", line);
            prop_assert!(line.len() < max + 60);
        }

        #[test]
        fn printable_text_is_kept(text in "[ -~äöü€😀]{0,100}") {
            prop_assert_eq!(escape(&text), text);
        }
    }
}
