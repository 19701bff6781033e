//! The service's settings, and who may read the secrets that they name.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::SettingsRead;
use super::report::Finding;

/// Bits with which others could write.
const WRITE_OF_OTHERS: u32 = 0o022;
/// Bits with which others could read or write.
const ALL_OF_OTHERS: u32 = 0o077;

pub(super) fn check(read: &SettingsRead) -> Vec<Finding> {
    let mut findings = vec![file(&read.file, read.is_default)];
    let title = "the settings are valid";
    if read.faults.is_empty() {
        findings.push(Finding::ok("settings-valid", title));
    }
    let fix = "correct it; secure-comms-adaptor config show prints each setting and where it comes from";
    findings.extend(read.faults.iter().map(|fault| Finding::fault("settings-valid", title, fault, fix)));
    let odd =
        |warning: &String| Finding::warning("settings-meant", "the settings are as meant", warning, fix);
    findings.extend(read.warnings.iter().map(odd));
    findings.extend(read.secrets.iter().map(|path| secret(path)));
    findings
}

/// The settings' file: it says where keys go, so only its owner may write it.
fn file(path: &Path, is_default: bool) -> Finding {
    const CHECK: &str = "settings-file";
    let title = format!("the settings' file {} can be read, and written by its owner only", path.display());
    match fs::metadata(path) {
        Ok(about) if about.mode() & WRITE_OF_OTHERS != 0 => {
            let found = format!("others may write it: its mode is {:04o}", about.mode() & 0o7777);
            Finding::fault(CHECK, title, found, format!("chmod go-w {}", path.display()))
        }
        Ok(_) => match fs::File::open(path) {
            Ok(_) => Finding::ok(CHECK, title),
            Err(error) => Finding::not_checked(CHECK, title, format!("{error}: run doctor as root")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound && is_default => Finding::ok(
            CHECK,
            format!("there is no settings' file {}: all settings are defaults or variables", path.display()),
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Finding::not_checked(CHECK, title, format!("{error}: run doctor as root"))
        }
        Err(error) => Finding::fault(CHECK, title, error.to_string(), "give its place with --config"),
    }
}

/// A file with a secret: only its owner may read it.
fn secret(path: &Path) -> Finding {
    const CHECK: &str = "settings-secret";
    let title = format!("only its owner can read {}", path.display());
    match fs::metadata(path) {
        Ok(about) if about.mode() & ALL_OF_OTHERS != 0 => {
            let found =
                format!("others have access to the secret: its mode is {:04o}", about.mode() & 0o7777);
            Finding::fault(
                CHECK,
                title,
                found,
                format!("chmod 0600 {}; then make a new secret", path.display()),
            )
        }
        Ok(_) => Finding::ok(CHECK, title),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Finding::not_checked(CHECK, title, format!("{error}: run doctor as root"))
        }
        Err(error) => Finding::fault(CHECK, title, error.to_string(), "check its path in the settings"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;
    use crate::doctor::Outcome;

    fn file_of(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, "SECRET").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn what_others_may_do_with_the_files_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, file_is_good, secret_is_good) in
            [(0o600, true, true), (0o644, true, false), (0o660, false, false), (0o640, true, false)]
        {
            let path = file_of(dir.path(), "file", mode);
            assert_eq!(file(&path, false).outcome == Outcome::Ok, file_is_good, "{mode:o}");
            assert_eq!(secret(&path).outcome == Outcome::Ok, secret_is_good, "{mode:o}");
        }
    }

    #[test]
    fn a_missing_file_is_a_fault_only_if_it_was_named() {
        let missing = Path::new("/nonexistent/adaptor.toml");
        assert_eq!(file(missing, true).outcome, Outcome::Ok);
        assert!(matches!(file(missing, false).outcome, Outcome::Fault { .. }));
        assert!(matches!(secret(missing).outcome, Outcome::Fault { .. }));
    }

    #[test]
    fn each_fault_of_the_settings_is_a_finding() {
        let dir = tempfile::tempdir().unwrap();
        let read = SettingsRead {
            file: file_of(dir.path(), "file", 0o600),
            is_default: false,
            faults: vec!["unknown key 'stroe'".to_owned(), "port: 0".to_owned()],
            warnings: vec!["--kbs-ca is not used".to_owned()],
            secrets: Vec::new(),
        };
        let findings = check(&read);
        let count = |wanted: fn(&Outcome) -> bool| findings.iter().filter(|f| wanted(&f.outcome)).count();
        assert_eq!(count(|outcome| matches!(outcome, Outcome::Fault { .. })), 2);
        assert_eq!(count(|outcome| matches!(outcome, Outcome::Warning { .. })), 1);
    }
}
