//! PCR 8 of a real TPM 2.0 implementation: swtpm, over the socket on which it takes commands as `/dev/tpmrm0` does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use user_data::pcr::{Measured, PcrError, Tpm, extend};

const DIGEST: &str = "692f2059ebbdf6189c795392d263f2bd0b4020d43e5044b22965424e1670759a";

/// As the firmware leaves it to the operating system.
const STARTED: &str = "not-need-init,startup-clear";

/// A TPM, stopped when it is dropped.
struct Swtpm {
    process: Child,
    commands: UnixStream,
    state: TempDir,
}

impl Swtpm {
    /// Starts one as the firmware leaves it to the operating system, unless `flags` say otherwise.
    fn start(flags: &str) -> Self {
        Self::with_state(tempfile::tempdir().unwrap(), flags)
    }

    /// Switches it off and on.
    fn restart(mut self) -> Self {
        let state = std::mem::replace(&mut self.state, tempfile::tempdir().unwrap());
        drop(self);
        Self::with_state(state, STARTED)
    }

    fn with_state(state: TempDir, flags: &str) -> Self {
        // Not the state's directory: a TPM that is switched on again finds its old socket there.
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        // It takes the listener as its standard input, so there is no address to wait for.
        let theirs = UnixListener::bind(&path).unwrap();
        let ours = UnixStream::connect(&path).unwrap();
        // A swtpm that does not answer must not hold up the tests.
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let process = Command::new("swtpm")
            .args(["socket", "--tpm2", "--server", "type=unixio,fd=0", "--flags", flags])
            .arg("--tpmstate")
            .arg(format!("dir={}", state.path().display()))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("swtpm is not here: run tests/install-deps");
        Self { process, commands: ours, state }
    }

    fn started() -> Self {
        Self::start(STARTED)
    }

    /// Reads a PCR of a bank by a command written here, not by the code under test.
    fn pcr(&mut self, bank: u16, pcr: u8) -> Vec<u8> {
        let mut command = vec![0x80, 0x01, 0, 0, 0, 20, 0, 0, 0x01, 0x7e, 0, 0, 0, 1];
        command.extend(bank.to_be_bytes());
        let mut select = [0; 3];
        select[usize::from(pcr / 8)] = 1 << (pcr % 8);
        command.push(3);
        command.extend(select);
        let answer = self.transact(&command).unwrap();
        assert_eq!(answer[6..10], [0; 4], "{answer:?}");
        // Head 10, counter 4, selection 10, number of values 4, size 2.
        answer[30..].to_vec()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Tpm for Swtpm {
    fn transact(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.commands.write_all(command)?;
        let mut answer = vec![0; 10];
        self.commands.read_exact(&mut answer)?;
        let size = u32::from_be_bytes(answer[2..6].try_into().unwrap());
        answer.resize(size.try_into().unwrap(), 0);
        self.commands.read_exact(&mut answer[10..])?;
        Ok(answer)
    }
}

const SHA1: u16 = 0x0004;
const SHA256: u16 = 0x000b;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn pcr_8_holds_the_digest_and_no_other_pcr_does() {
    let mut tpm = Swtpm::started();
    assert_eq!(tpm.pcr(SHA256, 8), [0; 32]);
    assert_eq!(extend(&mut tpm, DIGEST).unwrap(), Measured::Extended);
    // What the attestation service computes.
    let expected = Sha256::digest([vec![0; 32], bytes(DIGEST)].concat()).to_vec();
    assert_eq!(tpm.pcr(SHA256, 8), expected);
    for other in (0..17).filter(|pcr| *pcr != 8) {
        assert_eq!(tpm.pcr(SHA256, other), [0; 32], "{other}");
    }
}

#[test]
fn a_second_run_in_one_boot_changes_nothing() {
    let mut tpm = Swtpm::started();
    assert_eq!(extend(&mut tpm, DIGEST).unwrap(), Measured::Extended);
    let value = tpm.pcr(SHA256, 8);
    for _ in 0..3 {
        assert_eq!(extend(&mut tpm, DIGEST).unwrap(), Measured::Already);
    }
    let other = DIGEST.replace('6', "7");
    assert!(matches!(extend(&mut tpm, &other), Err(PcrError::Taken)));
    assert_eq!(tpm.pcr(SHA256, 8), value);
}

#[test]
fn of_a_longer_digest_the_first_32_bytes_count() {
    let (mut short, mut long) = (Swtpm::started(), Swtpm::started());
    assert_eq!(extend(&mut short, DIGEST).unwrap(), Measured::Extended);
    assert_eq!(extend(&mut long, &format!("{DIGEST}{}", "0".repeat(64))).unwrap(), Measured::Extended);
    assert_eq!(short.pcr(SHA256, 8), long.pcr(SHA256, 8));
}

#[test]
fn a_tpm_that_was_not_started_is_named() {
    let mut tpm = Swtpm::start("not-need-init");
    let error = extend(&mut tpm, DIGEST).unwrap_err();
    assert_eq!(
        error.to_string(),
        "TPM: TPM2_PCR_Read: refused with response code 0x100 (not started: the firmware did not send TPM2_Startup)"
    );
}

#[test]
fn a_tpm_without_a_sha_256_bank_is_named() {
    let mut tpm = Swtpm::started();
    // TPM2_PCR_Allocate by the platform: only SHA-1. It counts from the next start on.
    let mut allocate = vec![
        0x80, 0x02, 0, 0, 0, 0, 0, 0, 0x01, 0x2b, 0x40, 0, 0, 0x0c, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
    ];
    let banks = [(SHA1, [0xff; 3]), (SHA256, [0; 3]), (0x000c, [0; 3]), (0x000d, [0; 3])];
    allocate.extend(u32::try_from(banks.len()).unwrap().to_be_bytes());
    for (bank, select) in banks {
        allocate.extend(bank.to_be_bytes());
        allocate.push(3);
        allocate.extend(select);
    }
    let size = u32::try_from(allocate.len()).unwrap();
    allocate[2..6].copy_from_slice(&size.to_be_bytes());
    let answer = tpm.transact(&allocate).unwrap();
    assert_eq!(answer[6..10], [0; 4], "{answer:?}");
    // TPM2_Shutdown.
    tpm.transact(&[0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x45, 0, 0]).unwrap();
    let mut tpm = tpm.restart();
    assert!(matches!(extend(&mut tpm, DIGEST), Err(PcrError::NoSha256Bank)));
    assert_eq!(tpm.pcr(SHA1, 8), [0; 20]);
}
