//! The real binary: its help, completions and man pages.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

fn adaptor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
    command.args(args).env_clear().env("COLUMNS", "80").output().unwrap()
}

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// All commands, as the help of their parents lists them.
fn commands() -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut open = vec![Vec::new()];
    while let Some(path) = open.pop() {
        let args: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let help = text(&adaptor(&args));
        let listed = help.split("\nCommands:\n").nth(1).map(|rest| rest.split("\n\n").next().unwrap());
        for line in listed.into_iter().flat_map(str::lines).filter(|line| line.starts_with("  ")) {
            // A name begins in the third column; the lines of its text that follow begin further on.
            let name = line[2..].split_whitespace().next().filter(|_| !line[2..].starts_with(' '));
            if let Some(name) = name.filter(|name| *name != "help") {
                open.push([&*path, &[name.to_owned()]].concat());
            }
        }
        found.push(path);
    }
    found
}

#[test]
fn every_command_has_a_help_that_fits_a_terminal() {
    let commands = commands();
    for expected in
        ["serve", "pod list", "pod watch", "pod orphans", "doctor", "status", "config show", "man"]
    {
        assert!(commands.iter().any(|path| path.join(" ") == expected), "{expected}: {commands:?}");
    }
    for path in &commands {
        for flag in ["--help", "-h"] {
            let args: Vec<&str> = path.iter().map(String::as_str).chain([flag]).collect();
            let help = text(&adaptor(&args));
            let usage =
                [&["Usage: secure-comms-adaptor"], &*path.iter().map(String::as_str).collect::<Vec<_>>()];
            assert!(help.contains(&usage.concat().join(" ")), "{path:?}: {help}");
            assert!(help.lines().all(|line| line.chars().count() <= 100), "{path:?}: {help}");
        }
    }
}

/// Whether a program is installed.
fn there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[test]
fn completions_are_valid_in_their_shells() {
    let commands = commands();
    for (shell, check) in [("bash", "bash -n"), ("zsh", "zsh -n"), ("fish", "fish --no-execute")] {
        let script = text(&adaptor(&["completions", shell]));
        for word in ["secure-comms-adaptor", "doctor", "socket", "no-headers"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        for path in &commands {
            assert!(path.iter().all(|word| script.contains(&**word)), "{shell}: {path:?}");
        }
        let mut words = check.split(' ');
        let program = words.next().unwrap();
        // Every machine has bash; the others' scripts come from the same definitions.
        if program == "bash" || there(program) {
            let mut child = Command::new(program)
                .args(words)
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
        }
    }
}

#[test]
fn bash_completes_commands_and_values() {
    let script = text(&adaptor(&["completions", "bash"]));
    let complete = |words: &str| {
        let count = words.split(' ').count() - 1;
        let ask = format!(
            "{script}\nCOMP_WORDS=({words}); [ {count} -lt ${{#COMP_WORDS[@]}} ] || COMP_WORDS+=(''); COMP_CWORD={count}\n\
             _secure__comms__adaptor secure-comms-adaptor \"${{COMP_WORDS[{count}]}}\" \"${{COMP_WORDS[$(({count} - 1))]}}\"\n\
             echo \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash").args(["--norc", "-c", &ask]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("secure-comms-adaptor pod orph"), "orphans");
    assert_eq!(complete("secure-comms-adaptor pod list -o y"), "yaml");
    assert_eq!(complete("secure-comms-adaptor caa-ce"), "caa-certs");
    assert_eq!(complete("secure-comms-adaptor doctor --po"), "--pod");
}

#[test]
fn man_pages_of_all_commands_render() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man8");
    assert_eq!(text(&adaptor(&["man", "--directory", pages.to_str().unwrap()])), "");
    for path in commands() {
        let name = [vec!["secure-comms-adaptor".to_owned()], path.clone()].concat().join("-");
        let file = pages.join(format!("{name}.8"));
        let page =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(page.contains(&format!(".TH {} 8", name.to_uppercase())), "{page}");
        if there("man") {
            let output = Command::new("man")
                .args(["--warnings", "-l"])
                .arg(&file)
                .env("MANWIDTH", "80")
                .env("LC_ALL", "C.UTF-8")
                .output()
                .unwrap();
            let shown = String::from_utf8_lossy(&output.stdout);
            // A minimal image has a man that only says so.
            if shown.contains("has been minimized") {
                continue;
            }
            assert!(output.status.success() && output.stderr.is_empty(), "{name}: {output:?}");
            assert!(shown.contains("SYNOPSIS"), "{shown}");
        }
    }
    let first = text(&adaptor(&["man"]));
    assert!(first.contains(".TH SECURE-COMMS-ADAPTOR 8"), "{first}");
}

#[test]
fn the_api_is_described() {
    let document: serde_json::Value = serde_json::from_str(&text(&adaptor(&["openapi"]))).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    assert!(document["paths"]["/v1/pods/{id}"].is_object());
}

#[test]
fn a_reader_that_is_gone_is_no_error() {
    for args in [&["openapi"][..], &["config", "show"]] {
        let (reader, stdout) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_secure-comms-adaptor"));
        let output = command.args(args).env_clear().stdout(stdout).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{args:?}");
    }
}
