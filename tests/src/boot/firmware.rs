//! OVMF, as Debian packages it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Platform;

const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
const SECURE_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd";
/// Variables of OVMF with [`test_certificate`] in its db: those of [`Platform::SecureBoot`].
pub const SECURE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd";
const SECURE_KEY: &str = "/usr/share/ovmf/PkKek-1-snakeoil.key";
const SECURE_CERTIFICATE: &str = "/usr/share/ovmf/PkKek-1-snakeoil.pem";
/// The passphrase is in Debian's README: the key is public, and for tests.
const SECURE_PASSPHRASE: &str = "pass:snakeoil";

/// A certificate and its key, PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key, without a passphrase.
    pub key: PathBuf,
}

/// Certificate that the firmware of [`Platform::SecureBoot`] trusts; its key is written to `directory`.
///
/// # Errors
/// If OVMF or openssl is not installed.
pub fn test_certificate(directory: &Path) -> Result<Certificate> {
    let key = directory.join("test.key");
    let mut command = std::process::Command::new("openssl");
    command.args(["pkey", "-passin", SECURE_PASSPHRASE, "-in", SECURE_KEY, "-out"]).arg(&key);
    let output = command.output().context("running openssl: is it installed?")?;
    ensure!(
        output.status.success(),
        "reading {SECURE_KEY}: {}; is ovmf installed?",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Certificate { certificate: SECURE_CERTIFICATE.into(), key })
}

/// qemu's arguments for the firmware; its variables are written to `directory`.
pub(super) fn arguments(platform: Platform, directory: &Path) -> Result<Vec<String>> {
    let (code, template) = match platform {
        Platform::Plain | Platform::Tpm => (CODE, VARIABLES),
        Platform::SecureBoot => (SECURE_CODE, SECURE_VARIABLES),
    };
    let variables = directory.join("vars.fd");
    std::fs::copy(template, &variables).with_context(|| format!("copying {template}: is ovmf installed?"))?;
    let pflash = |options: &str| ["-drive".to_owned(), format!("if=pflash,format=raw,{options}")];
    let mut arguments = Vec::from(pflash(&format!("readonly=on,file={code}")));
    arguments.extend(pflash(&format!("file={}", variables.display())));
    if platform == Platform::SecureBoot {
        let secure = "driver=cfi.pflash01,property=secure,value=on";
        arguments.extend(["-global".to_owned(), secure.to_owned()]);
    }
    Ok(arguments)
}
