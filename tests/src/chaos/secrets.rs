//! Looks for secrets where others could read them: logs, command lines, environments, cores, files that are not private.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use base64ct::{Base64, Encoding};

/// Length of an Ed25519 private key in bytes.
const SEED: usize = 32;
/// Least length of a part of a token in bytes: a shorter part may be a word.
const TOKEN_PART: usize = 10;

/// The secrets, in every form in which they might appear.
#[derive(Debug, Default)]
pub(super) struct Secrets {
    needles: Vec<(String, Vec<u8>)>,
}

impl Secrets {
    /// Adds the private key in this PEM text, OpenSSH's or PKCS#8.
    ///
    /// # Errors
    /// If the text has no private key.
    pub(super) fn add_key(&mut self, name: &str, pem: &str) -> Result<()> {
        let lines: Vec<_> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = Base64::decode_vec(&lines.concat()).map_err(|_| anyhow::anyhow!("{name}: not base64"))?;
        // OpenSSH: private and public key as one string of 64 bytes. PKCS#8 (RFC 8410 7): an octet string of 32 in one of 34.
        let (mark, what): (&[u8], _) = if pem.contains("OPENSSH") {
            (&[0, 0, 0, 64], "OpenSSH key")
        } else {
            (&[0x04, 0x22, 0x04, 0x20], "PKCS#8 key")
        };
        let at = der.windows(mark.len()).position(|window| window == mark);
        let seed = at.and_then(|at| der.get(at + mark.len()..)?.get(..SEED));
        let seed = seed.with_context(|| format!("{name}: no Ed25519 {what}"))?;
        self.add(name, "raw", seed.to_vec());
        let hex = seed.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        self.add(name, "in upper case hex", hex.to_uppercase().into());
        self.add(name, "in hex", hex.into());
        for ahead in 0..3 {
            // The offset in the encoded data shifts the base64 letters; the first and last ones depend on neighbouring bytes.
            let shifted = [vec![0; ahead], seed.to_vec()].concat();
            let text = Base64::encode_string(&shifted);
            let inner: String = text.chars().skip(4).take(36).collect();
            self.add(name, "in base64url", inner.replace('+', "-").replace('/', "_").into());
            self.add(name, "in base64", inner.into());
        }
        // The lines of the PEM text, which may split the key; the first half of an OpenSSH key is public.
        for line in lines.iter().skip(lines.len() / 2) {
            self.add(name, "as a line of PEM", (*line).as_bytes().to_vec());
        }
        Ok(())
    }

    fn add(&mut self, name: &str, form: &str, needle: Vec<u8>) {
        if needle.len() > TOKEN_PART {
            self.needles.push((format!("{name}, {form}"), needle));
        }
    }

    /// The secrets in `text`.
    #[must_use]
    pub(super) fn in_text(&self, text: &[u8]) -> Vec<String> {
        let found = self.needles.iter().filter(|(_, needle)| contains(text, needle));
        let mut found: Vec<_> = found.map(|(name, _)| name.clone()).collect();
        if has_token(text) {
            found.push("a token (JWT)".to_owned());
        }
        found
    }

    /// What a running process exposes: secrets in its command line or environment.
    #[must_use]
    pub(super) fn in_process(&self, pid: i32) -> Vec<String> {
        let mut found = Vec::new();
        for file in ["cmdline", "environ"] {
            // The process may have ended.
            let Ok(text) = std::fs::read(format!("/proc/{pid}/{file}")) else { continue };
            found.extend(self.in_text(&text).into_iter().map(|secret| format!("{secret} in its {file}")));
        }
        found
    }

    /// Files below `directory` with a secret that are not private, or not where secrets belong.
    ///
    /// # Errors
    /// If they can't be read.
    pub(super) fn in_files(&self, directory: &Path, allowed: &[&Path]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            let metadata = path.symlink_metadata()?;
            if metadata.is_dir() {
                found.extend(self.in_files(&path, allowed)?);
            } else if metadata.is_file() {
                let private = metadata.mode() & 0o077 == 0 && allowed.iter().any(|at| path.starts_with(at));
                let secrets = if private { Vec::new() } else { self.in_text(&std::fs::read(&path)?) };
                let mode = metadata.mode() & 0o7777;
                let exposed = |secret| format!("{secret} in {}, mode {mode:04o}", path.display());
                found.extend(secrets.into_iter().map(exposed));
            }
        }
        Ok(found)
    }

    /// Checks that at least one secret was added.
    ///
    /// # Errors
    /// If none was.
    pub(super) fn check_any(&self) -> Result<()> {
        if self.needles.is_empty() {
            bail!("there is no secret to look for");
        }
        Ok(())
    }
}

fn contains(text: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return false };
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        rest = rest.get(at..).unwrap_or_default();
        if rest.starts_with(needle) {
            return true;
        }
        rest = rest.get(1..).unwrap_or_default();
    }
    false
}

/// Whether the text has what looks like a JWT: three parts of base64url, the first of which begins a JSON object.
fn has_token(text: &[u8]) -> bool {
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.split(|byte| !word(byte)).any(|word| {
        let parts: Vec<_> = word.split(|byte| *byte == b'.').collect();
        parts.windows(3).any(|parts| {
            parts.iter().all(|part| part.len() >= TOKEN_PART)
                && parts.first().is_some_and(|part| part.starts_with(b"eyJ"))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::simulators::kbs::{Kbs, KbsOptions};
    use crate::simulators::openssh::OpenSsh;

    #[tokio::test]
    async fn a_key_is_found_in_every_form() {
        let directory = tempfile::tempdir().unwrap();
        let (file, public) = OpenSsh::keygen(directory.path(), "key").await.unwrap();
        let pem = std::fs::read_to_string(&file).unwrap();
        let mut secrets = Secrets::default();
        assert!(secrets.check_any().is_err());
        secrets.add_key("the key", &pem).unwrap();
        let (_, seed) = secrets.needles[0].clone();
        assert_eq!(seed.len(), SEED);
        let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        for ahead in 0..3 {
            let shifted = [&b"abc"[..ahead], &seed, b"after"].concat();
            let text = format!("log: {} and on", Base64::encode_string(&shifted));
            assert!(!secrets.in_text(text.as_bytes()).is_empty(), "{ahead}");
        }
        let last_line = pem.lines().rev().nth(1).unwrap();
        for leak in [&pem, &hex, &hex.to_uppercase(), last_line] {
            assert!(!secrets.in_text(format!("log: {leak} and on").as_bytes()).is_empty(), "{leak}");
        }
        assert!(!secrets.in_text(&[b"core", &seed[..], b"dump"].concat()).is_empty());
        assert!(secrets.in_text(public.as_bytes()).is_empty());
        assert!(secrets.in_text(b"a line without a secret: eyJ").is_empty());

        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&file, private).unwrap();
        assert!(secrets.in_files(directory.path(), &[&file]).unwrap().is_empty());
        assert!(!secrets.in_files(directory.path(), &[]).unwrap().is_empty());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(!secrets.in_files(directory.path(), &[&file]).unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_admins_key_and_token_are_found() {
        let kbs = Kbs::start(KbsOptions::default()).await.unwrap();
        let mut secrets = Secrets::default();
        secrets.add_key("the admin's key", kbs.admin_key_pem()).unwrap();
        assert!(!secrets.in_text(kbs.admin_key_pem().as_bytes()).is_empty());
        let line = format!("authorization: Bearer {}, sent", kbs.admin_token().unwrap());
        assert_eq!(secrets.in_text(line.as_bytes()), ["a token (JWT)"]);
    }

    #[tokio::test]
    async fn a_secret_on_a_command_line_or_in_an_environment_is_found() {
        let kbs = Kbs::start(KbsOptions::default()).await.unwrap();
        let mut secrets = Secrets::default();
        secrets.add_key("the admin's key", kbs.admin_key_pem()).unwrap();
        let mut command = std::process::Command::new("sleep");
        command.arg("1000").env("KEY", kbs.admin_key_pem());
        let mut sleep = command.spawn().unwrap();
        let pid = i32::try_from(sleep.id()).unwrap();
        // A process exists a moment before its environment does.
        let looks = (0..1000).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            secrets.in_process(pid)
        });
        let found = looks.into_iter().find(|found| !found.is_empty()).unwrap_or_default();
        sleep.kill().unwrap();
        sleep.wait().unwrap();
        assert!(found.iter().any(|secret| secret.ends_with("in its environ")), "{found:?}");
    }
}
