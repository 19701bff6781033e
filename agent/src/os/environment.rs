//! The environment variables of the agent, and a suggestion for a name with a typo.

use std::env;

use secure_comms_keys::text::one_line;

use super::logging::LEVEL_VARIABLE;

/// Variables with this prefix are meant for Secure Comms.
const PREFIX: &str = "SECURE_COMMS";
/// The longest name that is quoted, in bytes.
const QUOTED: usize = 100;

/// Warns of variables that look like ours and are not read.
pub fn warn_of_unknown_variables() {
    let names: Vec<String> = env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    for line in warnings(&names) {
        log::warn!("{line}");
    }
}

fn warnings(names: &[String]) -> Vec<String> {
    let unknown = names.iter().filter(|name| {
        name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
            && *name != LEVEL_VARIABLE
    });
    let warning = |name: &String| {
        let advice = match closest(name, [LEVEL_VARIABLE].into_iter()) {
            Some(known) => format!("did you mean {known}?"),
            None => format!("the agent is configured by flags and reads only {LEVEL_VARIABLE}"),
        };
        format!("environment variable {}: not known to the agent; {advice}", one_line(name, QUOTED))
    };
    unknown.map(warning).collect()
}

/// The name that a typo was meant to be: at most a third of its letters differ.
pub(crate) fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_ascii_lowercase();
    let distance = |known: &str| edits(&name, &known.to_ascii_lowercase());
    known
        .map(|known| (distance(known), known))
        .filter(|(edits, known)| edits * 3 <= known.len())
        .min()?
        .1
        .into()
}

/// Letters to insert, remove, replace or swap with their neighbour to get from one text to the other.
fn edits(from: &str, to: &str) -> usize {
    // Longer names are no typos, and the time grows with the product.
    let letters = |text: &str| text.chars().take(QUOTED).collect::<Vec<_>>();
    let (from, to) = (letters(from), letters(to));
    let at = |row: &[usize], index: usize| row.get(index).copied().unwrap_or(usize::MAX / 2);
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in to.iter().enumerate() {
            let replaced = at(&above, j) + usize::from(a != b);
            let moved = (at(&row, j) + 1).min(at(&above, j + 1) + 1);
            let swap = i
                .checked_sub(1)
                .zip(j.checked_sub(1))
                .filter(|&(i, j)| from.get(i) == Some(b) && to.get(j) == Some(a));
            let swapped = swap.map_or(usize::MAX, |(_, j)| at(&before, j) + 1);
            row.push(replaced.min(moved).min(swapped));
        }
        before = std::mem::replace(&mut above, row);
    }
    at(&above, to.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_a_letter_more_less_changed_or_swapped() {
        for (from, to, expected) in [
            ("config", "config", 0),
            ("confg", "config", 1),
            ("configg", "config", 1),
            ("konfig", "config", 1),
            ("cofnig", "config", 1),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("\u{fc}", "u", 1),
        ] {
            assert_eq!(edits(from, to), expected, "{from} {to}");
        }
        assert!(edits(&"x".repeat(100_000), "config") > 90, "and at once");
    }

    #[test]
    fn a_name_that_resembles_none_has_no_suggestion() {
        let known = ["listen", "config", "version"];
        assert_eq!(closest("Config", known.into_iter()), Some("config"));
        assert_eq!(closest("lsiten", known.into_iter()), Some("listen"));
        for other in ["", "x", "fig", "something-else"] {
            assert_eq!(closest(other, known.into_iter()), None, "{other}");
        }
    }

    #[test]
    fn a_variable_that_is_not_read_is_warned_of() {
        let names =
            ["SECURE_COMMS_LOG", "HOME", "SECURE_COMMS_LGO", "SECURE_COMMS_KBS_ADDR", "secure_comms_log"];
        let lines = warnings(&names.map(String::from));
        assert_eq!(
            lines,
            [
                "environment variable SECURE_COMMS_LGO: not known to the agent; did you mean SECURE_COMMS_LOG?",
                "environment variable SECURE_COMMS_KBS_ADDR: not known to the agent; the agent is configured by flags \
                 and reads only SECURE_COMMS_LOG",
                "environment variable secure_comms_log: not known to the agent; did you mean SECURE_COMMS_LOG?",
            ]
        );
        assert_eq!(warnings(&["SECURE_COMMS_\n".into(), "SECURE_COMM\u{20ac}".into()]).len(), 1);
    }
}
