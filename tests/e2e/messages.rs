//! What the pod VM's programs say is complete, although those that ship are built without the texts of `{:?}`
//! (docs/decisions/0033): no message of their crates rests on them, and the lines of the agent's binary have no gaps.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test's helpers fail as the test does

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use secure_comms_tests::attackers::raw::Raw;
use secure_comms_tests::attackers::stranger::{Answer, Stranger};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{PATIENCE, Scene, SceneOptions, free_port, says, scene};
use secure_comms_tests::simulators::openssh::OpenSsh;
use tokio::time::timeout;

/// The crates that the agent and the image's other programs are made of.
const CRATES: [&str; 9] = [
    "agent",
    "ssh",
    "tunnel",
    "keys",
    "protocol",
    "image/device-mapper",
    "image/init",
    "image/user-data",
    "image/volumes",
];

/// Files of a crate that are part of the program, with their texts.
fn sources(name: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(name).join("src");
    let (mut folders, mut files) = (vec![root], Vec::new());
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path, text));
            }
        }
    }
    files.retain(|(path, _)| !path.file_stem().unwrap().to_str().unwrap().ends_with("tests"));
    files
}

/// The lines of a file that rest on Debug texts, tests and comments left out.
///
/// Besides `{:?}` these are errors that hold nix's `Errno`, whose Display is made of its Debug text (`io::Error` prints the
/// same cause without it), and everything in the return value of `main`, which is printed by Debug.
fn debug_texts(text: &str) -> Vec<&str> {
    // Modules of tests come last in their file.
    let tests = ["#[cfg(test)]\nmod ", "#[cfg(test)]\npub(super) mod "]
        .into_iter()
        .filter_map(|begin| text.find(begin))
        .min();
    let program = tests.map_or(text, |begin| &text[..begin]);
    let lines = program.lines().filter(|line| !line.trim_start().starts_with("//"));
    let is_debug = |line: &&str| {
        let by_format = line.match_indices("?}").any(|(end, _)| {
            let before = &line[..end];
            let inside = before.rfind('{').map(|begin| &before[begin + 1..]);
            inside.is_some_and(|inside| inside.contains(':'))
        });
        let by_name =
            ["Debug::fmt(", "dbg!(", "fn main() -> Result", "Errno),", "source: Errno", "cause: Errno"];
        by_format || by_name.iter().any(|name| line.contains(name))
    };
    lines.filter(is_debug).collect()
}

#[test]
fn no_message_rests_on_debug_texts() {
    let mut found = Vec::new();
    for name in CRATES {
        let sources = sources(name);
        assert!(sources.len() > 1, "{name}: no sources");
        for (path, text) in &sources {
            found.extend(debug_texts(text).into_iter().map(|line| format!("{}: {line}", path.display())));
        }
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn the_search_finds_debug_texts() {
    for line in [
        "log::warn!(\"left: {left:?}\");",
        "#[error(\"after {0:?}\")]",
        "format!(\"{} and {:#?}\", 1, two)",
        "format!(\"{number:02x?}\")",
        "std::fmt::Debug::fmt(&error, f)",
        "    Prctl(Errno),",
        "        source: Errno,",
        "fn main() -> Result<(), Error> {",
    ] {
        assert_eq!(debug_texts(line), [line]);
    }
    for text in [
        "let found = if let Some(x) = f()? {1} else {g()?};",
        "match address { a => b(a)?}",
        "// as \"{:?}\" does",
        "log::warn!(\"{error}: {:>4}\", 1);",
        "#[derive(Debug)]",
        "Err(Errno::ENOENT) => {}",
        "fn f() {}\n#[cfg(test)]\nmod tests {\n    panic!(\"{x:?}\");\n}",
    ] {
        assert_eq!(debug_texts(text), Vec::<&str>::new(), "{text}");
    }
}

/// Places where a text that was to be filled in is missing.
fn gaps(line: &str) -> Vec<&'static str> {
    let gaps = ["  ", "()", "''", "\"\"", ": ;", ": ,", ": :", "; ;", " ,", "( ", " )", "[]", "{}"];
    let mut found: Vec<_> = gaps.into_iter().filter(|gap| line.contains(gap)).collect();
    if line.trim_end().ends_with([':', ',', ';', '(']) {
        found.push("its end");
    }
    found
}

/// Every line of the agent is complete.
fn no_gaps(agent: &Child) -> Result<()> {
    for line in agent.lines() {
        let gaps = gaps(&line.text);
        ensure!(gaps.is_empty(), "gaps {gaps:?} in: {}", line.text);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_about_strangers_and_causes_are_complete() -> Result<()> {
    let mut scene = scene().await?;
    // Nothing listens there.
    let closed = free_port()?;
    scene.agent_flags = vec!["-secure-comms-guest-api".to_owned(), closed.to_string()];
    let agent = scene.debugged_agent().await?;

    // A duration, and an address.
    let silent = Raw::connect(scene.ssh).await?;
    let address = silent.address()?;
    says(&agent, &format!("connection from {address}: ended: did not authenticate within 10 s")).await?;

    // The kind of algorithm, ours and theirs.
    let mut ssh = OpenSsh::new(scene.ssh)?.command("attestation", &["-c", "aes128-ctr"], &[]);
    ssh.stdin(Stdio::null()).kill_on_drop(true);
    timeout(PATIENCE, ssh.output()).await.context("ssh hangs")??;
    let known = "no Cipher algorithm of ours (aes256-gcm@openssh.com,chacha20-poly1305@openssh.com): it offers aes128-ctr";
    says(&agent, known).await?;

    // A cause that the kernel named, with its number.
    let _peer = Stranger::attest(scene.ssh, &scene.pod, Answer::Silent).await?;
    says(&agent, &format!("api-server-rest at {closed}: Connection refused (os error 111)")).await?;
    no_gaps(&agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_user_data_name_their_place_and_no_secret() -> Result<()> {
    for (text, fault) in [
        ("\"one string, a private key\"", "invalid type: a string, expected an object at line 1 column"),
        ("{\"sc-pp-prv\": 7}", "key 'sc-pp-prv'"),
        ("{\"sc-inbounds\": [1]}", "expected a string"),
        ("[7]", "invalid type: sequence, expected an object at line 1 column"),
    ] {
        let scene = Scene::new(SceneOptions { user_data: true, ..SceneOptions::default() }).await?;
        fs::write(scene.path("apf.json"), text)?;
        let mut agent = Child::spawn("agent", scene.agent_command()?)?;
        agent.wait_exit(PATIENCE).await?;
        let said = agent.log();
        ensure!(said.contains(fault), "{text}: no '{fault}' in: {said}");
        ensure!(!said.contains("private key"), "{text}: quoted in: {said}");
        no_gaps(&agent)?;
    }
    Ok(())
}
