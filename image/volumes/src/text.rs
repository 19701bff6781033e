//! Text from outside, made fit for a log line.

/// Most characters of one text from outside in a log line or an answer.
const MAX: usize = 300;
/// Most characters of a log line or an answer.
const LINE_MAX: usize = 2000;

/// A text from outside in one line: control characters and line separators become spaces, and a long text is cut.
#[must_use]
pub fn one_line(text: &str) -> String {
    cut_line(text, MAX)
}

/// A whole message in one line.
#[must_use]
pub fn message_line(text: &str) -> String {
    cut_line(text, LINE_MAX)
}

fn cut_line(text: &str, max: usize) -> String {
    let unsafe_here = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let text = text.trim();
    let mut line: String = text.chars().take(max).map(|c| if unsafe_here(c) { ' ' } else { c }).collect();
    if text.chars().nth(max).is_some() {
        line.push_str("..");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_text_from_outside_is_one_short_line() {
        assert_eq!(one_line(" a\nb\r\x1b[31m\u{202e}c "), "a b  [31m c");
        assert_eq!(one_line(&"x".repeat(5000)).len(), 302);
    }
}
