//! What the roles of the simulator share: arguments of the form `--name value`, and waiting for a signal to end.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// The arguments by name.
#[derive(Debug)]
pub struct Args(BTreeMap<String, String>);

impl Args {
    /// Parses `--name value` pairs, or `-c value` for a name of one letter; only names in `known` may occur, each at most once.
    ///
    /// # Errors
    /// If an argument is unknown, given twice, or lacks its value; names it.
    pub fn parse(args: impl IntoIterator<Item = String>, known: &[&str]) -> Result<Self> {
        let mut found = BTreeMap::new();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").filter(|name| name.len() > 1);
            let name = name.or_else(|| arg.strip_prefix('-').filter(|name| name.len() == 1));
            let Some(name) = name.filter(|name| known.contains(name)) else {
                bail!("unknown argument {arg:?}: expected one of --{}", known.join(", --"));
            };
            let Some(value) = args.next() else { bail!("--{name} needs a value") };
            if found.insert(name.to_owned(), value).is_some() {
                bail!("--{name} is given twice");
            }
        }
        Ok(Self(found))
    }

    /// The value of `--name`, if given.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// Waits for SIGTERM or SIGINT, so that `main` returns and sockets are removed.
///
/// # Errors
/// If signals can't be waited for.
pub async fn until_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        done = tokio::signal::ctrl_c() => done.context("waiting for SIGINT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args> {
        Args::parse(args.iter().map(|arg| (*arg).to_owned()), &["listen", "kbs"])
    }

    #[test]
    fn pairs_are_found_by_name() {
        let args = parse(&["--listen", "a", "--kbs", "b"]).unwrap();
        assert_eq!((args.get("listen"), args.get("kbs")), (Some("a"), Some("b")));
    }

    #[test]
    fn a_wrong_argument_is_named_in_the_error() {
        for (args, expected) in [
            (&["--nope", "x"][..], "unknown argument \"--nope\""),
            (&["listen"], "unknown argument \"listen\""),
            (&["--kbs"], "--kbs needs a value"),
            (&["--kbs", "a", "--kbs", "b"], "--kbs is given twice"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
