//! Properties of what is read in the pods directory of cloud-api-adaptor, for any file there.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::SystemTime;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use rustls_pki_types::DnsName;
use secure_comms_protocol::PodId;
use serde_json::Value;

use super::apf::{name_in, parse};
use super::files::{Content, NAMES, Place, Root, SIZE_MAX};
use crate::caa::sandbox::Sandbox;

/// The longest error: its reason, and what an escape and the note of a cut add.
const ERROR_MAX: usize = 2 * 360;
/// A part of a private key that is as long as this is not quoted.
const SECRET_MIN: usize = 12;

/// The first byte decides what stands there, and under which name; the second one where the text is cut.
pub(crate) fn exercise(data: &[u8]) {
    let Some((&[arrangement, cut], text)) = data.split_first_chunk::<2>() else { return };
    let directory = tempfile::tempdir().unwrap();
    let id: PodId = "sandbox".parse().unwrap();
    let place = directory.path().join(id.as_str());
    fs::create_dir(&place).unwrap();
    let name = NAMES[usize::from(arrangement & 1)];
    let is_read = arrange(&place.join(name), arrangement >> 1, text, directory.path());
    let root = Root::open(directory.path()).unwrap();
    assert_eq!(root.ids().unwrap(), (vec![id.clone()], false), "the other entries are no sandboxes");
    assert!(matches!(root.look(&id).unwrap(), Place::File(_)));
    match root.read(&id).unwrap() {
        Content::Nothing => panic!("a file is there"),
        Content::Refused(_, reason) => {
            assert!(!is_read, "a file of ours is refused: {reason}");
            assert!(reason.starts_with(name) && is_line(&reason), "{reason:?}");
        }
        Content::Text(_, read, content) => {
            assert!(is_read, "it is not to be read");
            assert_eq!((read, content.as_slice()), (name, text));
        }
    }
    check_text(text, cut, &id);
}

/// Puts the text, or something else, in the place of the file. Whether it may be read.
fn arrange(file: &Path, kind: u8, text: &[u8], outside: &Path) -> bool {
    let kind = kind % 8;
    let write = |mode| {
        fs::write(file, text).unwrap();
        fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
    };
    match kind {
        0 => mkfifo(file, Mode::from_bits_truncate(0o600)).unwrap(),
        1 => fs::create_dir(file).unwrap(),
        2 => {
            // Not the name of a sandbox.
            let target = outside.join("not a sandbox");
            fs::write(&target, text).unwrap();
            symlink(target, file).unwrap();
        }
        3 => write(0o664),
        4 => {
            let options = OpenOptions::new().write(true).create_new(true).mode(0o600).clone();
            let sparse: File = options.open(file).unwrap();
            sparse.set_len(SIZE_MAX + 1).unwrap();
        }
        _ => write(0o644),
    }
    kind > 4
}

fn check_text(text: &[u8], cut: u8, id: &PodId) {
    let parsed = parse(text, id.clone(), SystemTime::UNIX_EPOCH);
    match &parsed {
        Err(error) => {
            let said = error.to_string();
            assert!(is_line(&said), "{said:?}");
            check_secret(text, &said);
        }
        Ok(sandbox) => {
            check_sandbox(text, sandbox);
            // A file that is half written never counts.
            let end = text.iter().rposition(|byte| *byte == b'}').unwrap();
            let half = &text[..end * usize::from(cut) / 256];
            assert!(parse(half, id.clone(), SystemTime::UNIX_EPOCH).is_err(), "half of a file counts");
        }
    }
    let name = name_in(text);
    assert!(name.as_deref().is_none_or(is_server_name), "{name:?}");
    if let Ok(Sandbox { tls: Some(tls), .. }) = parsed {
        assert_eq!(name, Some(tls.server_name.clone()), "a left-over sandbox would have another name");
    }
}

fn is_line(text: &str) -> bool {
    !text.chars().any(char::is_control) && text.len() <= ERROR_MAX
}

fn is_server_name(name: &str) -> bool {
    DnsName::try_from(name).is_ok() && name == name.to_ascii_lowercase()
}

/// No error quotes a private key.
fn check_secret(text: &[u8], said: &str) {
    let Ok(Value::Object(object)) = serde_json::from_slice(text) else { return };
    let Some(Value::String(key)) = object.get("tls-server-key") else { return };
    let own_words =
        |part: &str| ["tls-server", "tls-client-ca", "certificate"].iter().any(|word| part.contains(word));
    for part in key.split_whitespace().filter(|part| part.len() >= SECRET_MIN && !own_words(part)) {
        let others = object.iter().filter(|(name, _)| *name != "tls-server-key");
        let elsewhere =
            others.map(|(name, value)| format!("{name} {value}")).any(|other| other.contains(part));
        assert!(elsewhere || !said.contains(part), "an error quotes the private key: {said}");
    }
}

/// The same as another reader of JSON finds.
fn check_sandbox(text: &[u8], sandbox: &Sandbox) {
    assert_ne!(sandbox.vxlan_id, Some(0));
    assert!(sandbox.pod_ip.is_none_or(|ip| ip == ip.to_canonical()));
    assert!(sandbox.tls.as_ref().is_none_or(|tls| is_server_name(&tls.server_name)));
    // Another reader also refuses what is in keys that are not read.
    let Ok(value) = serde_json::from_slice::<Value>(text) else { return };
    let said = |key: &str| value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let keys = ["tls-server-key", "tls-server-cert", "tls-client-ca"];
    assert_eq!(sandbox.tls.is_some(), keys.iter().all(|key| said(key).is_some()));
    assert_eq!(sandbox.tls.is_none(), keys.iter().all(|key| said(key).is_none()));
    if let Some(name) = &sandbox.name {
        assert_eq!((said("pod-namespace"), said("pod-name")), (Some(name.namespace()), Some(name.name())));
    }
    let network = value.get("pod-network");
    let vni = network.and_then(|network| network.get("vxlan-id")).and_then(Value::as_u64);
    assert_eq!(sandbox.vxlan_id.map(u64::from), vni.filter(|vni| *vni != 0));
    if let Some(ip) = sandbox.pod_ip {
        let prefix = network.and_then(|network| network.get("podip")).and_then(Value::as_str).unwrap();
        let address: std::net::IpAddr = prefix.split('/').next().unwrap().parse().unwrap();
        assert_eq!(ip, address.to_canonical());
    }
}
