//! Runs of the program one after the other, killed, on a full or read-only file system: table 4, each row with its verdict, and what
//! the original has no row for. Needs root: each case has a mount namespace with its own `/run`, `/media` and `/sys`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64ct::{Base64, Encoding};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use sha2::{Digest, Sha256};

const TABLE: &str = include_str!("data/order.jsonl");
const VERDICTS: &str = include_str!("data/order.verdicts");
const SEED: &str = "/media/cidata/user-data";
const PEERPOD: &str = "/run/peerpod";

/// Name, mode and content of each file.
type Files = BTreeMap<String, (u32, Vec<u8>)>;

/// Runs a test on a machine of its own: without clouds, without a TPM, with user data on a disk.
fn on_machine<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let machine = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("this test needs root");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            for path in ["/media", "/run", "/sys"] {
                mount(Some("empty"), path, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
            }
            fs::create_dir("/media/cidata").unwrap();
            test()
        });
        machine.join().unwrap()
    })
}

fn remount_run(flags: MsFlags, data: Option<&str>) {
    mount(None::<&str>, "/run", None::<&str>, MsFlags::MS_REMOUNT | flags, data).unwrap();
}

/// One second is one try, without a pause after it.
fn program(flags: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_process-user-data"));
    command.args(["provision-files", "-t", "1"]).args(flags.split_whitespace()).stdin(Stdio::null());
    command
}

/// Exit code, or 128 and the signal; and the last line of the log without its head.
fn run(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    let line = log.lines().last().unwrap_or_default();
    let line = line.strip_prefix("process-user-data: ").unwrap_or(line).to_owned();
    (output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap()), line)
}

fn found() -> Files {
    let Ok(entries) = fs::read_dir(PEERPOD) else { return Files::new() };
    let file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        assert!(entry.file_type().unwrap().is_file(), "{name}");
        let mode = entry.metadata().unwrap().permissions().mode() & 0o7777;
        (name, (mode, fs::read(entry.path()).unwrap()))
    };
    entries.map(|entry| file(entry.unwrap())).collect()
}

/// User data with these files; none ends without a line break.
fn user_data(files: &[(&str, &str)]) -> String {
    let item = |(name, text): &(&str, &str)| {
        let lines: String = text.lines().map(|line| format!("      {line}\n")).collect();
        format!("  - path: {PEERPOD}/{name}\n    content: |\n{lines}")
    };
    format!("#cloud-config\n\nwrite_files:\n{}", files.iter().map(item).collect::<String>())
}

fn init_data(files: &[(&str, &str)]) -> String {
    let file = |(name, text): &(&str, &str)| format!("\"{name}\" = '''\n{text}'''\n");
    let files: String = files.iter().map(file).collect();
    let toml = format!("algorithm = \"sha256\"\nversion = \"0.1.0\"\n[data]\n{files}");
    Base64::encode_string(&common::gzip(toml.as_bytes(), 6))
}

/// The user data of a row's first run.
fn first(case: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/order").join(case);
    match case {
        // The large ones, as the original had them.
        "full-16k-user-data" => {
            let lines = format!("{}\n", "x".repeat(63)).repeat(160);
            user_data(&[("apf.json", "{}"), ("auth.json", &"y".repeat(12_000)), ("cdh.toml", &lines)])
        }
        "existing-larger-fails" => user_data(&[("apf.json", "{}"), ("cdh.toml", &"z".repeat(30_000))]),
        _ => fs::read_to_string(path).unwrap(),
    }
}

/// The user data of a row's second run.
fn second(case: &str) -> Option<String> {
    Some(match case {
        "twice-same" | "twice-dummy" => first(case),
        "twice-initdata-changed" => {
            user_data(&[("apf.json", "{}"), ("initdata", &init_data(&[("cdh.toml", "c = 2\n")]))])
        }
        "twice-initdata-removed" => user_data(&[("apf.json", "second")]),
        "twice-second-bad" => user_data(&[("apf.json", "{}"), ("initdata", "AAAA")]),
        "twice-tampered-dummy" => user_data(&[("apf.json", "{}")]),
        _ => return None,
    })
}

/// What the row's machine had before the first run.
fn set_up(case: &str) {
    match case {
        "ro-run" => remount_run(MsFlags::MS_RDONLY, None),
        "ro-run-existing" => {
            fs::create_dir(PEERPOD).unwrap();
            fs::write(format!("{PEERPOD}/apf.json"), "old\n").unwrap();
            remount_run(MsFlags::MS_RDONLY, None);
        }
        "full-16k-user-data" | "full-16k-initdata" => remount_run(MsFlags::empty(), Some("size=16k")),
        "full-8k-digest" => {
            fs::write("/run/filler", vec![0; 4096]).unwrap();
            remount_run(MsFlags::empty(), Some("size=16k"));
        }
        "full-inodes" => remount_run(MsFlags::empty(), Some("nr_inodes=4")),
        "existing-larger-fails" => {
            remount_run(MsFlags::empty(), Some("size=16k"));
            fs::create_dir(PEERPOD).unwrap();
            fs::write(format!("{PEERPOD}/cdh.toml"), "old-but-good\n").unwrap();
        }
        _ => {}
    }
}

/// The row's program, with whatever its log is.
fn command(case: &str, flags: &str) -> Command {
    let binary = env!("CARGO_BIN_EXE_process-user-data");
    let mut command = match case {
        "closed-stderr" => Command::new("sh"),
        _ => program(flags),
    };
    match case {
        "closed-stderr" => {
            command.args(["-c", &format!("exec {binary} provision-files -t 1 {flags} 2>&-")]);
        }
        "nonroot" => {
            command.uid(65534).gid(65534);
        }
        _ => {}
    }
    command
}

/// Without init-data the original made its own; ours does by a flag.
fn flags(case: &str) -> &'static str {
    match case {
        "twice-dummy"
        | "twice-tampered-dummy"
        | "closed-stderr"
        | "stderr-full"
        | "nonroot"
        | "ro-run"
        | "ro-run-existing" => "--without-init-data dummy",
        "full-16k-user-data" | "existing-larger-fails" => "--without-init-data user-data",
        _ => "",
    }
}

/// Of the row: what the original left in the directory, by size and SHA-256.
fn original(row: &Value) -> BTreeMap<String, (u64, String)> {
    let file = |file: &Value| {
        let name = file["path"].as_str().unwrap().strip_prefix("/run/peerpod/").unwrap().to_owned();
        (name, (file["size"].as_u64().unwrap(), file["sha256"].as_str().unwrap().to_owned()))
    };
    row["files"].as_array().unwrap().iter().map(file).collect()
}

/// Ours without what only ours writes.
fn comparable(files: &Files) -> BTreeMap<String, (u64, String)> {
    let hex = |content: &[u8]| Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    let files = files.iter().filter(|(name, _)| *name != "initdata.toml");
    files.map(|(name, (_, content))| (name.clone(), (content.len() as u64, hex(content)))).collect()
}

/// A fault without its paths.
fn class(line: &str) -> String {
    let known = ["No space left on device", "Read-only file system", "Permission denied"];
    let fault = line.split("the last fault: /media/cidata/user-data: ").last().unwrap_or(line);
    known.into_iter().find(|text| fault.contains(text)).unwrap_or(fault).to_owned()
}

fn verdict(row: &Value) -> String {
    let case = row["case"].as_str().unwrap();
    match case {
        "term-during-retry" => return "elsewhere -> a_program_that_waits_ends_with_sigterm".to_owned(),
        case if case.starts_with("kill-at-write-") => {
            return "elsewhere -> a_program_that_is_killed_leaves_the_old_or_the_new_set".to_owned();
        }
        _ => {}
    }
    let flags = flags(case);
    set_up(case);
    let mut before = found();
    fs::write(SEED, first(case)).unwrap();
    let mut command = command(case, flags);
    let (mut exit, mut line) = if case == "stderr-full" {
        let full = File::options().write(true).open("/dev/full").unwrap();
        (command.stderr(full).status().unwrap().code().unwrap(), String::new())
    } else {
        run(&mut command)
    };
    if let Some(second) = second(case) {
        assert_eq!(exit, 0, "{case}: {line}");
        before = found();
        fs::write(SEED, second).unwrap();
        (exit, line) = run(&mut command);
    }
    let after = found();
    let original_succeeds = row["exit"].as_str().unwrap().ends_with('0');
    let original = original(row);
    let with = if flags.is_empty() { String::new() } else { format!(" (with {flags})") };
    match (exit, original_succeeds) {
        (0, true) => {
            assert_eq!(comparable(&after), original, "{case}");
            format!("equal{with}")
        }
        (1, _) => {
            assert_eq!(after, before, "{case}: {line}");
            let who = match (original_succeeds, original == comparable(&before)) {
                (true, _) => "refused",
                (false, true) => "both fail, both leave the old files",
                (false, false) => "both fail, better: leaves the old files",
            };
            format!("{who}: {}{with}", class(&line))
        }
        _ => panic!("{case}: {exit}: {line}"),
    }
}

#[test]
fn each_row_of_the_table_has_its_verdict() {
    let mut verdicts = String::new();
    for line in TABLE.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let verdict = on_machine(|| verdict(&row));
        verdicts.push_str(&format!("{}: {verdict}\n", row["case"].as_str().unwrap()));
    }
    assert_eq!(verdicts, VERDICTS);
}

const INIT_DATA: [(&str, &str); 2] = [("aa.toml", "a = 1\n"), ("policy.rego", "package agent_policy\n")];

/// User data with the same init-data and this apf.json.
fn set(apf: &str, more: &[(&str, &str)]) -> String {
    let init_data = init_data(&INIT_DATA);
    user_data(&[&[("apf.json", apf), ("initdata", init_data.as_str())], more].concat())
}

fn provision(user_data: &str) -> Files {
    fs::write(SEED, user_data).unwrap();
    let (exit, line) = run(&mut program(""));
    assert_eq!(exit, 0, "{line}");
    found()
}

#[test]
fn a_second_run_without_init_data_keeps_the_first_ones() {
    on_machine(|| {
        let first = provision(&set("{}", &[("auth.json", "{}"), ("scratch-space.marker", "")]));
        assert_eq!(first.len(), 8);
        let second = provision(&user_data(&[("apf.json", "{\"second\":1}")]));
        assert_eq!(second["apf.json"], (0o600, b"{\"second\":1}\n".to_vec()));
        // What it does not bring is gone.
        assert_eq!(second.len(), 6);
        for name in ["aa.toml", "policy.rego", "initdata", "initdata.toml", "initdata.digest"] {
            assert_eq!(second[name], first[name], "{name}");
        }
    });
}

#[test]
fn init_data_that_cloud_init_wrote_count() {
    on_machine(|| {
        fs::create_dir(PEERPOD).unwrap();
        fs::write(format!("{PEERPOD}/initdata"), init_data(&INIT_DATA)).unwrap();
        // Written by another: not measured, not brought, so not kept.
        fs::write(format!("{PEERPOD}/cdh.toml"), "evil").unwrap();
        let files = provision(&user_data(&[("apf.json", "{}"), ("aa.toml", "evil")]));
        assert_eq!(files["aa.toml"], (0o644, b"a = 1\n".to_vec()));
        assert!(!files.contains_key("cdh.toml"));
    });
}

#[test]
fn init_data_without_aa_toml_do_not_hang_the_chain() {
    on_machine(|| {
        let init_data = init_data(&[("cdh.toml", "c = 2\n")]);
        fs::write(SEED, user_data(&[("apf.json", "{}"), ("initdata", &init_data)])).unwrap();
        let output = program("").output().unwrap();
        assert!(output.status.success());
        assert_eq!(found()["aa.toml"], (0o644, vec![]));
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(log.contains("init-data: no aa.toml: writing an empty one"), "{log}");
    });
}

#[test]
fn modes_do_not_depend_on_the_umask() {
    for umask in ["000", "077"] {
        on_machine(|| {
            fs::write(SEED, set("{}", &[("auth.json", "{}")])).unwrap();
            let program = env!("CARGO_BIN_EXE_process-user-data");
            let shell = format!("umask {umask}; exec {program} provision-files -t 1");
            assert_eq!(run(Command::new("sh").args(["-c", &shell])).0, 0);
            for (name, (mode, _)) in found() {
                let secret = ["apf.json", "auth.json"].contains(&name.as_str());
                assert_eq!(mode, if secret { 0o600 } else { 0o644 }, "{name} {umask}");
            }
            assert_eq!(fs::metadata(PEERPOD).unwrap().permissions().mode() & 0o7777, 0o755);
        });
    }
}

#[test]
fn init_data_that_can_not_be_measured_bring_no_files() {
    on_machine(|| {
        fs::write(SEED, set("{}", &[])).unwrap();
        // A TPM by the kernel's word, but nothing that answers.
        fs::create_dir_all("/sys/class/tpm/tpm0").unwrap();
        mount(Some("empty"), "/dev", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        for name in ["null", "tpmrm0"] {
            File::create(Path::new("/dev").join(name)).unwrap();
        }
        let (exit, line) = run(&mut program(""));
        assert_eq!((exit, line.as_str()), (1, "TPM: opening /dev/tpmrm0: not a character device"));
        // Neither what starts the attestation agent nor anything else.
        assert_eq!(fs::read_dir(PEERPOD).unwrap().count(), 0);
    });
}

#[test]
fn a_program_that_waits_ends_with_sigterm() {
    on_machine(|| {
        fs::write(SEED, first("term-during-retry")).unwrap();
        let mut program = program("-t 60").stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(program.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("trying again")));
        let pid = nix::unistd::Pid::from_raw(program.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert_eq!(program.wait().unwrap().signal(), Some(15));
        assert_eq!(found(), Files::new());
    });
}

#[test]
fn a_full_disk_leaves_the_old_set() {
    on_machine(|| {
        let old = provision(&set("{\"old\":1}", &[("auth.json", "{\"old\":1}")]));
        remount_run(MsFlags::empty(), Some("size=64k"));
        let filled = "x".repeat(60_000);
        let new = set("{\"new\":1}", &[("auth.json", &format!("{{\"new\":\"{filled}\"}}"))]);
        fs::write(SEED, new).unwrap();
        let (exit, line) = run(&mut program(""));
        assert_eq!(exit, 1);
        assert_eq!(line, "writing /run/peerpod/auth.json: No space left on device (os error 28)");
        assert_eq!(found(), old);
        // And the place is free again.
        remount_run(MsFlags::empty(), Some("size=128k"));
        let (exit, line) = run(&mut program(""));
        assert_eq!(exit, 0, "{line}");
        assert!(found()["auth.json"].1.starts_with(b"{\"new\""));
    });
}

/// Whatever is hidden is the program's own business, but not for longer than to the next run.
fn visible() -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(PEERPOD).into_iter().flatten() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with('.') {
            files.insert(name, (0, fs::read(entry.path()).unwrap()));
        }
    }
    files
}

#[test]
fn a_program_that_is_killed_leaves_the_old_or_the_new_set() {
    on_machine(|| {
        let sets =
            [set("{\"a\":1}", &[("auth.json", "{}")]), set("{\"b\":1}", &[("scratch-space.marker", "")])];
        let results: Vec<_> = sets.iter().map(|set| provision(set)).collect();
        let is_whole = |files: &Files| {
            let contents = |files: &Files| -> BTreeMap<String, Vec<u8>> {
                files.iter().map(|(name, (_, content))| (name.clone(), content.clone())).collect()
            };
            results.iter().any(|whole| contents(whole) == contents(files))
        };
        let (mut killed, mut survived) = (0, 0);
        for attempt in 0..1000_u32 {
            fs::write(SEED, &sets[attempt as usize % 2]).unwrap();
            let mut program = program("").stderr(Stdio::null()).spawn().unwrap();
            // Later and later, until it has come to its end several times.
            std::thread::sleep(Duration::from_micros(20) * attempt);
            program.kill().unwrap();
            if program.wait().unwrap().signal() == Some(9) {
                (killed, survived) = (killed + 1, 0);
            } else {
                survived += 1;
            }
            if survived == 10 {
                break;
            }
            let files = visible();
            if files.contains_key("aa.toml") {
                assert!(is_whole(&files), "{:?}", files.keys());
            }
            if attempt % 10 == 9 {
                // A run that gets no user data settles what was left all the same.
                fs::write(SEED, "#cloud-config\n").unwrap();
                let (exit, _) = run(&mut self::program(""));
                assert_eq!(exit, 1);
                assert!(is_whole(&found()));
            }
        }
        assert!(killed > 0);
        assert_eq!(provision(&sets[0]), results[0]);
    });
}

#[test]
fn two_programs_at_once_leave_one_of_their_sets() {
    on_machine(|| {
        let texts = [set("{\"a\":1}", &[("auth.json", "{}")]), set("{\"b\":1}", &[])];
        let results: Vec<_> = texts.iter().map(|text| provision(text)).collect();
        for _ in 0..10 {
            fs::remove_dir_all(PEERPOD).unwrap();
            let programs: Vec<_> = (0..4)
                .map(|number| {
                    // Renamed to its place: the programs before this one may be reading.
                    let written = format!("{SEED}.new");
                    fs::write(&written, &texts[number % 2]).unwrap();
                    fs::rename(&written, SEED).unwrap();
                    program("").stderr(Stdio::piped()).spawn().unwrap()
                })
                .collect();
            for program in programs {
                let output = program.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            assert!(results.contains(&found()));
        }
    });
}

#[test]
fn a_directory_that_is_a_link_is_refused() {
    on_machine(|| {
        fs::create_dir("/run/elsewhere").unwrap();
        std::os::unix::fs::symlink("/run/elsewhere", PEERPOD).unwrap();
        fs::write(SEED, set("{}", &[])).unwrap();
        let (exit, line) = run(&mut program(""));
        assert_eq!(
            (exit, line.as_str()),
            (1, "opening /run/peerpod: Too many levels of symbolic links (os error 40)")
        );
        assert_eq!(fs::read_dir("/run/elsewhere").unwrap().count(), 0);
        fs::remove_file(PEERPOD).unwrap();
        fs::create_dir(PEERPOD).unwrap();
        fs::set_permissions(PEERPOD, Permissions::from_mode(0o777)).unwrap();
        let (exit, line) = run(&mut program(""));
        assert_eq!(exit, 1);
        assert!(line.contains("other users can write to it"), "{line}");
    });
}
