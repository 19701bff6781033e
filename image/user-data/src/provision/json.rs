//! Tells a complete JSON object from one that was cut. It keeps nothing of the text.

/// How deep arrays and objects may be nested.
const DEPTH: usize = 64;

/// Whether the text is one JSON object by RFC 8259, with nothing but white space around it.
pub(super) fn is_object(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let mut scan = Scan { rest: text.as_bytes() };
    scan.space();
    scan.rest.first() == Some(&b'{') && scan.value(DEPTH).is_some() && {
        scan.space();
        scan.rest.is_empty()
    }
}

struct Scan<'a> {
    rest: &'a [u8],
}

impl Scan<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn take(&mut self, expected: u8) -> Option<()> {
        (self.next()? == expected).then_some(())
    }

    fn take_if(&mut self, expected: u8) -> bool {
        let there = self.rest.first() == Some(&expected);
        if there {
            self.rest = self.rest.get(1..).unwrap_or_default();
        }
        there
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_ascii_start();
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.rest = self.rest.strip_prefix(word)?;
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        self.space();
        match self.rest.first()? {
            b'{' => self.list(b'{', b'}', |scan| {
                scan.string()?;
                scan.space();
                scan.take(b':')?;
                scan.value(depth)
            }),
            b'[' => self.list(b'[', b']', |scan| scan.value(depth)),
            b'"' => self.string(),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => self.number(),
        }
    }

    fn list(&mut self, open: u8, close: u8, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.take(open)?;
        self.space();
        if self.take_if(close) {
            return Some(());
        }
        loop {
            self.space();
            item(self)?;
            self.space();
            if self.take_if(close) {
                return Some(());
            }
            self.take(b',')?;
        }
    }

    fn string(&mut self) -> Option<()> {
        self.take(b'"')?;
        loop {
            match self.next()? {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => {
                        for _ in 0..4 {
                            self.next()?.is_ascii_hexdigit().then_some(())?;
                        }
                    }
                    _ => return None,
                },
                0..=0x1f => return None,
                _ => {}
            }
        }
    }

    fn digits(&mut self) -> Option<()> {
        let count = self.rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.rest = self.rest.get(count..)?;
        (count > 0).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        self.take_if(b'-');
        if !self.take_if(b'0') {
            self.digits()?;
        }
        if self.take_if(b'.') {
            self.digits()?;
        }
        if self.take_if(b'e') || self.take_if(b'E') {
            if !self.take_if(b'-') {
                self.take_if(b'+');
            }
            self.digits()?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAA: &str = "{\n  \"pod-network\": {\"podip\": \"10.1.2.3/24\", \"mtu\": 1450, \"routes\": [{}, []]},\n  \
        \"pod-name\": \"a\\\"\\u00e9\\\\\", \"n\": -0.5e+3, \"t\": true, \"f\": false, \"z\": null}\n";

    #[test]
    fn a_text_that_was_cut_anywhere_is_refused() {
        assert!(is_object(CAA.as_bytes()));
        let end = CAA.trim_end().len();
        for at in 0..end {
            assert!(!is_object(CAA[..at].as_bytes()), "cut at {at}");
        }
    }

    #[test]
    fn only_an_object_counts() {
        for text in [
            "",
            " ",
            "[]",
            "1",
            "null",
            "\"{}\"",
            "{}{}",
            "{} x",
            "{,}",
            "{\"a\":01}",
            "{\"a\":1,}",
            "{\"a\" 1}",
        ] {
            assert!(!is_object(text.as_bytes()), "{text}");
        }
        assert!(!is_object(b"{\"\xff\":1}"));
        assert!(is_object(b" {} \n"));
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(is_object(nested(DEPTH - 1).as_bytes()));
        assert!(!is_object(nested(DEPTH).as_bytes()));
        assert!(!is_object("{\"a\":".repeat(100_000).as_bytes()));
    }

    proptest! {
        // serde_json is what reads the file afterwards: the two must agree.
        #[test]
        fn it_agrees_with_serde_json(text in "[{}\\[\\]:,\"a0\\-.e\\\\ untrfalse]{0,24}") {
            let text = format!("{{{text}");
            let real = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&text);
            // A number too large for its type is complete all the same.
            let real = real.is_ok() || real.is_err_and(|error| error.to_string().contains("out of range"));
            prop_assert_eq!(is_object(text.as_bytes()), real, "{}", text);
        }
    }
}
