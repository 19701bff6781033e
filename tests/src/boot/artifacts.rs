//! The files that test VMs boot, built by `tests/build-test-vm`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Names another directory with the artifacts.
const TEST_VM_DIR: &str = "SECURE_COMMS_TEST_VM_DIR";

/// The files of `out/test-vm`.
#[derive(Clone, Debug)]
pub struct Artifacts {
    directory: PathBuf,
}

/// Finds the directory; each file is checked when it is used.
///
/// # Errors
/// If the source tree has been moved since the build.
pub fn artifacts() -> Result<Artifacts> {
    if let Some(directory) = std::env::var_os(TEST_VM_DIR) {
        return Ok(Artifacts { directory: directory.into() });
    }
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("finding the source tree")?;
    Ok(Artifacts { directory: top.join("out/test-vm") })
}

impl Artifacts {
    /// A file that must exist.
    ///
    /// # Errors
    /// If it does not; the error says what builds it.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        if !path.is_file() {
            bail!(
                "{} is not there: tests/build-test-vm makes it (as root), or {TEST_VM_DIR} names where it is",
                path.display()
            );
        }
        Ok(path)
    }

    /// The root hash of the disk.
    ///
    /// # Errors
    /// If it is not there.
    pub fn root_hash(&self) -> Result<String> {
        self.line("podvm.roothash")
    }

    /// The kernel's command line in the UKI, with another root hash, or none, and without one of its words.
    pub(super) fn command_line(&self, root_hash: Option<&str>, without: Option<&str>) -> Result<String> {
        let line = self.line("podvm.cmdline")?;
        if let Some(word) = without.filter(|word| !line.split_whitespace().any(|other| other == *word)) {
            bail!("the command line has no {word}: {line}");
        }
        let words = line
            .split_whitespace()
            .filter(|word| !word.starts_with("roothash=") && without.is_none_or(|without| *word != without));
        let root_hash = root_hash.map(|hash| format!("roothash={hash}"));
        Ok(words.map(ToOwned::to_owned).chain(root_hash).collect::<Vec<_>>().join(" "))
    }

    fn line(&self, name: &str) -> Result<String> {
        let path = self.file(name)?;
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }
}
