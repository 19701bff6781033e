//! `--phase`: which pods are listed.

use std::str::FromStr;

use crate::api::types::{Phase, Pod};

/// All phases, by their words.
const PHASES: [(&str, Phase); 11] = [
    ("NotPrepared", Phase::NotPrepared),
    ("Preparing", Phase::Preparing),
    ("Prepared", Phase::Prepared),
    ("Connecting", Phase::Connecting),
    ("Attesting", Phase::Attesting),
    ("Upgrading", Phase::Upgrading),
    ("Up", Phase::Up),
    ("Down", Phase::Down),
    ("Failed", Phase::Failed),
    ("Ending", Phase::Ending),
    ("Stopped", Phase::Stopped),
];

/// The word of a phase.
pub(in crate::commands) fn word(phase: Phase) -> &'static str {
    PHASES.iter().find(|(_, known)| *known == phase).map_or("", |(word, _)| word)
}

/// Phases that are wanted, and those that are not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    wanted: Vec<Phase>,
    unwanted: Vec<Phase>,
}

impl Selector {
    pub(super) fn takes(&self, pod: &Pod) -> bool {
        (self.wanted.is_empty() || self.wanted.contains(&pod.phase)) && !self.unwanted.contains(&pod.phase)
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut selector = Self::default();
        for part in text.split(',').map(str::trim) {
            let (list, word) = match part.strip_prefix('!') {
                Some(word) => (&mut selector.unwanted, word),
                None => (&mut selector.wanted, part),
            };
            let known = PHASES.iter().find(|(known, _)| known.eq_ignore_ascii_case(word));
            let Some((_, phase)) = known else {
                let words: Vec<_> = PHASES.iter().map(|(word, _)| *word).collect();
                return Err(format!("expected phases of {}, comma separated", words.join(", ")));
            };
            list.push(*phase);
        }
        Ok(selector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::pod::list::tests::pod;

    #[test]
    fn phases_are_selected_or_left_out() {
        let takes = |text: &str, phase: Phase| {
            text.parse::<Selector>().unwrap().takes(&Pod { phase, ..pod("1", "a") })
        };
        assert!(takes("up,Down", Phase::Down) && !takes("up,Down", Phase::Failed));
        assert!(takes("!Up", Phase::Down) && !takes("!Up", Phase::Up));
        assert!(takes("!Up, !Down", Phase::Failed));
        for bad in ["", "up,", "Running", "!"] {
            assert!(bad.parse::<Selector>().unwrap_err().contains("NotPrepared, Preparing"), "{bad}");
        }
    }

    #[test]
    fn words_are_those_of_the_api() {
        for (word, phase) in PHASES {
            assert_eq!(serde_json::to_value(phase).unwrap(), word);
        }
    }
}
