//! Environment variables that no program of this project reads: most likely mistyped.

use std::ffi::OsStr;

use secure_comms_keys::text::one_line;
use strsim::jaro_winkler;

use crate::cli::setting::SERVE;

const PREFIX: &str = "SECURE_COMMS_";
/// Variables that are no settings of `serve`. Those of the tests end with `_DIR`.
const OTHERS: [&str; 5] = [
    "SECURE_COMMS_CONFIG",
    "SECURE_COMMS_EVENTS",
    "SECURE_COMMS_POD",
    "SECURE_COMMS_BIN_DIR",
    "SECURE_COMMS_TEST_VM_DIR",
];
/// From this similarity on, of 0 to 1, a known name is suggested; clap suggests flags from 0.7.
pub(super) const SIMILAR: f64 = 0.7;
/// Longest name that is shown.
const NAME_MAX: usize = 100;

/// A warning for each variable `SECURE_COMMS_*` that is not known, with the most similar one that is.
pub fn unknown_variables<'a>(names: impl IntoIterator<Item = &'a OsStr>) -> Vec<String> {
    let known: Vec<&str> =
        SERVE.iter().flat_map(|setting| setting.variables).copied().chain(OTHERS).collect();
    let warning = |name: &OsStr| {
        let name = name.to_string_lossy();
        let rest = name.strip_prefix(PREFIX)?;
        if known.contains(&name.as_ref()) {
            return None;
        }
        let similarity = |known: &&str| jaro_winkler(rest, known.strip_prefix(PREFIX).unwrap_or(known));
        let nearest = known.iter().copied().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        let advice = match nearest.filter(|known| similarity(known) >= SIMILAR) {
            Some(known) => format!("did you mean {known}?"),
            None => "see --help for the variables that are read".to_owned(),
        };
        Some(format!("the variable {} is unknown and ignored: {advice}", one_line(&name, NAME_MAX)))
    };
    let mut warnings: Vec<String> = names.into_iter().filter_map(warning).collect();
    warnings.sort();
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_variable_is_warned_of_with_a_suggestion() {
        let names = [
            "PATH",
            "SECURE_COMMS",
            "SECURE_COMMS_KBS_ADDR",
            "SECURE_COMMS_KBS_ADRR",
            "SECURE_COMMS_INBOUND",
            "SECURE_COMMS_XYZZY",
            "SECURE_COMMS_log",
            "SECURE_COMMS_",
        ];
        let unknown = |name: &str| format!("the variable {name} is unknown and ignored:");
        assert_eq!(
            unknown_variables(names.map(OsStr::new)),
            [
                format!("{} see --help for the variables that are read", unknown("SECURE_COMMS_")),
                format!("{} did you mean SECURE_COMMS_INBOUNDS?", unknown("SECURE_COMMS_INBOUND")),
                format!("{} did you mean SECURE_COMMS_KBS_ADDR?", unknown("SECURE_COMMS_KBS_ADRR")),
                format!("{} see --help for the variables that are read", unknown("SECURE_COMMS_XYZZY")),
                format!("{} see --help for the variables that are read", unknown("SECURE_COMMS_log")),
            ]
        );
    }
}
