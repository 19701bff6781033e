//! Every reader of a format takes the same texts, and each text that OpenSSH takes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../testdata/variants.rs"]
mod variants;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use secure_comms_keys::{AdminKey, PodKey, PodKeys, WorkerNodeKey, WorkerNodeKeys};
use tempfile::TempDir;
use variants::{authorized_keys, no_private_keys, private_keys};

const PUBLIC: &str = include_str!("../testdata/ed25519.pub");

/// What `ssh-keygen` prints, if it takes the text.
fn ssh_keygen(dir: &TempDir, args: &[&str], text: &[u8]) -> Option<String> {
    let file = dir.path().join("key");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let output = keygen(args, &file);
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn keygen(args: &[&str], file: &Path) -> std::process::Output {
    Command::new("ssh-keygen").args(args).arg(file).output().expect("ssh-keygen: run tests/install-deps")
}

#[test]
fn every_reader_takes_every_text_of_a_private_key() {
    let dir = tempfile::tempdir().unwrap();
    let mut theirs = 0;
    for (what, text) in private_keys() {
        let key = PodKey::from_pem(&text).unwrap_or_else(|error| panic!("{what}: {error}"));
        let fingerprint = key.fingerprint();
        assert_eq!(WorkerNodeKey::from_pem(&text).unwrap().fingerprint(), fingerprint, "{what}");
        assert_eq!(PodKeys::parse(&text, PUBLIC.as_bytes()).unwrap().fingerprint(), fingerprint, "{what}");
        let admin = format!("{:?}", AdminKey::from_pem(&text).unwrap());
        assert_eq!(admin, format!("AdminKey({fingerprint})"), "{what}");
        if let Some(line) = ssh_keygen(&dir, &["-y", "-P", "", "-f"], &text) {
            theirs += 1;
            let line = WorkerNodeKeys::parse(line.as_bytes()).unwrap();
            assert_eq!(line.fingerprints().collect::<Vec<_>>(), [fingerprint], "{what}");
        }
    }
    assert!(theirs > 0, "ssh-keygen takes some of them");
}

#[test]
fn every_reader_refuses_other_texts_with_the_same_reason() {
    for (text, part) in no_private_keys() {
        for error in [
            PodKey::from_pem(&text).map(drop),
            WorkerNodeKey::from_pem(&text).map(drop),
            AdminKey::from_pem(&text).map(drop),
            PodKeys::parse(&text, PUBLIC.as_bytes()).map(drop),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn every_line_that_openssh_takes_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let expected: Vec<String> = WorkerNodeKeys::parse(PUBLIC.as_bytes()).unwrap().fingerprints().collect();
    let mut theirs = 0;
    for (what, text) in authorized_keys() {
        let keys = WorkerNodeKeys::parse(&text).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(keys.fingerprints().collect::<Vec<_>>(), expected, "{what}");
        if let Some(list) = ssh_keygen(&dir, &["-l", "-f"], &text) {
            theirs += 1;
            assert!(list.contains(&expected[0]), "{what}: {list}");
        }
    }
    assert!(theirs > 10, "ssh-keygen takes most of them: {theirs}");
}

/// What `ssh-keygen` takes by a text of words, ours takes with the same fingerprint.
#[test]
fn no_arrangement_of_words_is_read_otherwise_than_by_openssh() {
    let dir = tempfile::tempdir().unwrap();
    let mut words = PUBLIC.split_whitespace();
    let (kind, key) = (words.next().unwrap(), words.next().unwrap());
    for text in [
        format!("{kind}{key}"),
        format!("{kind}  {key}x"),
        format!("{kind} {} {}", &key[..40], &key[40..]),
        format!("{kind}\n{key}"),
        format!("{kind}\r{key}"),
        format!("{kind}\u{b}{key}"),
        format!("SSH-ED25519 {key}"),
        format!("{kind} {key}=="),
        format!("{kind} \"{key}\""),
        format!("{kind} {key}#comment"),
        format!("{kind} {key} \"unbalanced"),
        format!("ssh-rsa {key}"),
        format!("ssh-dss\t{key}"),
    ] {
        let ours = WorkerNodeKeys::parse(text.as_bytes()).map(|keys| keys.fingerprints().next().unwrap());
        if let Some(theirs) = ssh_keygen(&dir, &["-l", "-f"], text.as_bytes()) {
            let ours = ours.unwrap_or_else(|error| panic!("{text:?}: {error}; OpenSSH: {theirs}"));
            assert!(theirs.contains(&ours), "{text:?}: {ours} {theirs}");
        }
    }
}
