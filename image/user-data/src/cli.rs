//! The command line: the names, flags and exit codes of cloud-api-adaptor's `process-user-data` and `azure-ready`, and a few flags of
//! our own.

mod azure;
mod flags;

use std::time::Duration;

pub use azure::parse_azure_ready;

use crate::azure_ready;
use crate::provision::{Options, WithoutInitData};
use flags::Flags;

/// Printed by `process-user-data --help`.
pub const HELP: &str = "\
Usage: process-user-data provision-files [FLAG]...
       process-user-data azure-ready [FLAG]...   the same as azure-ready, another name of this program
       process-user-data -v | --version | -h | --help

Fetches a pod VM's user data from its cloud (NoCloud, Azure, AWS, GCP, Alibaba Cloud, OpenStack), checks them and
their init-data, writes the files below /run/peerpod and extends PCR 8 by the digest of the init-data.
On a machine in none of these clouds it only processes /run/peerpod/initdata, if that is there.

Flags (-FLAG VALUE or -FLAG=VALUE, with one dash or two):
  -t, --user-data-fetch-timeout SECONDS  for finding and fetching the user data (default 180)
  --without-init-data CHOICE             what a pod without init-data gets (default refuse):
                                           refuse     nothing; the program fails
                                           dummy      upstream's default init-data, the same for every pod
                                           user-data  as dummy, but aa.toml and cdh.toml of the user data are used,
                                                      though no evidence covers them: not for confidential pods
  --require-tpm                          fail if the VM has no TPM

Exit status: 0 success, or no known cloud; 1 a fault, which is on standard error and on the console, or wrong usage.
";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Print this and succeed.
    Print(String),
    /// `provision-files`.
    ProvisionFiles(ProvisionFiles),
    /// `azure-ready`.
    AzureReady(azure_ready::Settings),
}

/// The flags of `provision-files`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvisionFiles {
    /// For detection and fetching.
    pub timeout: Duration,
    /// What the image allows.
    pub options: Options,
}

/// Wrong usage; the text names the argument.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}; see --help")]
pub struct UsageError {
    text: String,
    /// 1 for `process-user-data` and 2 for `azure-ready`, as upstream's.
    pub exit_status: u8,
}

/// Reads the arguments after the program's name.
///
/// # Errors
/// For a command, flag or value that is not known.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Command, UsageError> {
    let usage = |text| UsageError { text, exit_status: 1 };
    let mut args = args.into_iter();
    match args.next().as_deref() {
        Some("provision-files") => provision_files(args).map_err(usage),
        Some("azure-ready") => parse_azure_ready(args),
        Some("-v" | "--version" | "version") => Ok(Command::Print(version("process-user-data"))),
        Some("-h" | "--help" | "help") => Ok(Command::Print(HELP.to_owned())),
        Some(other) => Err(usage(format!("unknown command \"{}\"", other.escape_debug()))),
        None => Err(usage("a command is missing".to_owned())),
    }
}

fn version(name: &str) -> String {
    format!("{name} {}\n", env!("CARGO_PKG_VERSION"))
}

fn provision_files(args: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut timeout = Duration::from_secs(180);
    let mut options = Options::default();
    let mut flags = Flags::new(args);
    while let Some(flag) = flags.next()? {
        match flag.as_str() {
            "t" | "user-data-fetch-timeout" => timeout = flags.value(seconds)?,
            "without-init-data" => options.without_init_data = flags.value(choice)?,
            "require-tpm" => options.require_tpm = flags.switch()?,
            "h" | "help" => return Ok(Command::Print(HELP.to_owned())),
            _ => return Err(flags.unknown()),
        }
    }
    Ok(Command::ProvisionFiles(ProvisionFiles { timeout, options }))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let expected = || "expected a number of seconds from 1 to 86400".to_owned();
    let seconds = text.parse().map_err(|_| expected())?;
    if (1..=86400).contains(&seconds) { Ok(Duration::from_secs(seconds)) } else { Err(expected()) }
}

fn choice(text: &str) -> Result<WithoutInitData, String> {
    text.parse().map_err(|error: crate::provision::UnknownChoice| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn provision_files(line: &str) -> ProvisionFiles {
        match parsed(line).unwrap() {
            Command::ProvisionFiles(flags) => flags,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_timeout_has_two_names_and_both_forms() {
        for flags in
            ["", "-t 180", "-t=180", "--user-data-fetch-timeout 180", "--user-data-fetch-timeout=180"]
        {
            let flags = provision_files(&format!("provision-files {flags}"));
            assert_eq!(flags.timeout, Duration::from_secs(180));
            assert_eq!(flags.options, Options::default());
        }
        assert_eq!(provision_files("provision-files -t 5").timeout, Duration::from_secs(5));
    }

    #[test]
    fn what_the_image_allows_is_said_by_flags() {
        let flags = provision_files("provision-files --without-init-data=dummy --require-tpm");
        let options = Options { without_init_data: WithoutInitData::Dummy, require_tpm: true };
        assert_eq!(flags.options, options);
    }

    #[test]
    fn wrong_usage_names_the_argument() {
        for (line, expected) in [
            ("", "a command is missing; see --help"),
            ("provision", "unknown command \"provision\"; see --help"),
            ("provision-files --nope", "unknown flag \"--nope\"; see --help"),
            ("provision-files file", "unexpected argument \"file\"; see --help"),
            ("provision-files -t", "-t: a value is missing; see --help"),
            ("provision-files -t 0", "-t: expected a number of seconds from 1 to 86400; see --help"),
            ("provision-files -t=x", "-t=x: expected a number of seconds from 1 to 86400; see --help"),
            (
                "provision-files --without-init-data any",
                "--without-init-data: expected refuse, dummy or user-data; see --help",
            ),
            ("provision-files --require-tpm=no", "--require-tpm=no: takes no value; see --help"),
        ] {
            let error = parsed(line).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.exit_status), (expected, 1), "{line}");
        }
    }

    #[test]
    fn azure_ready_is_a_command_too() {
        let expected = parse_azure_ready(["-timeout".to_owned(), "5s".to_owned()]);
        assert!(matches!(expected, Ok(Command::AzureReady(_))));
        assert_eq!(parsed("azure-ready -timeout 5s"), expected);
        assert_eq!(parsed("azure-ready -nope").unwrap_err().exit_status, 2);
    }

    #[test]
    fn help_and_version_are_printed() {
        for line in ["-h", "--help", "provision-files --help"] {
            assert_eq!(parsed(line), Ok(Command::Print(HELP.to_owned())), "{line}");
        }
        let Ok(Command::Print(version)) = parsed("-v") else { panic!() };
        assert!(version.starts_with("process-user-data "), "{version}");
    }
}
