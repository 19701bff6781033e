//! Times and sizes with units.

use std::time::Duration;

/// Units of time, the largest first, in seconds.
const TIMES: [(char, u64); 4] = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

/// Reads `90` (seconds), `90s`, `5m` or `1h30m`: whole numbers with units, the largest first.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if let Some(seconds) = number(text) {
        return Some(Duration::from_secs(seconds));
    }
    let (mut rest, mut seconds, mut found) = (text, 0_u64, false);
    for (unit, length) in TIMES {
        // Only the next unit of the text: `1h30m` has an `m` further on.
        let end = rest.find(|c: char| !c.is_ascii_digit());
        let Some((count, more)) = end.and_then(|end| rest.split_at_checked(end)) else { break };
        if let Some(more) = more.strip_prefix([unit, unit.to_ascii_uppercase()]) {
            seconds = seconds.checked_add(number(count)?.checked_mul(length)?)?;
            (rest, found) = (more, true);
        }
    }
    (found && rest.is_empty()).then(|| Duration::from_secs(seconds))
}

/// Reads a number of bytes: `1048576`, `1M`, `1MiB` (1024 each) or `1MB` (1000 each), in any case, as GNU's tools do.
pub(super) fn bytes(text: &str) -> Option<usize> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at_checked(end)?;
    let unit = unit.to_ascii_lowercase();
    let power = |letter: Option<char>| match letter {
        Some('k') => Some(1),
        Some('m') => Some(2),
        Some('g') => Some(3),
        Some('t') => Some(4),
        _ => None,
    };
    let factor = match (power(unit.chars().next()), unit.get(1..)) {
        _ if unit.is_empty() || unit == "b" => 1,
        (Some(power), Some("" | "ib")) => 1024_u64.pow(power),
        (Some(power), Some("b")) => 1000_u64.pow(power),
        _ => return None,
    };
    usize::try_from(number(count)?.checked_mul(factor)?).ok()
}

fn number(text: &str) -> Option<u64> {
    // `parse` takes a sign, too.
    text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_seconds_or_has_units() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("5m", 300),
            ("1h30m", 5400),
            ("1h", 3600),
            ("1d", 86_400),
            ("1d1h1m1s", 90_061),
            ("2H", 7200),
            ("90m", 5400),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "s",
            "soon",
            "-5",
            "+5",
            "5 m",
            "1.5h",
            "30m1h",
            "5mm",
            "1h30",
            "h1",
            "5ms",
            "1w",
            "ü",
            "99999999999999999999",
            "999999999999999999d",
            "18446744073709551615m",
        ] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn a_size_is_bytes_or_has_a_unit() {
        for (text, size) in [
            ("1048576", 1 << 20),
            ("1048576B", 1 << 20),
            ("1M", 1 << 20),
            ("1MiB", 1 << 20),
            ("1mib", 1 << 20),
            ("1MB", 1_000_000),
            ("1G", 1 << 30),
            ("1GiB", 1 << 30),
            ("2k", 2048),
            ("1kB", 1000),
        ] {
            assert_eq!(bytes(text), Some(size), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "+1", "1 G", "1GiBs", "1x", "1Gi", "1ü", "99999999999T"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(text in "\\PC{0,12}|[0-9]{0,22}[a-zA-Z]{0,4}[0-9]{0,3}[dhms]?") {
            let _ = (duration(&text), bytes(&text));
        }
    }
}
