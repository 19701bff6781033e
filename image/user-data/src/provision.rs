//! What becomes of user data: which files count, and how they are written.
//!
//! [`plan()`] decides over contents only, [`Directory`] over files only. The order for a caller:
//!
//! 1. [`Directory::open`] takes the lock and finishes or discards what a killed run left;
//! 2. [`Directory::earlier`] says what is there, [`plan()`] what is to be written;
//! 3. [`Directory::stage`] writes all of it out of sight;
//! 4. [`crate::pcr::measure`] extends the TPM: before any file can start the attestation agent;
//! 5. [`Staged::commit`] puts the files in place.
//!
//! [`plan()`] can also judge user data before they are accepted from a cloud: it changes nothing.

mod directory;
mod plan;
#[cfg(test)]
mod samples;

pub use directory::{Directory, Outcome, Staged, WriteError};
pub use plan::{Earlier, FileSet, Note, PlanError, plan};

use std::fmt;
use std::str::FromStr;

/// What the image's measured flags allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `--without-init-data`: what a pod without init-data gets.
    pub without_init_data: WithoutInitData,
    /// `--require-tpm`: a VM without a TPM is refused.
    pub require_tpm: bool,
}

/// `--without-init-data refuse|dummy|user-data`: what a pod without init-data gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithoutInitData {
    /// `refuse`: no files at all; the program fails.
    #[default]
    Refuse,
    /// `dummy`: upstream's default init-data: an empty aa.toml and a digest that is the same for every such pod. aa.toml and
    /// cdh.toml of the user data are not used.
    Dummy,
    /// `user-data`: as `dummy`, but aa.toml and cdh.toml of the user data are used. The cloud writes them and no evidence
    /// covers them: for pods that are not confidential.
    UserData,
}

/// A value of `--without-init-data` that is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownChoice;

impl fmt::Display for UnknownChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected refuse, dummy or user-data")
    }
}

impl std::error::Error for UnknownChoice {}

impl FromStr for WithoutInitData {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "dummy" => Ok(Self::Dummy),
            "user-data" => Ok(Self::UserData),
            _ => Err(UnknownChoice),
        }
    }
}
