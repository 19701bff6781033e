use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

const PUBLIC: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../keys/testdata/ed25519.pub"));

fn fault(text: &str) -> String {
    parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn every_key_is_read_in_any_form_of_a_string() {
    let text = format!(
        "\u{feff}# of the pod\r\nsc-inbounds = 'KUBERNETES_PHASE:A:podns:1, KUBERNETES_PHASE:B:2'\n\
         \"sc-outbounds\" = \"KUBERNETES_PHASE:C:\\u0064b.example:3\" # a comment\n\
         sc-wn-pub = \"\"\"\n# the node\n{PUBLIC}\"\"\"\nsc-pod-id = '''pod-1'''\n"
    );
    let read = parse(text.as_bytes()).unwrap();
    assert_eq!(read.inbounds.len(), 2);
    assert_eq!(read.outbounds[0].to_string(), "KUBERNETES_PHASE:C:db.example:3");
    assert_eq!(read.worker_node.unwrap().fingerprints().count(), 1);
    assert_eq!(read.pod_id.unwrap().as_str(), "pod-1");
    let empty = parse(b"").unwrap();
    assert!(empty.inbounds.is_empty() && empty.worker_node.is_none() && empty.pod_id.is_none());
}

#[test]
fn a_fault_names_its_key_and_never_its_value() {
    for (text, parts) in [
        ("sc-inbound = 'SECRET'", &["key 'sc-inbound': not known", "sc-inbounds, sc-outbounds"][..]),
        ("sc = true", &["key 'sc': not known"]),
        ("sc-pp-prv = 'SECRET'", &["key 'sc-pp-prv': not known"]),
        ("SC-INBOUNDS = 'SECRET'", &["key 'SC-INBOUNDS': not known"]),
        ("sc-pod-id = 1979", &["key 'sc-pod-id': expected a string"]),
        ("sc-pod-id = true", &["key 'sc-pod-id': expected a string"]),
        ("sc-inbounds = ['SECRET', 'x']", &["key 'sc-inbounds': expected a string"]),
        ("sc-inbounds = {'SECRET' = 'x'}", &["key 'sc-inbounds': expected a string"]),
        ("sc-pod-id = 'pod-1'\n'sc-pod-id' = 'SECRET'", &["key 'sc-pod-id': given twice"]),
        ("sc-pod-id = 'SECRET/'", &["key 'sc-pod-id'"]),
        ("sc-wn-pub = 'SECRET'", &["key 'sc-wn-pub'", "line 1: not a public key"]),
        ("sc-wn-pub = ''", &["key 'sc-wn-pub'", "it is empty"]),
        ("\n\n[data]\nsc-pod-id = 'SECRET'", &["line 3: a table"]),
        ("[[data]]\nsc-pod-id = 'SECRET'", &["line 1: a table"]),
        ("sc.pod-id = 'SECRET'", &["line 1: a table or a dotted key"]),
        ("sc-pod-id = SECRET", &["line 1: not TOML"]),
        ("sc-inbounds = ''\n# SECRET\u{1}", &["line 2: not TOML"]),
        ("# x\nsc-pod-id = 'SECRET", &["line 2: not TOML"]),
        ("{\"sc-pod-id\": \"SECRET\"}", &["not TOML"]),
        ("sc-pod-id = \"\\q SECRET\"", &["line 1: not TOML"]),
        ("sc-pod-id = 'a' 'SECRET'", &["line 1: not TOML"]),
    ] {
        let shown = fault(text);
        for part in parts {
            assert!(shown.contains(part), "{part:?} is not in {shown:?}");
        }
        assert!(!shown.contains("SECRET"), "{shown}");
    }
    assert!(parse(b"sc-pod-id = '\xff'").unwrap_err().to_string().contains("not UTF-8"));
    let long = fault(&format!("{} = 1", "x".repeat(1000)));
    assert!(long.len() < 200, "{long}");
}

#[test]
fn every_fault_is_reported_together() {
    let text = fault("a = 1\nsc-inbounds = 'X:A:1,KUBERNETES_PHASE:B:x'\nsc-pod-id = ''");
    for part in ["key 'a'", "tag 'X:A:1': phase", "tag 'KUBERNETES_PHASE:B:x': port", "key 'sc-pod-id'"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn tunnels_are_of_the_kubernetes_phase_and_not_the_built_in_ones() {
    for (key, tag, part) in [
        ("sc-outbounds", "ATTESTATION_PHASE:PWN:/run/systemd/private", "give it KUBERNETES_PHASE"),
        ("sc-outbounds", "both_phases:PWN:1", "give it KUBERNETES_PHASE"),
        ("sc-inbounds", "BOTH_PHASES:X:1", "give it KUBERNETES_PHASE"),
        ("sc-outbounds", "KUBERNETES_PHASE:KataAgent:evil.example:1", "only a flag may move"),
        ("sc-outbounds", "KUBERNETES_PHASE:KBS:1", "only a flag may move"),
        ("sc-inbounds", "KUBERNETES_PHASE:kbs:1", "only a flag may move"),
    ] {
        let text = fault(&format!("{key} = '{tag}'"));
        assert!(text.contains(key) && text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn depth_and_length_cost_nothing() {
    for open in ["[", "{a=", "a.", "[[", "'", "\"\"\""] {
        for prefix in ["sc-pod-id = ", ""] {
            let text = format!("{prefix}{}", open.repeat(INIT_DATA_MAX / open.len()));
            assert!(parse(text.as_bytes()).is_err(), "{prefix}{open}");
        }
    }
}

#[test]
fn a_missing_file_is_no_init_data_and_a_bad_one_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secure-comms.toml");
    assert!(read(&path).unwrap().is_none());
    assert!(read(&directory.path().join("no/such/directory")).unwrap().is_none());
    fs::write(&path, "sc-pod-id = 'pod-1'").unwrap();
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    assert!(read(&path).unwrap().is_some());
    for open in [0o664, 0o646] {
        mode(open);
        let text = read(&path).unwrap_err().to_string();
        assert!(text.contains("others may access it") && text.contains("chmod 0644"), "{text}");
    }
    mode(0o600);
    fs::write(&path, "x = 1").unwrap();
    let text = read(&path).unwrap_err().to_string();
    assert!(text.contains("secure-comms.toml: key 'x': not known"), "{text}");
    fs::write(&path, "#".repeat(INIT_DATA_MAX + 1)).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("larger than"));
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(read(&link).unwrap_err().to_string().contains("symbolic link"));
    assert!(read(directory.path()).unwrap_err().to_string().contains("not a regular file"));
}

#[test]
fn a_digest_is_one_line_of_hex_digits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("initdata.digest");
    assert!(read_digest(&path).unwrap().is_none());
    let digits = "0123456789abcdefABCDEF0123456789abcdefABCDEF0123456789abcdefABCD";
    for text in [digits.to_owned(), format!("{digits}\n"), format!("{digits}\r\n"), digits.repeat(2) + "\n"] {
        fs::write(&path, &text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(read_digest(&path).unwrap().unwrap().as_str(), digits.to_lowercase(), "{text:?}");
    }
    for text in ["", "\n", "keys\n", &format!("{digits}\n\n"), &format!(" {digits}"), &digits[1..], "é"] {
        fs::write(&path, text).unwrap();
        let error = read_digest(&path).unwrap_err().to_string();
        assert!(error.contains("initdata.digest: not a digest of init-data"), "{text:?} gave {error}");
    }
    fs::write(&path, digits.repeat(4)).unwrap();
    assert!(read_digest(&path).unwrap_err().to_string().contains("larger than"));
}
