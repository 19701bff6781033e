//! docs/DEPENDENCIES.md lists exactly the agent's dependencies.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

const NOTE: &str = include_str!("../../docs/DEPENDENCIES.md");
const LOCK: &str = include_str!("../../Cargo.lock");
/// Prefix of our own crates, which the note leaves out.
const OURS: &str = "secure-comms-";

/// The direct dependencies of the agent, and of those of our crates that it needs.
fn direct() -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let (mut ours, mut others) = (vec![env!("CARGO_PKG_NAME").to_owned()], BTreeSet::new());
    let mut next = 0;
    while let Some(name) = ours.get(next) {
        let package = packages.iter().find(|package| package["name"] == *name).unwrap();
        let all = package["dependencies"].as_array().unwrap().iter();
        for dependency in all.filter(|dependency| dependency["kind"].is_null()) {
            let name = dependency["name"].as_str().unwrap().to_owned();
            if !name.starts_with(OURS) {
                others.insert(name);
            } else if !ours.contains(&name) {
                ours.push(name);
            }
        }
        next += 1;
    }
    others.into_iter().collect()
}

/// The crates in the note's table, with their versions.
fn reviewed() -> BTreeMap<&'static str, &'static str> {
    let rows = NOTE.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows = rows.map(|row| row.split_once("` | ").expect("a name and more"));
    rows.map(|(name, rest)| (name, rest.split(" | ").next().unwrap())).collect()
}

#[test]
fn the_note_has_a_row_for_each_direct_dependency_and_no_other() {
    let named: Vec<&str> = reviewed().into_keys().collect();
    assert_eq!(
        direct(),
        named,
        "docs/DEPENDENCIES.md and the manifests of the agent and our crates in it differ"
    );
}

#[test]
fn each_was_reviewed_at_the_version_that_is_built() {
    for (name, version) in reviewed() {
        let locked = format!("name = \"{name}\"\nversion = \"{version}\"\n");
        assert!(
            LOCK.contains(&locked),
            "{name} {version}: Cargo.lock has another version; review the change"
        );
    }
}
