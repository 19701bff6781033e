//! Measures init-data into the TPM: extends PCR 8 of the SHA-256 bank by the first 32 bytes of their digest, once per boot.
//!
//! The same as upstream's `tpm2_pcrextend 8:sha256=<first 64 hex digits of initdata.digest>`, without its tools. An attestation
//! service then compares PCR 8 with the digest that it computes itself. So no file that starts the attestation agent may appear
//! before this has succeeded, and a PCR can't be changed back: other init-data need a restart of the VM.

mod command;
mod device;

pub use device::{Device, System, Tpm};

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use command::Digest;

/// How often a command is sent that the TPM is not ready for, and the pause in between.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(100);

/// How the init-data were measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// PCR 8 was extended.
    Extended,
    /// An earlier run of this boot has extended it by the same digest.
    Already,
    /// This VM has no TPM. Its evidence binds init-data otherwise, or not at all.
    NoTpm,
}

/// Why the init-data are not measured. Attestation must not start.
#[derive(Debug, thiserror::Error)]
pub enum PcrError {
    /// `--require-tpm`, but there is none.
    #[error("TPM: this VM has none, and --require-tpm wants one; give the VM a virtual TPM")]
    Required,
    /// The firmware or the kernel know of a TPM that can't be used.
    #[error(
        "TPM: there is one, but no {} for 10 s; load its driver (tpm_crb, tpm_tis), or give the VM a TPM 2.0",
        .0.display()
    )]
    NoDevice(PathBuf),
    /// What is there can't be looked at.
    #[error("TPM: looking at {}", path.display())]
    Look {
        /// A directory of the kernel.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The device can't be opened.
    #[error("TPM: opening {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A command or its answer was lost.
    #[error("TPM: {command}")]
    Transport {
        /// Its name in the specification.
        command: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// An answer by which nothing can be said.
    #[error("TPM: {command}: the answer is malformed: {fault}")]
    Response {
        /// Its name in the specification.
        command: &'static str,
        /// What is wrong.
        fault: &'static str,
    },
    /// The TPM says no.
    #[error("TPM: {command}: refused with response code {code:#05x}{}", meaning(*code))]
    Refused {
        /// Its name in the specification.
        command: &'static str,
        /// The specification, part 2, 6.6.
        code: u32,
    },
    /// No SHA-256 bank.
    #[error("TPM: no SHA-256 bank; allocate it (tpm2_pcrallocate sha256:all, then restart)")]
    NoSha256Bank,
    /// PCR 8 has a value of something else.
    #[error(
        "TPM: PCR 8 holds something else already: other init-data of this boot, or what a boot loader measured; restart the VM, \
         and boot it without GRUB"
    )]
    Taken,
    /// The TPM said yes but PCR 8 is not what it should be.
    #[error("TPM: PCR 8 is not what extending it must give; do not trust this TPM")]
    NotExtended,
    /// No digest to extend by.
    #[error("TPM: the digest of the init-data does not begin with 64 hex digits")]
    Digest,
}

/// The codes that an operator may see.
fn meaning(code: u32) -> &'static str {
    match code {
        0x100 => " (not started: the firmware did not send TPM2_Startup)",
        0x101 => " (failure mode: restart the VM)",
        0x120 => " (disabled: enable the TPM in the firmware)",
        0x907 => " (locality: PCR 8 can't be extended from the operating system)",
        0x908 | 0x90a | 0x920 | 0x922 => " (busy for more than 3 s)",
        0x921 => " (locked out)",
        _ => "",
    }
}

/// Measures the init-data with this digest (lower-case hex) into the system's TPM. With no TPM at all that is an error only if
/// `require_tpm`: SEV-SNP and TDX can bind init-data by the launch. Waits 10 s at most for a TPM that is required, or that the
/// firmware announces.
///
/// # Errors
/// A TPM that is there but refuses, is not usable, or has another value in PCR 8 is always an error.
pub fn measure(system: &System, digest: &str, require_tpm: bool) -> Result<Measured, PcrError> {
    match system.open(require_tpm)? {
        Some(mut tpm) => extend(&mut tpm, digest),
        None => Ok(Measured::NoTpm),
    }
}

/// Extends PCR 8, unless it has been extended by the same digest. Safe to repeat, also after a fault in its middle.
///
/// # Errors
/// See [`PcrError`].
pub fn extend(tpm: &mut impl Tpm, digest: &str) -> Result<Measured, PcrError> {
    let digest = first_32_bytes(digest).ok_or(PcrError::Digest)?;
    let expected: Digest = Sha256::new().chain_update([0; 32]).chain_update(digest).finalize().into();
    let now = read(tpm)?;
    if now == expected {
        return Ok(Measured::Already);
    }
    if now != [0; 32] {
        return Err(PcrError::Taken);
    }
    send(tpm, "TPM2_PCR_Extend", &command::extend(&digest), command::extended)?;
    if read(tpm)? == expected { Ok(Measured::Extended) } else { Err(PcrError::NotExtended) }
}

fn read(tpm: &mut impl Tpm) -> Result<Digest, PcrError> {
    send(tpm, "TPM2_PCR_Read", &command::read(), command::value)
}

/// Sends a command until the TPM is ready for it: a TPM that is not ready has not run it.
fn send<T>(
    tpm: &mut impl Tpm,
    command: &'static str,
    bytes: &[u8],
    answer: fn(&[u8]) -> Result<T, PcrError>,
) -> Result<T, PcrError> {
    let mut tries = 1;
    loop {
        let response = tpm.transact(bytes).map_err(|cause| PcrError::Transport { command, cause })?;
        match answer(&response) {
            // Yielded, testing, NV rate, retry.
            Err(PcrError::Refused { code: 0x908 | 0x90a | 0x920 | 0x922, .. }) if tries < TRIES => {
                tries += 1;
                tpm.pause(PAUSE);
            }
            result => return result,
        }
    }
}

fn first_32_bytes(hex: &str) -> Option<Digest> {
    let (pairs, _) = hex.as_bytes().get(..64)?.as_chunks::<2>();
    let mut digest = [0; 32];
    for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
        let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        *byte = nibble(*high)? << 4 | nibble(*low)?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests;
