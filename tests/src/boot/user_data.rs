//! The sources of apf.json in a VM.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use base64ct::{Base64, Encoding};
use serde_json::{Value, json};

/// Init-data that sets nothing.
const INIT_DATA: &str = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n\n[data]\n";

/// Source of a machine's apf.json.
#[derive(Clone, Debug)]
pub enum UserData {
    /// A disk labelled `cidata`, as in clouds without a metadata service.
    NoCloud(Value),
    /// The same, with init-data as well.
    NoCloudWithInitData(Value),
    /// A system credential in an SMBIOS string.
    Smbios(Value),
    /// A system credential in qemu's fw_cfg.
    FwCfg(Value),
}

/// Inbounds of a test VM (tests/build-test-vm).
pub(super) const INBOUNDS: &str = "KUBERNETES_PHASE:NODESERVICE:podns:9000";
/// Outbounds of a test VM.
pub(super) const OUTBOUNDS: &str = "KUBERNETES_PHASE:INSPECTOR:/run/inspector/inspector.sock";

/// The apf.json of a test VM: the content of `keys`, and the pod's name. (Its tunnels are flags: tests/build-test-vm.)
///
/// # Errors
/// If `keys` is no object.
pub fn apf_json(keys: &Value) -> Result<Value> {
    let mut apf = keys.as_object().context("apf.json is an object")?.clone();
    for (key, value) in [("pod-name", "boot"), ("pod-namespace", "default")] {
        apf.insert(key.to_owned(), value.into());
    }
    Ok(apf.into())
}

impl UserData {
    /// qemu's arguments for it; the files they need are written to `directory`.
    pub(super) fn arguments(&self, directory: &Path) -> Result<Vec<String>> {
        Ok(match self {
            Self::NoCloud(apf) | Self::NoCloudWithInitData(apf) => {
                let mut files = vec![json!({"path": "/run/peerpod/apf.json", "content": apf.to_string()})];
                if matches!(self, Self::NoCloudWithInitData(_)) {
                    files.push(json!({"path": "/run/peerpod/initdata.toml", "content": INIT_DATA}));
                }
                let seed = seed(&files, directory)?;
                vec![
                    "-drive".to_owned(),
                    format!("if=none,id=seed,format=raw,readonly=on,file={}", seed.display()),
                    "-device".to_owned(),
                    "virtio-blk-pci,drive=seed".to_owned(),
                ]
            }
            Self::Smbios(apf) => {
                let apf = Base64::encode_string(apf.to_string().as_bytes());
                vec![
                    "-smbios".to_owned(),
                    format!("type=11,value=io.systemd.credential.binary:apf.json={apf}"),
                ]
            }
            Self::FwCfg(apf) => {
                let file = directory.join("apf-credential.json");
                std::fs::write(&file, apf.to_string()).context("writing the credential")?;
                vec![
                    "-fw_cfg".to_owned(),
                    format!("name=opt/io.systemd.credentials/apf.json,file={}", file.display()),
                ]
            }
        })
    }
}

/// The disk of a NoCloud seed.
fn seed(files: &[Value], directory: &Path) -> Result<std::path::PathBuf> {
    let user_data = format!("#cloud-config\n{}\n", json!({ "write_files": files }));
    for (name, content) in [("user-data", user_data.as_str()), ("meta-data", "instance-id: boot\n")] {
        std::fs::write(directory.join(name), content).context("writing the seed's files")?;
    }
    let image = directory.join("seed.iso");
    let mut command = Command::new("genisoimage");
    command.args(["-quiet", "-volid", "cidata", "-joliet", "-rock", "-output"]).arg(&image);
    command.args(["user-data", "meta-data"]).current_dir(directory);
    let output = command.output().context("running genisoimage: is it installed?")?;
    if !output.status.success() {
        bail!("genisoimage: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(image)
}
