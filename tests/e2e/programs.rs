//! The programs and scripts as people start them: their help, and the demo in two terminals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use secure_comms_tests::harness::process::{Child, Signal, ensure_built};
use secure_comms_tests::harness::scene::{PATIENCE, says, says_after};
use tokio::process::Command;
use tokio::time::timeout;

const DEMO_VM: &str = env!("CARGO_BIN_EXE_demo-vm");
const DEMO_NODE: &str = env!("CARGO_BIN_EXE_demo-node");

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The scripts that people start: executable files of these directories with a `#!` line.
fn scripts() -> Vec<PathBuf> {
    let mut scripts = Vec::new();
    for directory in ["image", "tests", "tests/stock-clients", "deploy"] {
        for entry in std::fs::read_dir(top().join(directory)).unwrap() {
            let path = entry.unwrap().path();
            let is_script = path.is_file() && std::fs::read(&path).unwrap().starts_with(b"#!");
            scripts.extend(is_script.then_some(path));
        }
    }
    scripts
}

#[tokio::test]
async fn help_of_every_program_is_0_on_standard_output() -> Result<()> {
    let binaries = ensure_built().await?;
    let mut programs = scripts();
    assert!(programs.len() >= 15, "{programs:?}");
    programs.extend([&binaries.agent, &binaries.adaptor, &binaries.simulator].map(Clone::clone));
    programs.extend(
        [
            DEMO_VM,
            DEMO_NODE,
            env!("CARGO_BIN_EXE_bare_russh"),
            env!("CARGO_BIN_EXE_bench"),
            env!("CARGO_BIN_EXE_chaos"),
            env!("CARGO_BIN_EXE_double"),
            env!("CARGO_BIN_EXE_footprint"),
            env!("CARGO_BIN_EXE_interceptor_cost"),
        ]
        .map(PathBuf::from),
    );
    for program in programs {
        for flag in ["--help", "-h"] {
            let name = format!("{} {flag}", program.display());
            let mut command = Command::new(&program);
            // What builds or measures something takes longer, and is killed.
            let output = timeout(Duration::from_secs(60), command.arg(flag).kill_on_drop(true).output());
            let output = output.await.unwrap_or_else(|_| panic!("{name} does something else"))?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(0) && said.is_empty(), "{name}: {}: {said}", output.status);
            ensure!(output.stdout.len() > 20, "{name}: {output:?}");
        }
    }
    Ok(())
}

fn demo(program: &str, name: &str, directory: &Path, more: &[&str]) -> Result<Child> {
    let mut command = Command::new(program);
    command.arg("--dir").arg(directory).args(more);
    Child::spawn(name, command)
}

async fn ends_well(mut demo: Child) -> Result<()> {
    demo.signal(Signal::SIGINT)?;
    let status = demo.wait_exit(PATIENCE).await?;
    ensure!(status.success(), "{status}\n{}", demo.log());
    ensure!(!demo.log().contains("without the line waited for"), "a dump:\n{}", demo.log());
    Ok(())
}

const ANSWERS: &str = "The kata agent in the VM answers";
const UP: &str = "kubernetes phase up";

#[tokio::test]
async fn either_half_of_the_demo_is_killed_and_comes_back() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path().join("demo");
    let vm = || demo(DEMO_VM, "demo-vm", &directory, &[]);
    let node = || demo(DEMO_NODE, "demo-node", &directory, &[]);
    let waits = "The agent waits for its worker node";

    let mut first_vm = vm()?;
    says(&first_vm, waits).await?;
    let mut first_node = node()?;
    says(&first_node, ANSWERS).await?;
    // As by `kill -9`, which leaves the adaptor behind; then by Ctrl-C.
    first_node.kill9().await?;
    let second_node = node()?;
    says(&second_node, ANSWERS).await?;
    ends_well(second_node).await?;
    let third_node = node()?;
    says(&third_node, ANSWERS).await?;

    let mark = third_node.mark();
    first_vm.kill9().await?;
    let second_vm = vm()?;
    says(&second_vm, waits).await?;
    says_after(&third_node, mark, UP).await?;
    let mark = third_node.mark();
    ends_well(second_vm).await?;
    let third_vm = vm()?;
    says_after(&third_node, mark, UP).await?;
    ends_well(third_node).await?;
    ends_well(third_vm).await
}

#[tokio::test]
async fn the_node_half_shows_its_events_from_the_start() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path().join("demo");
    // Nothing listens on port 9 of this machine.
    let node = demo(DEMO_NODE, "demo-node", &directory, &["127.0.0.1:9"])?;
    says(&node, "adaptor | ").await?;
    says(&node, "connecting: ").await?;
    ends_well(node).await
}

#[tokio::test]
async fn a_demo_half_refuses_what_it_does_not_know() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for (program, more, said) in [
        (DEMO_VM, &["x"][..], "expected no arguments but --dir DIR"),
        (DEMO_VM, &["--what"], "--what: unknown"),
        (DEMO_NODE, &[], "no demo-vm has left its address"),
        (DEMO_NODE, &["nonsense"], "nonsense: expected ADDRESS:PORT"),
    ] {
        let mut demo = demo(program, "demo", directory.path(), more)?;
        says(&demo, said).await?;
        ensure!(demo.wait_exit(PATIENCE).await?.code() == Some(2), "{}", demo.log());
    }
    Ok(())
}
