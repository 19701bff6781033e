//! The conformance tables: what the original `process-user-data` did with some 750 inputs, and what ours does.
//!
//! tests/data/README.md says where they come from and what a verdict means.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use base64ct::{Base64, Encoding};
use serde_json::Value;
use sha2::{Digest, Sha256};
use user_data::files::{DIRECTORY, FileName};
use user_data::provision::Directory;
use user_data::{cloud_config, init_data};

/// A file: its length and its SHA-256.
type Files = BTreeMap<String, (u64, String)>;

/// A row of a table.
struct Row {
    case: String,
    user_data: Option<Vec<u8>>,
    init_data: Option<Vec<u8>>,
    /// Exit code 0.
    is_success: bool,
    /// Something stood in the file system before.
    has_setup: bool,
    /// What the original left in /run/peerpod.
    files: Files,
}

impl Row {
    fn of(line: &str) -> Self {
        let row: Value = serde_json::from_str(line).unwrap();
        let case = row["case"].as_str().unwrap().to_owned();
        let bytes = |value: &Value| match (value["text"].as_str(), value["base64"].as_str()) {
            (Some(text), None) => text.as_bytes().to_vec(),
            (None, Some(base64)) => Base64::decode_vec(base64).unwrap(),
            _ => panic!("{case}: no input"),
        };
        let files = row["files"].as_object().unwrap().iter();
        let file = |value: &Value| (value[0].as_u64().unwrap(), value[1].as_str().unwrap().to_owned());
        Self {
            user_data: row.get("user_data").map(bytes).or_else(|| rebuilt_user_data(&case)),
            init_data: row.get("init_data").map(bytes).or_else(|| rebuilt_init_data(&case)),
            is_success: row["exit"] == "0",
            has_setup: row.get("setup").is_some(),
            files: files.map(|(path, value)| (path.clone(), file(value))).collect(),
            case,
        }
    }
}

/// The user data that were too large to be kept, as their notes describe them.
fn rebuilt_user_data(case: &str) -> Option<Vec<u8>> {
    let item = "#cloud-config\n\nwrite_files:\n  - path: /run/peerpod/cdh.toml\n    content: ";
    let line = format!("      {}\n", "x".repeat(63));
    let text = match case {
        "big-64k" => format!("{item}|\n{}", line.repeat(1024)),
        "big-10m" => format!("{item}|\n{}", line.repeat(163_840)),
        "big-10m-oneline" => format!("{item}{}\n", "y".repeat(10 * 1024 * 1024)),
        "alias-bomb-str" => {
            let item = format!("{item}&c {}\n", "x".repeat(200_000));
            item + &"  - path: /run/peerpod/auth.json\n    content: *c\n".repeat(50)
        }
        _ => return None,
    };
    Some(text.into_bytes())
}

/// 180 MiB in 200 KiB.
fn rebuilt_init_data(case: &str) -> Option<Vec<u8>> {
    (case == "bomb-200m-comment").then(|| {
        let member = common::gzip(&vec![b'x'; 1024 * 1024], 9);
        Base64::encode_string(&member.repeat(180)).into_bytes()
    })
}

/// What we do with a row: the files as the original would write them, or the class of the fault.
fn ours(row: &Row) -> Result<Files, String> {
    let mut files: BTreeMap<FileName, Vec<u8>> = BTreeMap::new();
    if let Some(text) = &row.user_data {
        files.extend(cloud_config::read(text).map_err(|error| class(&error))?.files);
    }
    if let Some(text) = &row.init_data {
        files.insert(FileName::InitData, text.clone());
    }
    let init_data = files.get(&FileName::InitData).map(|text| init_data::decode(text));
    let init_data = init_data.unwrap_or_else(|| {
        files.insert(FileName::InitData, init_data::DUMMY.as_bytes().to_vec());
        Ok(init_data::dummy())
    });
    let init_data = init_data.map_err(|error| format!("{error:?}"))?;
    files.extend(init_data.files);
    files.insert(FileName::InitDataDigest, init_data.digest.into_bytes());
    let hex = |content: &[u8]| {
        Sha256::digest(content).iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    };
    let file = |content: &[u8]| (u64::try_from(content.len()).unwrap(), hex(content));
    Ok(files
        .iter()
        .map(|(name, content)| (format!("{DIRECTORY}/{}", name.as_str()), file(content)))
        .collect())
}

fn class(error: &cloud_config::CloudConfigError) -> String {
    let line = error.line().map_or(String::new(), |line| format!("line {line} "));
    format!("{line}{:?}{}", error.fault(), if error.is_permanent() { "" } else { " (may be cut)" })
}

/// The verdict over a row, as it stands in the list.
fn verdict(row: &Row) -> String {
    if row.user_data.is_none() && row.init_data.is_none() {
        return "elsewhere".to_owned();
    }
    let files = match ours(row) {
        Err(fault) if row.is_success => return format!("refused: {fault}"),
        Err(fault) => return format!("both refuse: {fault}"),
        Ok(files) => files,
    };
    if files != row.files && row.has_setup {
        // Where they are written made the difference; that is not for this test.
        let read: Vec<String> = files.iter().map(|(path, (length, _))| format!("{path} {length}")).collect();
        return format!("elsewhere, reads {}", read.join(", "));
    }
    assert!(files == row.files && row.is_success, "{}: {files:?} instead of {:?}", row.case, row.files);
    // Alone they may still be too little for a pod.
    match row.user_data.as_deref().map(cloud_config::parse) {
        Some(Err(error)) => format!("equal, no pod: {}", class(&error)),
        _ => "equal".to_owned(),
    }
}

/// The lines of a file below tests/data.
fn lines(name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

/// The names of this package's tests.
fn tests() -> BTreeSet<String> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![package.join("src"), package.join("tests")];
    let mut names = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(path).unwrap();
                let after = text.split("#[test]").skip(1).filter_map(|test| test.split_once("fn "));
                names.extend(
                    after.filter_map(|(_, test)| test.split_once('(')).map(|(name, _)| name.to_owned()),
                );
            }
        }
    }
    names
}

/// Holds each row against its verdict in the list; both have the same cases in the same order.
fn check(table: &str, rows: usize) {
    let found: Vec<String> = lines(&format!("{table}.jsonl"))
        .iter()
        .map(|line| {
            let row = Row::of(line);
            format!("{}: {}", row.case, verdict(&row))
        })
        .collect();
    let listed = lines(&format!("{table}.verdicts"));
    let tests = tests();
    for (found, listed) in found.iter().zip(&listed) {
        let (verdict, test) = listed.split_once(" -> ").unwrap_or((listed, ""));
        assert_eq!(found, verdict);
        let is_elsewhere = verdict.contains(": elsewhere");
        assert_eq!(is_elsewhere, tests.contains(test), "{listed}: no such test");
    }
    assert_eq!((found.len(), listed.len()), (rows, rows));
}

#[test]
fn every_row_of_cloud_config_has_its_verdict() {
    check("cloud-config", 188);
}

#[test]
fn every_row_of_truncated_texts_has_its_verdict() {
    check("truncated", 39);
}

#[test]
fn every_row_of_init_data_has_its_verdict() {
    check("init-data", 118);
}

#[test]
fn every_variant_has_its_verdict() {
    check("variants", 382);
}

#[test]
fn what_the_generator_writes_is_read_exactly() {
    check("generator", 19);
}

#[test]
fn a_policy_of_80_kb_is_read() {
    let policy = format!("package agent_policy\n{}\n", "# not one byte of it repeats\n".repeat(2700));
    let toml = format!(
        "algorithm = \"sha256\"\nversion = \"0.1.0\"\n\n[data]\n\"policy.rego\" = '''\n{policy}'''\n"
    );
    // Stored, so that the base64 is as long as that of a policy that can't be compressed.
    let base64 = Base64::encode_string(&common::gzip(toml.as_bytes(), 0));
    let plain = lines("generator.jsonl").iter().map(|line| Row::of(line)).find(|row| row.case == "g1-plain");
    let plain = String::from_utf8(plain.unwrap().user_data.unwrap()).unwrap();
    let text = format!("{plain}  - path: /run/peerpod/initdata\n    content: |\n      {base64}\n");
    assert!(base64.len() > 80_000 && text.len() < cloud_config::USER_DATA_MAX);

    let files = BTreeMap::from_iter(cloud_config::parse(text.as_bytes()).unwrap().files);
    let init_data = &files[&FileName::InitData];
    assert_eq!(init_data, format!("{base64}\n").as_bytes());
    let init_data = init_data::decode(init_data).unwrap();
    assert_eq!(init_data.toml, toml.as_bytes());
    assert_eq!(init_data.files, [(FileName::Policy, policy.into_bytes())]);
}

#[test]
fn the_vectors_of_init_data_are_equal() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vectors");
    let mut seen = 0;
    for vector in fs::read_dir(vectors).unwrap() {
        let vector = vector.unwrap().path();
        let init_data = init_data::decode(&fs::read(vector.join("initdata")).unwrap()).unwrap();
        let mut files =
            BTreeMap::from_iter(init_data.files.into_iter().map(|(name, text)| (name.as_str(), text)));
        files.insert("initdata.digest", init_data.digest.into_bytes());
        for file in fs::read_dir(&vector).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            if name != "initdata" {
                assert_eq!(
                    files.remove(name.as_str()),
                    Some(fs::read(file.path()).unwrap()),
                    "{vector:?} {name}"
                );
            }
        }
        assert!(files.is_empty(), "{vector:?}: also {files:?}");
        seen += 1;
    }
    assert_eq!(seen, 5);
}

#[test]
fn a_file_instead_of_the_directory_is_an_error() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("peerpod");
    fs::write(&path, "kept").unwrap();
    assert!(Directory::open(&path).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"kept");
}
