//! The sources of apf.json in a VM.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use base64ct::{Base64, Encoding};
use serde_json::Value;

use super::cloud_config::{CloudConfig, MEASURED_OUTBOUND};
use super::{Artifacts, Bus};
use crate::harness::scene::Scene;

/// What the metadata service answers, in the machine's directory.
pub(super) const METADATA_FILE: &str = "metadata-user-data";

/// Source of a machine's apf.json.
#[derive(Clone, Debug)]
pub enum UserData {
    /// A disk labelled `cidata`, as in clouds without a metadata service.
    NoCloud(CloudConfig),
    /// The metadata service of AWS; [`Machine::set_user_data`](super::Machine::set_user_data) changes what it says.
    Aws(CloudConfig),
    /// The same of Azure, which also has a wire server.
    Azure(CloudConfig),
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
    /// Makes the adaptor of the scene expect the VM's init-data, and what they say.
    ///
    /// # Errors
    /// If their file can't be written.
    pub fn announce(&self, scene: &mut Scene) -> Result<()> {
        let (Self::NoCloud(config) | Self::Aws(config) | Self::Azure(config)) = self else { return Ok(()) };
        let Some(toml) = config.init_data() else { return Ok(()) };
        let file = scene.path("init-data.toml");
        std::fs::write(&file, toml).context("writing the init-data")?;
        scene.init_data = Some(file);
        scene.agent_outbounds = format!("{OUTBOUNDS},{MEASURED_OUTBOUND}");
        Ok(())
    }

    /// What qemu's user network has beyond a forwarded port, each with a comma before it.
    pub(super) fn network(&self, directory: &Path, artifacts: &Artifacts) -> Result<String> {
        // qemu takes only addresses of its own network, so the machine gets one of those too.
        let (cloud, net, addresses): (_, _, &[&str]) = match self {
            Self::Aws(_) => ("aws", "169.254.0.0/16", &["169.254.169.254"]),
            Self::Azure(_) => ("azure", "168.0.0.0/7", &["169.254.169.254", "168.63.129.16"]),
            _ => return Ok(String::new()),
        };
        let simulator = artifacts.file("tree/usr/local/bin/simulator")?;
        let (simulator, file) = (simulator.display(), directory.join(METADATA_FILE));
        let command =
            format!("{simulator} metadata --cloud {cloud} --user-data {} --stdio yes", file.display());
        let forwards = addresses.iter().map(|address| format!(",guestfwd=tcp:{address}:80-cmd:{command}"));
        Ok(format!(",net={net}{}", forwards.collect::<String>()))
    }

    /// qemu's arguments for it; the files they need are written to `directory`.
    pub(super) fn arguments(&self, bus: Bus, directory: &Path) -> Result<Vec<String>> {
        Ok(match self {
            Self::NoCloud(config) => {
                let seed = seed(&config.text()?, directory)?;
                vec![
                    "-drive".to_owned(),
                    format!("if=none,id=seed,format=raw,readonly=on,file={}", seed.display()),
                    "-device".to_owned(),
                    bus.seed("seed"),
                ]
            }
            Self::Aws(config) | Self::Azure(config) => {
                std::fs::write(directory.join(METADATA_FILE), config.text()?)
                    .context("writing the user data")?;
                let facts = match self {
                    Self::Aws(_) => "type=1,manufacturer=Amazon EC2",
                    _ => "type=3,asset=7783-7084-3265-9085-8269-3286-77",
                };
                vec!["-smbios".to_owned(), facts.to_owned()]
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
fn seed(user_data: &str, directory: &Path) -> Result<std::path::PathBuf> {
    for (name, content) in [("user-data", user_data), ("meta-data", "instance-id: boot\n")] {
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
