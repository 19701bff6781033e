//! The scripts that make the pod VM image ready for a cloud: `image/export`, and `image/build --guest DIR --check-only`. On a small
//! disk and a small tree; the step `image` of tests/run runs them on the real ones.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod export;
mod guest;
mod programs;
mod sources;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("image").join(name)
}

/// Runs a command to its end; `name` is a program or a script's path.
fn run(name: impl AsRef<Path>, arguments: &[&str]) -> Output {
    let name = name.as_ref();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(name).args(arguments).env("PATH", path).output();
    output.unwrap_or_else(|error| panic!("{}: {error}", name.display()))
}

/// Standard output of a command that must succeed.
fn succeeds(name: impl AsRef<Path>, arguments: &[&str]) -> String {
    let output = run(&name, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {}: {said}", name.as_ref().display(), output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a command that must fail with exit code 1 and print no result.
fn refuses(name: impl AsRef<Path>, arguments: &[&str]) -> String {
    let output = run(&name, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
