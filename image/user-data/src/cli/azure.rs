//! The command line of `azure-ready`.

use std::time::Duration;

use super::flags::Flags;
use super::{Command, UsageError, version};
use crate::azure_ready::{EndpointError, Settings};

/// Printed by `azure-ready --help`.
const HELP: &str = "\
Usage: azure-ready [FLAG]...

Reports to Azure that this VM is ready. A report that fails because of the network, or because the server is busy, is
tried again every 5 s for 10 min.

Flags (-FLAG VALUE or -FLAG=VALUE, with one dash or two):
  -endpoint URL      the wire server, http://ADDRESS[:PORT] (default http://168.63.129.16)
  -timeout DURATION  for one request, such as 30s, 500ms or 1m30s (default 30s)
  -v                 accepted for upstream's sake: there is one line for each step anyway
  -version           print the version

Exit status: 0 reported; 1 a fault, which is on standard error and on the console; 2 wrong usage.
";

/// Reads the arguments after the name `azure-ready`. What is no flag ends the flags and is ignored, as upstream's program does.
///
/// # Errors
/// For a flag or value that is not known.
pub fn parse_azure_ready(args: impl IntoIterator<Item = String>) -> Result<Command, UsageError> {
    read(args.into_iter()).map_err(|text| UsageError { text, exit_status: 2 })
}

fn read(args: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut settings = Settings::default();
    let mut flags = Flags::new(args);
    // The error is an argument that is no flag: it ends them.
    while let Ok(Some(flag)) = flags.next() {
        match flag.as_str() {
            "endpoint" => {
                settings.endpoint =
                    flags.value(|url| url.parse().map_err(|error: EndpointError| error.to_string()))?;
            }
            "timeout" => settings.timeout = flags.value(duration)?,
            "v" => {
                flags.switch()?;
            }
            "version" => return Ok(Command::Print(version("azure-ready"))),
            "h" | "help" => return Ok(Command::Print(HELP.to_owned())),
            _ => return Err(flags.unknown()),
        }
    }
    Ok(Command::AzureReady(settings))
}

/// As Go writes durations: numbers with units, from 1 ms to 1 h.
fn duration(text: &str) -> Result<Duration, String> {
    let total =
        sum(text).filter(|total| (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(total));
    total.ok_or_else(|| "expected a duration from 1ms to 1h, such as 30s".to_owned())
}

fn sum(mut rest: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|digit: char| !digit.is_ascii_digit())?;
        let (number, unit) = rest.split_at_checked(digits)?;
        let end = unit.find(|digit: char| digit.is_ascii_digit()).unwrap_or(unit.len());
        let (unit, tail) = unit.split_at_checked(end)?;
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        let part = number.parse::<u64>().ok()?.checked_mul(millis)?;
        total = total.checked_add(Duration::from_millis(part))?;
        rest = tail;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(line: &str) -> Settings {
        match parse_azure_ready(line.split_whitespace().map(str::to_owned)).unwrap() {
            Command::AzureReady(settings) => settings,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_flags_are_upstreams() {
        let default = Settings::default();
        for line in
            ["", "-v", "--v", "extra", "extra -nope", "-endpoint http://168.63.129.16 -timeout=30s -v"]
        {
            assert_eq!(settings(line), default, "{line}");
        }
        let other = settings("--endpoint=http://127.0.0.1:8080 -timeout 1m3s500ms");
        assert_eq!(other.endpoint, "http://127.0.0.1:8080".parse().unwrap());
        assert_eq!(other.timeout, Duration::from_millis(63_500));
    }

    #[test]
    fn wrong_usage_ends_with_2() {
        for (line, expected) in [
            ("-nope", "unknown flag \"-nope\"; see --help"),
            ("-endpoint", "-endpoint: a value is missing; see --help"),
            (
                "-endpoint=http://name",
                "-endpoint=http://name: expected http://ADDRESS or http://ADDRESS:PORT, with an IP address; see --help",
            ),
            ("-timeout=0s", "-timeout=0s: expected a duration from 1ms to 1h, such as 30s; see --help"),
            ("-v=1", "-v=1: takes no value; see --help"),
        ] {
            let error = parse_azure_ready(line.split_whitespace().map(str::to_owned)).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.exit_status), (expected, 2), "{line}");
        }
    }

    #[test]
    fn durations_are_bounded() {
        for text in [
            "",
            "30",
            "s",
            "-3s",
            "1.5s",
            "3 s",
            "61m",
            "99999999999999999999s",
            "18446744073709551615h",
            "3ß",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
    }

    #[test]
    fn help_and_version_are_printed() {
        let parsed = |flag: &str| parse_azure_ready([flag.to_owned()]);
        assert_eq!(parsed("-h"), Ok(Command::Print(HELP.to_owned())));
        assert_eq!(parsed("-version"), Ok(Command::Print(version("azure-ready"))));
    }
}
