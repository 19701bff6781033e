//! Runs the program `nft`. It is what operators look at rules with, and its scripts are transactions; crates that speak
//! netlink themselves are GPL, or bind C libraries.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use secure_comms_keys::text::one_line;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::TABLE;

/// The time that a call may take: the kernel serialises changes, and a node may have many thousand rules.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest message of nft that is quoted.
const MESSAGE_MAX: usize = 300;

/// The rules cannot be read or changed. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program is missing, or cannot be started.
    #[error("nft cannot be run: {0}: install nftables, and see that nft is in PATH")]
    Run(io::Error),
    /// It has not ended in time.
    #[error("nft has not ended within {} s: see whether another program holds the rules", LIMIT.as_secs())]
    Silent,
    /// It may not change the rules.
    #[error("nft may not change the rules: {0}: run as root, or with the capability NET_ADMIN")]
    Denied(String),
    /// It failed.
    #[error("nft failed: {0}: see whether the kernel has nf_tables with nat and reject (inet)")]
    Failed(String),
    /// It printed what is not understood.
    #[error("nft printed what is not understood: {0}: use nftables 0.9.3 or newer, with JSON")]
    Output(String),
    /// The announcements of changes cannot be read.
    #[error("changes of the rules cannot be watched: {0}")]
    Watch(io::Error),
}

/// The listing of our table, as JSON; `None` if there is none.
pub(super) async fn list() -> Result<Option<Vec<u8>>, NftError> {
    match run(&["-j", "list", "table", "inet", TABLE], "").await {
        Ok(json) => Ok(Some(json)),
        Err(NftError::Failed(message)) if message.contains("No such file or directory") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs nft with this input, and returns what it printed.
///
/// Dropping the future kills the program: what it had sent to the kernel takes effect as a whole or not at all.
pub(super) async fn run(args: &[&str], input: &str) -> Result<Vec<u8>, NftError> {
    let mut child = Command::new("nft")
        .args(args)
        // The messages are read.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NftError::Run)?;
    let stdin = child.stdin.take();
    let run = async {
        if let Some(mut stdin) = stdin {
            // A program that ends without reading says why.
            match stdin.write_all(input.as_bytes()).await {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => drop(stdin),
            }
        }
        child.wait_with_output().await
    };
    let output = timeout(LIMIT, run).await.map_err(|_| NftError::Silent)?.map_err(NftError::Run)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(failure(one_line(message.trim(), MESSAGE_MAX)))
}

/// What a message of nft means.
fn failure(message: String) -> NftError {
    let has = |parts: &[&str]| parts.iter().any(|part| message.contains(part));
    if has(&["Operation not permitted"]) {
        NftError::Denied(message)
    } else if has(&["JSON support", "invalid option", "unrecognized option"]) {
        // Built without JSON, or too old for it.
        NftError::Output(message)
    } else {
        NftError::Failed(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_leads_to_the_advice_that_fits() {
        let advice = |message: &str| failure(message.to_owned()).to_string();
        for old in ["Error: JSON support not compiled-in", "nft: invalid option -- 'j'"] {
            assert!(advice(old).ends_with(": use nftables 0.9.3 or newer, with JSON"), "{old}");
        }
        assert!(advice("Error: Could not process rule: Operation not permitted").contains("NET_ADMIN"));
        assert!(advice("Error: Could not process rule: Not supported").contains("nf_tables"));
    }
}
