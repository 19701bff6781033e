//! The key store.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statvfs::{FsFlags, Statvfs, statvfs};
use nix::unistd::geteuid;

use super::report::Finding;

/// Free space below which keys may soon not be saved, in bytes.
const SPACE_LOW: u64 = 16 << 20;
/// Free space below which they cannot be relied on to be saved, in bytes.
const SPACE_NONE: u64 = 256 << 10;
/// Bits that others have: none may be set.
const OTHERS: u32 = 0o077;
/// Those that let others write.
const OTHERS_WRITE: u32 = 0o022;

/// Looks at the store's directory.
pub(super) fn check(store: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    match private(store) {
        Ok(finding) => findings.push(finding),
        Err(finding) => return vec![finding],
    }
    match statvfs(store) {
        Ok(disk) => findings.extend([read_only(store, &disk), space(store, &disk)]),
        Err(errno) => findings.push(Finding::not_checked("store-space", "its disk has room", errno.desc())),
    }
    findings.push(writable(store));
    findings
}

/// The directory is there, ours, and closed to others. An error: no other check makes sense.
fn private(store: &Path) -> Result<Finding, Finding> {
    const CHECK: &str = "store-private";
    let path = store.display();
    let title = format!("{path} is private");
    let there = match fs::metadata(store) {
        Ok(there) => there,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Finding::warning(
                CHECK,
                title,
                "it does not exist",
                "start the service, which makes it, or give its place with --config",
            ));
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(Finding::not_checked(CHECK, title, format!("{error}: run doctor as root")));
        }
        Err(error) => {
            return Err(Finding::fault(
                CHECK,
                title,
                error.to_string(),
                format!("check {path} with stat(1)"),
            ));
        }
    };
    if !there.is_dir() {
        let found = "it is not a directory";
        return Err(Finding::fault(CHECK, title, found, format!("move {path} away, or give another store")));
    }
    let (owner, us) = (there.uid(), geteuid().as_raw());
    if owner != us {
        if us == 0 {
            let found = format!("it belongs to user {owner}, not to root");
            return Err(Finding::fault(CHECK, title, found, format!("chown root: {path}")));
        }
        let reason = format!("it belongs to user {owner}: run doctor as that user");
        return Err(Finding::not_checked(CHECK, title, reason));
    }
    let (mode, fix) = (there.mode() & 0o7777, format!("chmod 0700 {path}"));
    if mode & OTHERS_WRITE != 0 {
        let found = format!("others may write there, so the service does not start: its mode is {mode:04o}");
        return Ok(Finding::fault(CHECK, title, found, fix));
    }
    if mode & OTHERS != 0 {
        // As kubelet makes a hostPath. The directories and files in it are closed to others.
        let found = format!("others may look into it, though not at a key: its mode is {mode:04o}");
        return Ok(Finding::warning(CHECK, title, found, fix));
    }
    Ok(Finding::ok(CHECK, title))
}

fn read_only(store: &Path, disk: &Statvfs) -> Finding {
    const CHECK: &str = "store-mounted";
    let title = "its file system is mounted read-write";
    if disk.flags().contains(FsFlags::ST_RDONLY) {
        let fix = format!("mount the file system of {} read-write, or give another store", store.display());
        return Finding::fault(CHECK, title, "it is read-only: no pod can be prepared or stopped", fix);
    }
    Finding::ok(CHECK, title)
}

fn space(store: &Path, disk: &Statvfs) -> Finding {
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    // Some file systems, btrfs among them, count no inodes.
    let inodes = (disk.files() > 0).then(|| disk.files_available());
    room(store, free, inodes)
}

fn room(store: &Path, free: u64, inodes: Option<u64>) -> Finding {
    const CHECK: &str = "store-space";
    let fix = format!("make room on the disk of {}: df {0}", store.display());
    if inodes == Some(0) {
        return Finding::fault(CHECK, "its disk has room", "no inode is free: no key can be saved", fix);
    }
    let title = format!("its disk has room: {} MiB are free", free >> 20);
    if free < SPACE_NONE {
        return Finding::fault(CHECK, title, "no key can be saved", fix);
    }
    if free < SPACE_LOW {
        return Finding::warning(CHECK, title, "soon no key can be saved", fix);
    }
    Finding::ok(CHECK, title)
}

/// Makes a file in the store, and deletes it.
fn writable(store: &Path) -> Finding {
    const CHECK: &str = "store-writable";
    let title = "a file can be written there";
    // A name that the store does not read: what a doctor that was killed leaves behind does no harm.
    let path = store.join(format!(".doctor-{}", std::process::id()));
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
            let written = io::Write::write_all(&mut file, b"doctor\n").and_then(|()| file.sync_all());
            let removed = fs::remove_file(&path);
            written.and(removed)
        });
    let Err(error) = written else { return Finding::ok(CHECK, title) };
    let path = store.display();
    let fix = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EROFS) => format!("mount the file system of {path} read-write"),
        Some(Errno::ENOSPC | Errno::EDQUOT) => format!("make room on the disk of {path}: df {path}"),
        Some(Errno::EACCES | Errno::EPERM) => {
            return Finding::not_checked(CHECK, title, format!("{error}: run doctor as the store's owner"));
        }
        _ => format!("look at the kernel's log, and at the disk of {path}"),
    };
    Finding::fault(CHECK, title, error.to_string(), fix)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::doctor::Outcome;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn fault_of<'a>(findings: &'a [Finding], check: &str) -> Option<&'a str> {
        let finding = findings.iter().find(|finding| finding.check == check).unwrap();
        match &finding.outcome {
            Outcome::Fault { found, .. } => Some(found),
            _ => None,
        }
    }

    #[test]
    fn a_good_store_has_no_faults_and_no_rest() {
        let dir = tempfile::tempdir().unwrap();
        set_mode(dir.path(), 0o700);
        let findings = check(dir.path());
        assert_eq!(findings.len(), 4);
        for finding in &findings {
            assert!(
                !matches!(finding.outcome, Outcome::Fault { .. } | Outcome::NotChecked { .. }),
                "{finding:?}"
            );
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_store_that_others_can_write_is_a_fault_and_read_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        set_mode(dir.path(), 0o770);
        assert!(fault_of(&check(dir.path()), "store-private").unwrap().contains("0770"));
        // As the service accepts it.
        set_mode(dir.path(), 0o755);
        let found = check(dir.path());
        assert!(
            matches!(&found[0].outcome, Outcome::Warning { found, .. } if found.contains("0755")),
            "{found:?}"
        );
    }

    #[test]
    fn a_missing_store_is_a_warning_and_a_file_a_fault() {
        let dir = tempfile::tempdir().unwrap();
        let missing = check(&dir.path().join("none"));
        assert!(matches!(&*missing, [Finding { outcome: Outcome::Warning { .. }, .. }]), "{missing:?}");
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(fault_of(&check(&file), "store-private"), Some("it is not a directory"));
    }

    #[test]
    fn a_full_disk_is_a_fault_and_a_low_one_a_warning() {
        let store = Path::new("/store");
        assert!(matches!(room(store, 1 << 10, Some(9)).outcome, Outcome::Fault { .. }));
        assert!(matches!(room(store, 1 << 30, Some(0)).outcome, Outcome::Fault { .. }));
        assert!(matches!(room(store, 1 << 20, Some(9)).outcome, Outcome::Warning { .. }));
        assert_eq!(room(store, 1 << 30, None).outcome, Outcome::Ok);
    }
}
