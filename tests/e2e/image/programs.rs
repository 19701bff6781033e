//! The checks of programs by `image/build-static`, `image/build-agent` and `image/check-guest`, and what `image/build` does before it
//! compiles any.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use super::{script, succeeds, text};

fn executable(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A static program as `image/build-static` makes them, which says that it is the agent and has these texts.
fn program(directory: &TempDir, texts: &[&str]) -> PathBuf {
    let (source, program) = (directory.path().join("source.c"), directory.path().join("program"));
    let texts = texts.iter().map(|text| format!("puts({text:?}); ")).collect::<String>();
    let main = format!("int main(int count, char **words) {{ if (count > 9) {{ {texts}puts(*words); }} ");
    let says = "puts(\"agent-protocol-forwarder 0.1\"); return 0; }";
    fs::write(&source, format!("#include <stdio.h>\n{main}{says}\n")).unwrap();
    let flags = ["-O1", "-fPIE", "-static-pie", "-s", "-Wl,-z,relro,-z,now,-z,noexecstack"];
    succeeds("gcc", &[&flags[..], &["-o", text(&program), text(&source)]].concat());
    program
}

/// Runs a script; programs of `directory/bin` are taken first.
fn run_with(directory: &TempDir, script: &Path, arguments: &[&str]) -> Output {
    let path = format!("{}:{}", text(&directory.path().join("bin")), std::env::var("PATH").unwrap());
    Command::new(script).args(arguments).env("PATH", path).output().unwrap()
}

/// An ordinary user of a machine that refuses user namespaces.
fn without_namespaces() -> TempDir {
    let directory = TempDir::new().unwrap();
    let refused = "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n";
    executable(&directory.path().join("bin/unshare"), refused);
    executable(&directory.path().join("bin/id"), "#!/bin/sh\necho 1000\n");
    directory
}

#[test]
fn an_agent_is_taken_where_user_namespaces_are_refused() {
    let directory = without_namespaces();
    let check = |program: &Path| run_with(&directory, &script("build-agent"), &["--check", text(program)]);
    let output = check(&program(&directory, &[]));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        said.contains("user namespaces are refused here, so it was not tried in an empty chroot"),
        "{said}"
    );
    // It must run all the same.
    let other = directory.path().join("other");
    let source = directory.path().join("other.c");
    fs::write(&source, "int main(void) { return 1; }").unwrap();
    let flags = ["-fPIE", "-static-pie", "-s", "-Wl,-z,relro,-z,now", "-o", text(&other), text(&source)];
    succeeds("gcc", &flags);
    let output = check(&other);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("-version said: "), "{said}");
}

#[test]
fn a_guest_that_is_not_started_is_reported() {
    let (directory, guest) = (without_namespaces(), TempDir::new().unwrap());
    let tool = guest.path().join("usr/local/bin/tool");
    fs::create_dir_all(tool.parent().unwrap()).unwrap();
    fs::copy(program(&directory, &[]), &tool).unwrap();
    let sum = succeeds("sha256sum", &[text(&tool)]);
    let manifest = format!("guest 1.2.3 {} usr/local/bin/tool\n", &sum[..64]);
    fs::write(guest.path().join("manifest"), manifest).unwrap();
    let warned = |output: Output| {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(said.is_empty() || said.contains("unshare failed: Operation not permitted"), "{said}");
        said.contains("WARNING: no program of the guest was started")
    };
    let check = script("check-guest");
    assert!(warned(run_with(&directory, &check, &[text(guest.path())])), "no warning");
    assert!(!warned(run_with(&TempDir::new().unwrap(), &check, &[text(guest.path())])), "a warning");
}

#[test]
fn only_names_below_the_checkout_are_refused() {
    let directory = TempDir::new().unwrap();
    let top = directory.path().join("src");
    for name in ["agent", "image", "keys"] {
        fs::create_dir_all(top.join(name)).unwrap();
    }
    let check = top.join("image/build-static");
    executable(&check, &fs::read_to_string(script("build-static")).unwrap());
    let top = text(&top);
    let registry = "/registry/src/index/russh/src/lib.rs";
    let cargo = format!("{top}/cargo");
    let said = |texts: &[&str]| {
        let program = program(&directory, texts);
        let output = Command::new(&check)
            .env("CARGO_HOME", &cargo)
            .args(["--check", text(&program)])
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    // As of a checkout at /secure-comms or /src: names of the VM, and those that a build has put in the place of others.
    let good = [
        format!("/run{top}"),
        format!("/run{top}/status"),
        format!("/nowhere{top}/agent/src/lib.rs"),
        format!("/nowhere{cargo}{registry}"),
    ];
    let good: Vec<&str> = good.iter().map(String::as_str).collect();
    assert_eq!(said(&good), (true, String::new()));
    for bad in [format!("{top}/agent/src/lib.rs"), format!("{cargo}{registry}")] {
        // Also after another name, with nothing between them.
        for text in [bad.clone(), format!("{}{bad}", good[2])] {
            let (accepted, said) = said(&[good[0], &text]);
            assert!(
                !accepted && said.contains(&format!("names directories of this machine: {bad}")),
                "{said}"
            );
        }
    }
}

#[test]
fn nothing_is_compiled_before_mkosi_is_there() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    executable(&at("bin/id"), "#!/bin/sh\necho 0\n");
    executable(&at("bin/mmdebstrap"), "#!/bin/sh\n");
    executable(&at("image/build"), &fs::read_to_string(script("build")).unwrap());
    executable(&at("image/build-agent"), "#!/bin/sh\necho compiled >&2\nexit 3\n");
    executable(&at("image/mkosi/sources"), "#!/bin/sh\n");
    executable(&at("image/mkosi/tools"), "#!/bin/sh\necho 'no mkosi' >&2\nexit 1\n");
    let output = run_with(&directory, &at("image/build"), &[]);
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
        (Some(1), "no mkosi\n")
    );
}
