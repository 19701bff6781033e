//! User data as cloud-api-adaptor writes it.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use base64ct::{Base64, Encoding};
use serde_json::Value;

/// The agent's KBS inbound, where the guest's programs find the KBS.
const KBS: &str = "http://127.0.0.1:8080";
/// An outbound that only init-data bring to a test VM.
pub(super) const MEASURED_OUTBOUND: &str = "KUBERNETES_PHASE:MEASURED:127.0.0.1:9";

/// The files of a VM's user data.
#[derive(Clone, Debug)]
pub struct CloudConfig {
    apf: Value,
    init_data: Option<String>,
    scratch: bool,
}

impl CloudConfig {
    /// An apf.json, and init-data with a configuration of each of the guest's programs, and a tunnel.
    #[must_use]
    pub fn new(apf: Value) -> Self {
        let init_data = format!(
            "version = \"0.1.0\"\nalgorithm = \"sha256\"\n\n[data]\n\
             \"aa.toml\" = '''\n[token_configs.kbs]\nurl = \"{KBS}\"\n'''\n\n\
             \"cdh.toml\" = '''\nsocket = \"unix:///run/confidential-containers/cdh.sock\"\ncredentials = []\n\n\
             [kbc]\nname = \"cc_kbc\"\nurl = \"{KBS}\"\n'''\n\n\
             \"secure-comms.toml\" = '''\nsc-outbounds = \"{MEASURED_OUTBOUND}\"\n'''\n"
        );
        Self { apf, init_data: Some(init_data), scratch: false }
    }

    /// An apf.json alone.
    #[must_use]
    pub fn without_init_data(apf: Value) -> Self {
        Self { apf, init_data: None, scratch: false }
    }

    /// Asks for a scratch disk as well.
    #[must_use]
    pub fn with_scratch_disk(self) -> Self {
        Self { scratch: true, ..self }
    }

    /// The TOML of the init-data, if there are some.
    #[must_use]
    pub fn init_data(&self) -> Option<&str> {
        self.init_data.as_deref()
    }

    /// The text of the user data.
    ///
    /// # Errors
    /// If gzip can't be run.
    pub fn text(&self) -> Result<String> {
        let mut files = vec![("apf.json", self.apf.to_string())];
        if let Some(toml) = &self.init_data {
            files.push(("initdata", Base64::encode_string(&gzip(toml.as_bytes())?)));
        }
        let mut text = "#cloud-config\n\nwrite_files:\n".to_owned();
        for (name, content) in files {
            text.push_str(&write_file(&format!("/run/peerpod/{name}"), &content));
        }
        if self.scratch {
            text.push_str("  - path: /run/peerpod/scratch-space.marker\n");
        }
        Ok(text)
    }
}

/// An item of `write_files` with one line of content.
pub(super) fn write_file(path: &str, content: &str) -> String {
    format!("  - path: {path}\n    content: |\n      {content}\n")
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new("gzip");
    command.arg("-nc").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("running gzip")?;
    // Less than a pipe holds.
    child.stdin.take().context("gzip has no input")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "gzip: {}", output.status);
    Ok(output.stdout)
}
