//! What the test VMs are made of, from `tests/build-test-vm`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Names another directory that has it.
const TEST_VM_DIR: &str = "SECURE_COMMS_TEST_VM_DIR";

/// The files of `out/test-vm`.
#[derive(Clone, Debug)]
pub struct Artifacts {
    directory: PathBuf,
}

/// Where they are; that each is there is checked when it is used.
///
/// # Errors
/// The source tree is not where it was built.
pub fn artifacts() -> Result<Artifacts> {
    if let Some(directory) = std::env::var_os(TEST_VM_DIR) {
        return Ok(Artifacts { directory: directory.into() });
    }
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("finding the source tree")?;
    Ok(Artifacts { directory: top.join("out/test-vm") })
}

impl Artifacts {
    /// A file that must be there.
    ///
    /// # Errors
    /// It is not; says what makes it.
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
    /// It is not there.
    pub fn root_hash(&self) -> Result<String> {
        self.line("podvm.roothash")
    }

    /// The kernel's command line as it is in the UKI, but for the root hash: this one, or none.
    pub(super) fn command_line(&self, root_hash: Option<&str>) -> Result<String> {
        let line = self.line("podvm.cmdline")?;
        let words = line.split_whitespace().filter(|word| !word.starts_with("roothash="));
        let root_hash = root_hash.map(|hash| format!("roothash={hash}"));
        Ok(words.map(ToOwned::to_owned).chain(root_hash).collect::<Vec<_>>().join(" "))
    }

    fn line(&self, name: &str) -> Result<String> {
        let path = self.file(name)?;
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }
}
