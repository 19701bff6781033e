//! Where `user-data` writes a private key: never in the place of a device, a FIFO or a link.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::stat::Mode;
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn user_data(&self, output: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
        command.env_clear().current_dir(self.0.path()).args(["user-data", "--pod-id", "p1", "--store"]);
        command.arg(self.at("store")).arg("--output").arg(output);
        command
    }

    fn run(&self, output: &Path) -> Output {
        self.user_data(output).output().unwrap()
    }

    #[track_caller]
    fn refuses(&self, path: &Path, reason: &str) {
        let output = self.run(path);
        let expected = format!("secure-comms-adaptor: {reason}\n");
        assert_eq!((String::from_utf8(output.stderr).unwrap(), output.status.code()), (expected, Some(1)));
        assert!(output.stdout.is_empty());
        assert!(!self.at("store").exists(), "a key was made for nothing");
    }
}

fn holds_a_key(text: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(text).is_ok_and(|json| json["sc-pp-prv"].is_string())
}

#[test]
fn a_dash_is_standard_output() {
    let place = Place::new();
    assert!(holds_a_key(&place.run(Path::new("-")).stdout));
    assert!(!place.at("-").exists());
}

#[test]
fn standard_output_by_its_path_stays_what_it_is() {
    let place = Place::new();
    // A pipe, a file to append to, and a socket, which cannot be opened by its path.
    for path in ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"] {
        let link = fs::read_link(path).ok();
        assert!(holds_a_key(&place.run(Path::new(path)).stdout), "{path}");
        let log = place.at("log");
        fs::write(&log, "before\n").unwrap();
        let appended = OpenOptions::new().append(true).open(&log).unwrap();
        assert!(place.user_data(Path::new(path)).stdout(appended).status().unwrap().success());
        let text = fs::read(&log).unwrap();
        assert!(holds_a_key(text.strip_prefix(b"before\n").unwrap()), "{path}");
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let theirs = Stdio::from(std::os::fd::OwnedFd::from(theirs));
        assert!(place.user_data(Path::new(path)).stdout(theirs).status().unwrap().success(), "{path}");
        let mut received = Vec::new();
        ours.read_to_end(&mut received).unwrap();
        assert!(holds_a_key(&received), "{path}");
        assert!(path != "/dev/stdout" || fs::read_link(path).ok() == link, "{path} was replaced");
    }
}

#[test]
fn a_link_to_a_pipe_of_the_process_is_followed() {
    let place = Place::new();
    symlink("/proc/self/fd/2", place.at("link")).unwrap();
    let output = place.run(&place.at("link"));
    assert!(holds_a_key(&output.stderr), "{output:?}");
    assert!(place.at("link").is_symlink());
}

#[test]
fn a_device_is_written_through() {
    let place = Place::new();
    let null = fs::metadata("/dev/null").unwrap();
    symlink("/dev/null", place.at("link")).unwrap();
    for path in [Path::new("/dev/null"), &place.at("link")] {
        let output = place.run(path);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(fs::symlink_metadata("/dev/null").unwrap().rdev(), null.rdev());
    }
    assert!(place.at("link").is_symlink());
    let output = place.run(Path::new("/dev/full"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error, "secure-comms-adaptor: writing /dev/full: No space left on device (os error 28)\n");
}

#[test]
fn a_fifo_is_written_through_once_it_has_a_reader() {
    let place = Place::new();
    let fifo = place.at("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let mut child = place.user_data(&fifo).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let waiting = format!("waiting until a reader opens the FIFO {}", fifo.display());
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut stderr, &mut said).unwrap();
    assert!(said.contains(&waiting), "{said}");
    assert!(holds_a_key(&fs::read(&fifo).unwrap()));
    assert!(child.wait().unwrap().success());
    // With a reader that was there first.
    let reader = {
        let fifo = fifo.clone();
        std::thread::spawn(move || fs::read(fifo).unwrap())
    };
    assert!(place.user_data(&fifo).stderr(Stdio::null()).status().unwrap().success());
    assert!(holds_a_key(&reader.join().unwrap()));
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&fs::symlink_metadata(&fifo).unwrap().file_type()));
}

#[test]
fn what_is_no_place_for_a_secret_is_refused_and_stays() {
    let place = Place::new();
    fs::write(place.at("target"), "kept").unwrap();
    fs::create_dir(place.at("directory")).unwrap();
    let _socket = UnixListener::bind(place.at("socket")).unwrap();
    let links = [
        ("to-file", "target"),
        ("chain", "to-file"),
        ("dangling", "none"),
        ("loop", "loop"),
        ("to-directory", "directory"),
        ("to-socket", "socket"),
    ];
    for (link, target) in links {
        symlink(target, place.at(link)).unwrap();
    }
    let refused = |name: &str, reason: &str| {
        let path = place.at(name);
        place.refuses(&path, &format!("--output {}: {reason}", path.display()));
    };
    for name in ["to-file", "chain"] {
        refused(name, "it is a symbolic link to a file: give the path of the file itself");
    }
    refused("dangling", "it is a symbolic link to nothing: remove it, or give the path of a file");
    for name in ["directory", "to-directory"] {
        refused(name, "it is a directory: give the path of a file in it");
    }
    for name in ["socket", "to-socket"] {
        refused(name, "it is neither a file nor a stream: give the path of a file");
    }
    let path = place.at("loop");
    place.refuses(
        &path,
        &format!("writing {}: Too many levels of symbolic links (os error 40)", path.display()),
    );
    assert_eq!(fs::read(place.at("target")).unwrap(), b"kept");
    assert!(links.iter().all(|(link, target)| fs::read_link(place.at(link)).unwrap() == Path::new(target)));
}

#[test]
fn a_fifo_or_link_of_another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        // Only root can give a file away.
        return;
    }
    let place = Place::new();
    let (fifo, link) = (place.at("fifo"), place.at("link"));
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    symlink("fifo", &link).unwrap();
    for path in [&fifo, &link] {
        std::os::unix::fs::lchown(path, Some(12345), None).unwrap();
        let reason = "it belongs to user 12345, not to us (user 0): give another path";
        place.refuses(path, &format!("--output {}: {reason}", path.display()));
    }
}

#[test]
fn an_error_names_the_path_that_was_given() {
    let place = Place::new();
    let output = place.run(Path::new("/nodir/x"));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "secure-comms-adaptor: writing /nodir/x: No such file or directory (os error 2)\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_private_key_on_a_terminal_is_warned_of() {
    let place = Place::new();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let mut command = place.user_data(Path::new("-"));
    let output = command.stdout(File::from(terminal.slave)).stderr(Stdio::piped()).output().unwrap();
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(warning.contains("pod p1: its private key is shown on this terminal"), "{warning}");
    let mut shown = vec![0; 4096];
    let length = File::from(terminal.master).read(&mut shown).unwrap();
    assert!(String::from_utf8_lossy(&shown[..length]).contains("sc-pp-prv"));
}
