//! The system credential `apf.json`, from its sources: for a VM without systemd. The image's systemd takes none.

use std::path::Path;

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding};

use super::read_if_there;

const DMI_ENTRIES: &str = "/sys/firmware/dmi/entries";
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/io.systemd.credentials/apf.json/raw";
/// systemd.system-credentials(7): prefix of a credential in an SMBIOS string of type 11.
const SMBIOS_PREFIX: &str = "io.systemd.credential.binary:apf.json=";

/// Source of the credential, and its content.
pub(super) fn find() -> Result<Option<(String, Vec<u8>)>> {
    if let Some(content) = smbios()? {
        return Ok(Some(("SMBIOS credential".to_owned(), content)));
    }
    Ok(read_if_there(Path::new(FW_CFG))?.map(|content| ("fw_cfg credential".to_owned(), content)))
}

fn smbios() -> Result<Option<Vec<u8>>> {
    // Without dmi-sysfs the directory does not exist, and neither does the credential.
    let Ok(entries) = std::fs::read_dir(DMI_ENTRIES) else { return Ok(None) };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("11-")) {
        let raw = read_if_there(&entry.path().join("raw"))?.unwrap_or_default();
        if let Some(text) = strings(&raw).find_map(|text| text.strip_prefix(SMBIOS_PREFIX)) {
            return Base64::decode_vec(text).map(Some).context("SMBIOS credential apf.json: base64");
        }
    }
    Ok(None)
}

/// The strings of an SMBIOS structure follow its formatted part, whose length is its second byte; each ends with NUL.
fn strings(raw: &[u8]) -> impl Iterator<Item = &str> {
    let length = usize::from(raw.get(1).copied().unwrap_or_default());
    let strings = raw.get(length..).unwrap_or_default().split(|byte| *byte == 0);
    strings.filter_map(|text| std::str::from_utf8(text).ok()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::strings;

    #[test]
    fn the_strings_come_after_the_formatted_part() {
        let raw = [&[11, 5, 0, 0, 2][..], b"one=1\0two\0\0"].concat();
        assert_eq!(strings(&raw).collect::<Vec<_>>(), ["one=1", "two"]);
        assert_eq!(strings(&[]).count(), 0);
        assert_eq!(strings(&[11, 200]).count(), 0);
    }
}
