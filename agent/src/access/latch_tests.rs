use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::stat::Mode;
use secure_comms_keys::PodKey;

use super::*;

const TEMPORARY: &str = "keys.new";
const PRIVATE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../keys/testdata/ed25519.openssh"));
const PUBLIC: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../keys/testdata/ed25519.pub"));

fn keys() -> PodKeys {
    PodKeys::parse(PRIVATE.as_bytes(), PUBLIC.as_bytes()).unwrap()
}

/// A temporary directory, and a latch in a directory in it that does not exist yet.
fn latch() -> (tempfile::TempDir, Latch) {
    let parent = tempfile::tempdir().unwrap();
    let latch = Latch::new(parent.path().join("state"));
    (parent, latch)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn refused(latch: &Latch, parts: &[&str]) {
    let faults =
        [latch.load().unwrap_err(), latch.store(&keys()).unwrap_err(), latch.check(true).unwrap_err()];
    for text in faults.map(|error| error.to_string()) {
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(text.contains("-secure-comms-state-dir") && !text.contains("reboot"), "{text}");
    }
}

#[test]
fn a_latch_that_was_never_stored_is_none_and_makes_nothing() {
    let (parent, latch) = latch();
    assert!(latch.load().unwrap().is_none());
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
}

#[test]
fn stored_keys_come_back_and_nobody_else_can_read_them() {
    let (_parent, latch) = latch();
    latch.store(&keys()).unwrap();
    let loaded = latch.load().unwrap().unwrap();
    assert_eq!(loaded.fingerprint(), keys().fingerprint());
    assert!(loaded.worker_node_keys() == keys().worker_node_keys());
    assert_eq!((mode(&latch.directory), mode(&latch.directory.join(FILE))), (0o700, 0o600));
    let names: Vec<_> =
        fs::read_dir(&latch.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [FILE], "no temporary file is left");
}

#[test]
fn storing_again_replaces_the_keys_even_after_a_crash() {
    let (_parent, latch) = latch();
    latch.store(&keys()).unwrap();
    fs::write(latch.directory.join(TEMPORARY), "half of it").unwrap();
    let pem = PodKey::generate().unwrap().to_pem().unwrap();
    let other = PodKeys::parse(pem.as_bytes(), PUBLIC.as_bytes()).unwrap();
    latch.store(&other).unwrap();
    assert_eq!(latch.load().unwrap().unwrap().fingerprint(), other.fingerprint());
    assert!(!latch.directory.join(TEMPORARY).exists());
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let parent = tempfile::tempdir().unwrap();
    let latch = Latch::new(parent.path().join("a/b"));
    latch.store(&keys()).unwrap();
    assert!(latch.load().unwrap().is_some());
    let latch = Latch::new(latch.directory.join(FILE).join("below-a-file"));
    let text = latch.store(&keys()).unwrap_err().to_string();
    assert!(text.contains("making the directory") && text.contains("below-a-file"), "{text}");
}

#[test]
fn a_directory_that_others_may_use_is_refused() {
    for others in [0o770, 0o755, 0o702, 0o710, 0o777, 0o1777] {
        let (_parent, latch) = latch();
        latch.store(&keys()).unwrap();
        set_mode(&latch.directory, others);
        let chmod = format!("run chmod 0700 {}", latch.directory.display());
        refused(&latch, &[&format!("(mode {others:04o})"), &chmod]);
        set_mode(&latch.directory, 0o700);
        latch.check(true).unwrap();
    }
}

#[test]
fn a_directory_that_is_a_link_or_a_file_is_refused() {
    let (parent, latch) = latch();
    latch.store(&keys()).unwrap();
    let link = parent.path().join("link");
    symlink(&latch.directory, &link).unwrap();
    refused(&Latch::new(&link), &["not a directory, or a symbolic link", "name a directory"]);
    refused(&Latch::new(latch.directory.join(FILE)), &["not a directory, or a symbolic link"]);
}

#[test]
fn a_file_that_others_may_use_is_refused() {
    for others in [0o640, 0o604, 0o622] {
        let (_parent, latch) = latch();
        latch.store(&keys()).unwrap();
        set_mode(&latch.directory.join(FILE), others);
        let text = latch.load().unwrap_err().to_string();
        assert!(text.contains(&format!("(mode {others:04o})")) && text.contains("reboot the VM"), "{text}");
    }
}

#[test]
fn a_file_that_is_a_link_or_no_file_is_refused() {
    let (parent, latch) = latch();
    latch.store(&keys()).unwrap();
    let (file, elsewhere) = (latch.directory.join(FILE), parent.path().join("elsewhere"));
    fs::rename(&file, &elsewhere).unwrap();
    symlink(&elsewhere, &file).unwrap();
    assert!(latch.load().unwrap_err().to_string().contains("it is a symbolic link"));
    fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, Mode::S_IRWXU).unwrap();
    assert!(latch.load().unwrap_err().to_string().contains("not a regular file"));
}

#[test]
fn what_belongs_to_somebody_else_is_refused() {
    assert!(nix::unistd::geteuid().is_root(), "this test gives a file away, so it must run as root");
    let (_parent, latch) = latch();
    latch.store(&keys()).unwrap();
    std::os::unix::fs::chown(latch.directory.join(FILE), Some(65534), None).unwrap();
    assert!(latch.load().unwrap_err().to_string().contains("belongs to user 65534"));
    std::os::unix::fs::chown(&latch.directory, Some(65534), None).unwrap();
    refused(&latch, &["belongs to user 65534", "run chown 0 "]);
}

#[test]
fn broken_content_is_an_error_and_never_no_keys() {
    let (_parent, latch) = latch();
    latch.store(&keys()).unwrap();
    let file = latch.directory.join(FILE);
    let whole = fs::read(&file).unwrap();
    for end in (0..whole.len() - 1).step_by(7) {
        fs::write(&file, &whole[..end]).unwrap();
        let text = latch.load().unwrap_err().to_string();
        assert!(text.contains("reading the latched keys") && text.contains("reboot the VM"), "{text}");
    }
    for garbage in [&b"\xff\xfe"[..], b"secure-comms latch 2\n", &vec![b'x'; FILE_MAX + 10]] {
        fs::write(&file, garbage).unwrap();
        assert!(latch.load().is_err());
    }
}

#[test]
fn a_tmpfs_differs_from_a_disk() {
    // /proc is neither.
    for (path, in_memory) in
        [("/dev/shm", true), ("/dev/shm/not/there", true), ("/proc/self", false), ("/proc/none", false)]
    {
        assert_eq!(is_in_memory(Path::new(path)), in_memory, "{path}");
    }
}

#[test]
fn a_directory_outside_of_memory_needs_the_operators_word() {
    // The file system of processes: no memory of the VM's, and no disk either.
    let elsewhere = Latch::new("/proc/self/state");
    let fault = elsewhere.check(false).unwrap_err().to_string();
    assert!(fault.contains("it is not on a tmpfs or ramfs") && fault.contains("-on-disk"), "{fault}");
    elsewhere.check(true).unwrap();
    // Neither the directory nor the one above exists.
    Latch::new("/dev/shm/secure-comms-none/state").check(false).unwrap();
}
