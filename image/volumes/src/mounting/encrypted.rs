//! Encrypted volumes: the data hub opens and mounts them, and what it did is checked.

use std::collections::BTreeMap;

use super::{Patience, Stop, Volumes, content, is_absent};
use crate::block::Device;
use crate::cdh::{self, SecureMount};
use crate::discover;
use crate::failure::VolumeError;
use crate::log;
use crate::mountinfo;
use crate::mounts;
use crate::signature::Signature;
use crate::volume::Volume;

/// What `blkid` calls a disk that is encrypted with LUKS.
const LUKS: &str = "crypto_LUKS";

impl Volumes {
    /// Has the data hub open and mount the disk.
    pub(super) fn mount_encrypted(
        &self,
        volume: &Volume,
        key: &str,
        disk: &Device,
        patience: &dyn Patience,
    ) -> Result<(), Stop> {
        let (signature, _held) = self.look(disk, patience)?;
        let source = match signature {
            Signature::Nothing if disk.is_read_only(&self.roots) => {
                return Err(VolumeError::EmptyReadOnly(disk.node.clone()).into());
            }
            Signature::Nothing => "empty",
            Signature::Of(kind) if kind == LUKS => "encrypted",
            Signature::Of(kind) => return Err(content(disk, &kind, "LUKS").into()),
            Signature::PartitionTable => return Err(content(disk, "a partition table", "LUKS").into()),
        };
        let at = volume.name.mount_point();
        mounts::make_directory(&at).map_err(|cause| VolumeError::Mount { at: at.clone(), cause })?;
        let request = secure_mount_request(volume, key, disk, source);
        cdh::secure_mount(&self.settings.data_hub, &request).map_err(|error| {
            self.remove_mapping_left_behind(volume);
            error.into()
        })
    }

    /// Checks what the data hub has done: that the volume's mount is there, over this disk, and that the kernel encrypts.
    pub(super) fn check_encrypted(
        &self,
        volume: &Volume,
        disk: &Device,
        read_only: bool,
    ) -> Result<(), Stop> {
        let at = volume.name.mount_point();
        let mounts = mountinfo::read(&self.roots).map_err(VolumeError::Search)?;
        if !discover::is_mounted(&self.roots, volume, &mounts, disk) {
            let why = format!(
                "{} has no mount of {} over {} here: its unit must share the VM's mounts",
                at.display(),
                volume.name.mapping(),
                disk.node.display()
            );
            return Err(VolumeError::NotAsAsked(why).into());
        }
        let table = self.mappings.table(&volume.name.mapping());
        let why = match table {
            Ok((kind, table)) if kind == "crypt" && is_real_cipher(&table) => None,
            Ok((kind, table)) => {
                let cipher = table.split(' ').next().unwrap_or_default();
                Some(format!(
                    "the mapping {} is {kind} {cipher}, which protects nothing",
                    volume.name.mapping()
                ))
            }
            Err(error) => Some(format!("the mapping {} can't be checked: {error}", volume.name.mapping())),
        };
        if let Some(why) = why {
            let closed = mounts::detach(&at, self.settings.busy);
            self.remove_mapping_left_behind(volume);
            closed.map_err(|cause| VolumeError::Mount { at, cause })?;
            return Err(VolumeError::NotAsAsked(why).into());
        }
        mounts::restrict(&at, read_only).map_err(|cause| VolumeError::Mount { at, cause }.into())
    }

    /// Removes the mapping of a volume that is not mounted, so that the next attempt can make it.
    fn remove_mapping_left_behind(&self, volume: &Volume) {
        let mapping = volume.name.mapping();
        match self.mappings.remove(&mapping, true) {
            Ok(()) => {
                log::line(format_args!("volume {}: closed {mapping}, which was left behind", volume.name))
            }
            // None was made, or there is no device mapper to make one.
            Err(error) if is_absent(&error) => {}
            Err(error) => log::line(format_args!("volume {}: closing {mapping}: {error}", volume.name)),
        }
    }
}

/// Whether a table of dm-crypt encrypts: LUKS2 allows a header, which is the disk's word, to ask for the null cipher.
fn is_real_cipher(table: &str) -> bool {
    let cipher = table.split(' ').next().unwrap_or_default();
    let known = cipher.starts_with("aes-xts-") || cipher.starts_with("capi:") && cipher.contains("xts(aes)");
    known && !cipher.contains("null")
}

fn secure_mount_request(volume: &Volume, key: &str, disk: &Device, source: &str) -> SecureMount {
    let options = [
        ("devicePath", disk.node.to_string_lossy().into_owned()),
        ("sourceType", source.to_owned()),
        ("targetType", "fileSystem".to_owned()),
        ("encryptionType", "luks2".to_owned()),
        ("filesystemType", volume.fs.name().to_owned()),
        ("key", format!("kbs:///{key}")),
        ("mapperName", volume.name.mapping()),
    ];
    SecureMount {
        volume_type: "block-device".to_owned(),
        options: options
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect::<BTreeMap<_, _>>(),
        flags: Vec::new(),
        mount_point: volume.name.mount_point().to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::is_real_cipher;

    #[test]
    fn the_null_cipher_is_no_encryption() {
        for table in [
            "aes-xts-plain64 :64:logon:cryptsetup:u-d0 0 254:16 32768",
            "capi:authenc(hmac(sha256),xts(aes))-random k 0",
        ] {
            assert!(is_real_cipher(table), "{table}");
        }
        for table in [
            "",
            "cipher_null-ecb - 0 254:16 0",
            "null 0",
            "capi:ecb(cipher_null)-null k",
            "aes-ecb k",
            "aes-xts-null k",
        ] {
            assert!(!is_real_cipher(table), "{table}");
        }
    }
}
