//! The command line and the environment.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;

use crate::mounting::Settings;

/// Environment variable with the number of attempts to find a disk, as in cloud-api-adaptor.
const ATTEMPTS: &str = "CAA_DISK_DETECT_MAX_ATTEMPTS";
/// Environment variable with the pause between them, as in cloud-api-adaptor.
const DELAY: &str = "CAA_DISK_DETECT_RETRY_DELAY";
/// Most attempts, and longest pause in seconds: longer than any client waits.
const MAX: u32 = 600;

/// Mounts the disks that a pod VM's cloud attaches: volumes of containers, and
/// the scratch disk.
#[derive(Clone, Debug, PartialEq, Eq, FromArgs)]
pub struct Options {
    /// what to do
    #[argh(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, FromArgs)]
#[argh(subcommand)]
pub enum Command {
    /// The service.
    Serve(Serve),
    /// The scratch disk.
    Scratch(Scratch),
}

/// Serve requests for cloud volumes on a unix socket. CAA_DISK_DETECT_MAX_ATTEMPTS
/// (default 15) and CAA_DISK_DETECT_RETRY_DELAY (default 2s) in the environment
/// set how long a disk is waited for.
#[derive(Clone, Debug, PartialEq, Eq, FromArgs)]
#[argh(subcommand, name = "serve")]
pub struct Serve {
    /// path of the socket, made here unless systemd passes it on
    #[argh(option, arg_name = "path", default = "PathBuf::from(\"/run/podvm-volumes/volumes.sock\")")]
    pub socket: PathBuf,
    /// refuse volumes without encryption
    #[argh(switch)]
    pub require_encryption: bool,
}

/// Encrypt the scratch disk with a new key and mount it at
/// /run/kata-containers/image, if /run/peerpod/scratch-space.marker exists.
#[derive(Clone, Debug, PartialEq, Eq, FromArgs)]
#[argh(subcommand, name = "scratch")]
pub struct Scratch {
    /// wait up to 30 s for a partition or a disk that is labelled trusted_store,
    /// and never take the free space behind the image
    #[argh(switch)]
    pub labelled_only: bool,
}

/// A variable of the environment is wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("environment: {name}: expected {expected}")]
pub struct BadEnvironment {
    name: &'static str,
    expected: &'static str,
}

impl Serve {
    /// The settings, with those of the environment.
    ///
    /// # Errors
    /// A variable of the environment is wrong.
    pub fn settings(&self) -> Result<Settings, BadEnvironment> {
        let mut settings = Settings { require_encryption: self.require_encryption, ..Settings::default() };
        let of = |name| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        if let Some(attempts) = of(ATTEMPTS) {
            let expected = "a number from 1 to 600";
            settings.attempts =
                parse_attempts(&attempts).ok_or(BadEnvironment { name: ATTEMPTS, expected })?;
        }
        if let Some(delay) = of(DELAY) {
            let expected = "a duration up to 600s, such as 2s or 500ms";
            settings.delay = parse_delay(&delay).ok_or(BadEnvironment { name: DELAY, expected })?;
        }
        Ok(settings)
    }
}

fn parse_attempts(text: &str) -> Option<u32> {
    text.parse().ok().filter(|attempts| (1..=MAX).contains(attempts))
}

/// A number of seconds, or with a unit of Go's durations.
fn parse_delay(text: &str) -> Option<Duration> {
    let delay = if let Some(number) = text.strip_suffix("ms") {
        Duration::from_millis(number.parse().ok()?)
    } else {
        Duration::from_secs(text.strip_suffix('s').unwrap_or(text).parse().ok()?)
    };
    (delay <= Duration::from_secs(MAX.into())).then_some(delay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_of_go_or_none() {
        assert_eq!(parse_delay("2"), Some(Duration::from_secs(2)));
        assert_eq!(parse_delay("2s"), Some(Duration::from_secs(2)));
        assert_eq!(parse_delay("500ms"), Some(Duration::from_millis(500)));
        for bad in ["", "-1", "s", "2m", "601", "99999999999999999999"] {
            assert_eq!(parse_delay(bad), None, "{bad}");
        }
        assert_eq!((parse_attempts("1"), parse_attempts("0"), parse_attempts("601")), (Some(1), None, None));
    }

    #[test]
    fn flags_are_as_documented() {
        let options =
            Options::from_args(&["podvm-volumes"], &["serve", "--socket", "/s", "--require-encryption"]);
        let Command::Serve(serve) = options.unwrap().command else { panic!("not serve") };
        assert_eq!(serve, Serve { socket: "/s".into(), require_encryption: true });
        for (args, labelled_only) in [(&["scratch"][..], false), (&["scratch", "--labelled-only"], true)] {
            let options = Options::from_args(&["podvm-volumes"], args);
            assert_eq!(options.unwrap().command, Command::Scratch(Scratch { labelled_only }));
        }
        assert!(Options::from_args(&["podvm-volumes"], &[]).is_err());
    }
}
