//! The kernel's command line.

use crate::root_hash::{BadRootHash, RootHash};

/// The command line names no root.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadCmdline {
    /// No `roothash=`.
    #[error("no roothash=: the image's build puts it there, a kernel started by hand needs it appended")]
    Missing,
    /// More than one `roothash=`.
    #[error("more than one roothash=")]
    Repeated,
    /// The value is not a SHA-256 in hex.
    #[error("roothash=: {0}")]
    Malformed(#[from] BadRootHash),
}
crate::failure::causes!(BadCmdline);

/// Value of `roothash=`, which must occur exactly once.
///
/// # Errors
/// The parameter is missing, repeated or malformed.
pub fn root_hash(cmdline: &str) -> Result<RootHash, BadCmdline> {
    let mut quoted = false;
    // As the kernel splits (lib/cmdline.c, next_arg): blanks within double quotes belong to the parameter.
    let mut values = cmdline
        .split(|c: char| {
            quoted ^= c == '"';
            !quoted && c.is_ascii_whitespace()
        })
        .filter_map(|parameter| parameter.strip_prefix("roothash="));
    let value = values.next().ok_or(BadCmdline::Missing)?;
    if values.next().is_some() {
        return Err(BadCmdline::Repeated);
    }
    Ok(RootHash::parse(value)?)
}

#[cfg(test)]
mod tests {
    use super::{BadCmdline, root_hash};
    use proptest::prelude::*;

    fn hash() -> String {
        "ab".repeat(32)
    }

    #[test]
    fn the_root_hash_is_found_among_others() {
        let line = format!("console=ttyS0 roothash={} panic=-1\n", hash());
        assert_eq!(root_hash(&line).unwrap().to_string(), hash());
    }

    #[test]
    fn a_missing_repeated_or_malformed_root_hash_is_refused() {
        let hash = hash();
        for (line, error) in [
            (String::new(), BadCmdline::Missing),
            (format!("usrhash={hash} xroothash={hash} roothash {hash}"), BadCmdline::Missing),
            (format!("a=\"x roothash={hash} y\""), BadCmdline::Missing),
            (format!("roothash={hash} roothash={hash}"), BadCmdline::Repeated),
            (format!("roothash= roothash={hash}"), BadCmdline::Repeated),
            ("roothash=".into(), BadCmdline::Malformed(super::BadRootHash)),
            (format!("roothash=\"{hash}\""), BadCmdline::Malformed(super::BadRootHash)),
            (format!("roothash={hash}00"), BadCmdline::Malformed(super::BadRootHash)),
        ] {
            assert_eq!(root_hash(&line), Err(error), "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_line_upsets_it(line in "[ -~\n]{0,200}") {
            let hash = root_hash(&line);
            prop_assert!(hash.is_err() || line.contains("roothash="));
        }
    }
}
