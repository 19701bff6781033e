//! What a hostile host hands to the systemd of a VM: system credentials that add units, change units, write files.

use std::path::Path;

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding};

/// What the host's programs print on the console, each followed by a name.
pub const HOST_RAN: &str = "THE-HOST-RAN: ";

/// The credentials of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostCredentials {
    /// None.
    #[default]
    None,
    /// By SMBIOS and by qemu's fw_cfg, in every form that runs a program.
    Hostile,
}

/// A unit that prints a line on the console, and pulls no other unit in.
fn unit(name: &str) -> String {
    format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\n{}",
        printing("ExecStart", name)
    )
}

fn printing(command: &str, name: &str) -> String {
    format!("StandardOutput=tty\nTTYPath=/dev/ttyS0\n{command}=+/usr/bin/echo {HOST_RAN}{name}\n")
}

/// The credentials: the name of each, and its content.
fn by_smbios() -> [(&'static str, String); 6] {
    let agent = format!("[Service]\n{}", printing("ExecStartPre", "agent-drop-in"));
    [
        // systemd-debug-generator(8)
        ("systemd.extra-unit.host-smbios.service", unit("smbios")),
        ("systemd.unit-dropin.sysinit.target", "[Unit]\nWants=host-smbios.service h.service\n".to_owned()),
        ("systemd.unit-dropin.agent-protocol-forwarder.service", agent),
        // systemd-tmpfiles(8), systemd-sysctl(8)
        ("tmpfiles.extra", format!("w /dev/ttyS0 - - - - {HOST_RAN}tmpfiles\\n\n")),
        ("sysctl.extra", "kernel.sysrq=511\n".to_owned()),
        // systemd-sysusers(8): an account with an empty password.
        ("passwd.hashed-password.root", String::new()),
    ]
}

/// By fw_cfg, whose names have 55 characters at most.
fn by_fw_cfg() -> [(&'static str, String); 1] {
    [("systemd.extra-unit.h.service", unit("fw-cfg"))]
}

impl HostCredentials {
    /// Names of the programs that run where the credentials are taken.
    pub const PROGRAMS: [&'static str; 3] = ["smbios", "fw-cfg", "tmpfiles"];

    /// qemu's arguments for them; the files they need are written to `directory`.
    pub(super) fn arguments(self, directory: &Path) -> Result<Vec<String>> {
        let mut arguments = Vec::new();
        if self == Self::None {
            return Ok(arguments);
        }
        for (name, content) in by_smbios() {
            let content = Base64::encode_string(content.as_bytes());
            arguments.push("-smbios".to_owned());
            arguments.push(format!("type=11,value=io.systemd.credential.binary:{name}={content}"));
        }
        for (name, content) in by_fw_cfg() {
            let file = directory.join(name);
            std::fs::write(&file, content).context("writing a credential")?;
            arguments.push("-fw_cfg".to_owned());
            arguments.push(format!("name=opt/io.systemd.credentials/{name},file={}", file.display()));
        }
        Ok(arguments)
    }
}
