use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use tempfile::TempDir;

use super::sys::faults::{self, Fault};
use super::*;
use crate::provision::{Options, plan, samples};

const DIGEST: &str = "692f2059ebbdf6189c795392d263f2bd0b4020d43e5044b22965424e1670759a";

type Texts = BTreeMap<String, String>;

fn set(user_data: &[(FileName, &str)], init_data: &[(&str, &str)]) -> FileSet {
    plan(&samples::user_data(user_data, Some(init_data)), &Earlier::default(), &Options::default()).unwrap()
}

fn old_set() -> FileSet {
    set(
        &[(FileName::Apf, "{\"old\":1}"), (FileName::Auth, "{\"old\":2}")],
        &[("aa.toml", "old"), ("policy.rego", "old")],
    )
}

fn new_set() -> FileSet {
    set(
        &[(FileName::Apf, "{\"new\":1}"), (FileName::ScratchSpaceMarker, "")],
        &[("aa.toml", "new"), ("cdh.toml", "new")],
    )
}

fn write(path: &Path, set: &FileSet) -> Result<Outcome, WriteError> {
    Directory::open(path)?.stage(set)?.commit()
}

/// All that is below the directory, hidden or not.
fn found(path: &Path) -> Texts {
    let mut texts = Texts::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        texts.insert(
            name,
            fs::read_to_string(entry.path()).unwrap_or_else(|error| format!("<{}>", error.kind())),
        );
    }
    texts
}

fn texts(set: &FileSet) -> Texts {
    set.files()
        .map(|(name, text)| (name.as_str().to_owned(), String::from_utf8(text.to_vec()).unwrap()))
        .collect()
}

fn directory() -> (TempDir, PathBuf) {
    // A tmpfs, as /run is: there fsync costs nothing.
    let temporary = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = temporary.path().canonicalize().unwrap().join("peerpod");
    (temporary, path)
}

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_set_is_written_with_its_modes() {
    let (_temporary, path) = directory();
    assert_eq!(write(&path, &new_set()).unwrap(), Outcome::Written);
    assert_eq!(found(&path), texts(&new_set()));
    assert_eq!(mode_of(&path), 0o755);
    for name in found(&path).keys() {
        let expected = if name == "apf.json" { 0o600 } else { 0o644 };
        assert_eq!(mode_of(&path.join(name)), expected, "{name}");
    }
}

#[test]
fn a_later_set_replaces_all_of_an_earlier_one() {
    let (_temporary, path) = directory();
    write(&path, &old_set()).unwrap();
    fs::write(path.join("other"), "kept").unwrap();
    write(&path, &new_set()).unwrap();
    let mut expected = texts(&new_set());
    expected.insert("other".to_owned(), "kept".to_owned());
    assert_eq!(found(&path), expected);
}

#[test]
fn the_same_set_is_not_written_twice() {
    let (_temporary, path) = directory();
    write(&path, &old_set()).unwrap();
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path.join(name)).unwrap());
    let before = inode("aa.toml");
    assert_eq!(write(&path, &old_set()).unwrap(), Outcome::Unchanged);
    assert_eq!(inode("aa.toml"), before);
    // A mode or one more of our files is another set.
    fs::set_permissions(path.join("auth.json"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(write(&path, &old_set()).unwrap(), Outcome::Written);
    assert_eq!(mode_of(&path.join("auth.json")), 0o600);
    fs::write(path.join("secure-comms.toml"), "x").unwrap();
    assert_eq!(write(&path, &old_set()).unwrap(), Outcome::Written);
    assert_eq!(found(&path), texts(&old_set()));
}

#[test]
fn what_is_staged_is_removed_unless_committed() {
    let (_temporary, path) = directory();
    write(&path, &old_set()).unwrap();
    let directory = Directory::open(&path).unwrap();
    drop(directory.stage(&new_set()).unwrap());
    assert_eq!(found(&path), texts(&old_set()));
}

#[test]
fn a_directory_that_exists_keeps_its_mode() {
    let (_temporary, path) = directory();
    fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
    write(&path, &old_set()).unwrap();
    assert_eq!(mode_of(&path), 0o700);
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let (_temporary, path) = directory();
    fs::create_dir(&path).unwrap();
    for mode in [0o775, 0o757, 0o1777] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert!(matches!(Directory::open(&path), Err(WriteError::Insecure(_))), "{mode:o}");
    }
}

#[test]
fn nothing_is_written_through_a_symbolic_link() {
    let (temporary, path) = directory();
    let outside = temporary.path().canonicalize().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "kept").unwrap();
    // The directory itself, and a part of its path.
    symlink(&outside, &path).unwrap();
    for path in [path.clone(), path.join("below")] {
        let error = Directory::open(&path).unwrap_err();
        let WriteError::System { cause, .. } = error else { panic!("{error}") };
        assert_eq!(cause.raw_os_error(), Some(Errno::ELOOP as i32));
    }
    fs::remove_file(&path).unwrap();
    // A file, and the hidden directories.
    for name in ["apf.json", "aa.toml", STAGING, CLEARING, INSTALLING] {
        fs::create_dir(&path).unwrap();
        let target = if name.starts_with('.') { outside.clone() } else { outside.join("file") };
        symlink(target, path.join(name)).unwrap();
        let error = write(&path, &new_set()).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
        assert_eq!(found(&path).len(), 1, "{name}");
        fs::remove_dir_all(&path).unwrap();
    }
    assert_eq!(found(&outside), Texts::from([("file".to_owned(), "kept".to_owned())]));
}

#[test]
fn only_regular_files_are_read_and_replaced() {
    let (_temporary, path) = directory();
    fs::create_dir(&path).unwrap();
    // Blocks a program that opens it for reading.
    nix::unistd::mkfifo(&path.join("initdata"), Mode::S_IRWXU).unwrap();
    fs::create_dir(path.join("aa.toml")).unwrap();
    let directory = Directory::open(&path).unwrap();
    let error = directory.earlier().unwrap_err();
    assert_eq!(error.to_string(), format!("reading {}", path.join("initdata").display()));
    assert!(
        matches!(directory.stage(&new_set()).unwrap_err(), WriteError::NotRegular(at) if at.ends_with("initdata"))
    );
    fs::remove_file(path.join("initdata")).unwrap();
    assert!(
        matches!(directory.stage(&new_set()).unwrap_err(), WriteError::NotRegular(at) if at.ends_with("aa.toml"))
    );
    assert_eq!(found(&path).len(), 1);
}

#[test]
fn what_is_read_back_is_bounded() {
    let (_temporary, path) = directory();
    fs::create_dir(&path).unwrap();
    let size = usize::try_from(READ_MAX).unwrap();
    fs::write(path.join("initdata"), vec![b'A'; size]).unwrap();
    fs::write(path.join("initdata.digest"), DIGEST).unwrap();
    let directory = Directory::open(&path).unwrap();
    let earlier = directory.earlier().unwrap();
    assert_eq!(earlier.init_data.unwrap().len(), size);
    assert_eq!(earlier.digest.unwrap(), DIGEST.as_bytes());
    fs::write(path.join("initdata"), vec![b'A'; size + 1]).unwrap();
    assert!(directory.earlier().is_err());
    drop(directory);
    // It can be replaced all the same.
    write(&path, &new_set()).unwrap();
    assert_eq!(found(&path), texts(&new_set()));
}

#[test]
fn two_runs_write_one_after_the_other() {
    let (_temporary, path) = directory();
    let first = Directory::open(&path).unwrap();
    let (asked, is_asked) = std::sync::mpsc::channel();
    let second = std::thread::spawn({
        let path = path.clone();
        move || {
            asked.send(()).unwrap();
            write(&path, &new_set())
        }
    });
    is_asked.recv().unwrap();
    let staged = first.stage(&old_set()).unwrap();
    staged.commit().unwrap();
    assert_eq!(found(&path), texts(&old_set()));
    drop(first);
    second.join().unwrap().unwrap();
    assert_eq!(found(&path), texts(&new_set()));
}

/// What may be there after a fault: `aa.toml` stands for a whole set of one run.
fn assert_aa_toml_stands_for_a_whole_set(path: &Path, case: &str) {
    let mut found = found(path);
    if found.contains_key("aa.toml") {
        found.retain(|name, _| !name.starts_with('.'));
        assert!([texts(&old_set()), texts(&new_set())].contains(&found), "{case}: {found:?}");
    }
}

/// Runs `attempt` with a fault before its n-th system call, for every n, and then finishes as a later run does.
fn at_every_step(old: Option<&FileSet>, attempt: impl Fn(&Path, u32) -> bool) -> Vec<Texts> {
    let mut results = Vec::new();
    for step in 0..1000 {
        let (_temporary, path) = directory();
        if let Some(old) = old {
            write(&path, old).unwrap();
        } else {
            fs::create_dir(&path).unwrap();
        }
        let came = attempt(&path, step);
        assert_aa_toml_stands_for_a_whole_set(&path, &format!("step {step}"));
        drop(Directory::open(&path).unwrap());
        results.push(found(&path));
        // And yet another run gets its set into place.
        write(&path, &new_set()).unwrap();
        assert_eq!(found(&path), texts(&new_set()), "step {step}");
        if !came {
            return results;
        }
    }
    panic!("a run has no end");
}

fn assert_old_then_new(results: &[Texts], old: &Texts) {
    let new = texts(&new_set());
    let switch = results.iter().position(|found| *found == new).expect("the last run was whole");
    assert!(results[..switch].iter().all(|found| found == old), "{results:?}");
    assert!(results[switch..].iter().all(|found| *found == new), "{results:?}");
    // Both have been seen: faults before and after the commit.
    assert!(switch > 20 && results.len() - switch > 20, "{switch} of {}", results.len());
}

#[test]
fn an_error_at_any_step_leaves_the_old_or_the_new_set() {
    for errno in [Errno::ENOSPC, Errno::EIO] {
        let attempt = |path: &Path, step| {
            faults::inject(step, Fault::Error(errno));
            let result = write(path, &new_set());
            let came = faults::came();
            assert_eq!(result.is_err(), came, "step {step}");
            came
        };
        assert_old_then_new(&at_every_step(Some(&old_set()), attempt), &texts(&old_set()));
        assert_old_then_new(&at_every_step(None, attempt), &Texts::new());
    }
}

/// For the child process of the next test: the directory, and the step at which it dies.
const CHILD: &str = "KILLED_AT_STEP";

#[test]
fn a_kill_at_any_step_leaves_the_old_or_the_new_set() {
    if let Ok(arguments) = std::env::var(CHILD) {
        let (step, path) = arguments.split_once(' ').unwrap();
        faults::inject(step.parse().unwrap(), Fault::Kill);
        write(Path::new(path), &new_set()).unwrap();
        assert!(!faults::came());
        return;
    }
    let attempt = |path: &Path, step| {
        let name = "provision::directory::tests::a_kill_at_any_step_leaves_the_old_or_the_new_set";
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            .env(CHILD, format!("{step} {}", path.display()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success() || status.signal() == Some(9), "step {step}: {status}");
        !status.success()
    };
    assert_old_then_new(&at_every_step(Some(&old_set()), attempt), &texts(&old_set()));
}
