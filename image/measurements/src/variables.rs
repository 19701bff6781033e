//! Secure Boot's variables, from files.

use std::path::Path;
use std::{fs, io};

/// GUID of the global variables: SecureBoot, PK, KEK.
const GLOBAL: Guid = Guid(*b"\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c");
/// GUID of the image security database: db, dbx.
pub const SECURITY_DATABASE: Guid =
    Guid(*b"\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f");
/// What a store of authenticated variables begins with (EDK II's `EFI_AUTHENTICATED_VARIABLE_GUID`).
const STORE: [u8; 16] = *b"\x78\x2c\xf3\xaa\x7b\x94\x9a\x43\xa1\x80\x2e\x14\x4e\xc3\x77\x92";
/// State of a variable that is valid (EDK II's `VAR_ADDED`).
const ADDED: u8 = 0x3f;

/// A GUID as it is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

/// The variables that firmware measures, in its order, by name.
pub const NAMES: [(&str, Guid); 4] =
    [("PK", GLOBAL), ("KEK", GLOBAL), ("db", SECURITY_DATABASE), ("dbx", SECURITY_DATABASE)];

/// The variable that says whether Secure Boot is on.
pub const SECURE_BOOT: (&str, Guid) = ("SecureBoot", GLOBAL);

/// Variables that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum BadVariables {
    /// No such file, or not ours to read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// A file that holds no variables.
    #[error("{0}: neither a directory nor OVMF's variables")]
    NoStore(String),
    /// Keys are missing.
    #[error("{0}: no {1} in it, so Secure Boot can't be on")]
    Missing(String, &'static str),
}

/// Values of [`NAMES`], in its order; empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables(pub [Vec<u8>; 4]);

impl Variables {
    /// Reads the variables of a machine: a directory with the files `PK`, `KEK`, `db` and `dbx` (each a list
    /// of signatures, or as it is in efivarfs: by that name and with four bytes of attributes before), or OVMF's file of variables.
    ///
    /// # Errors
    /// If they can't be read.
    pub fn read(path: &Path) -> Result<Self, BadVariables> {
        if path.is_dir() {
            return Self::from_directory(path);
        }
        Self::from_store(&read(path)?).ok_or_else(|| BadVariables::NoStore(path.display().to_string()))
    }

    /// As [`Variables::read`], of a machine with Secure Boot on.
    ///
    /// # Errors
    /// If they can't be read, or there is no PK, KEK or db.
    pub fn read_with_keys(path: &Path) -> Result<Self, BadVariables> {
        let variables = Self::read(path)?;
        for ((name, _), value) in NAMES.iter().zip(&variables.0).take(3) {
            if value.is_empty() {
                return Err(BadVariables::Missing(path.display().to_string(), name));
            }
        }
        Ok(variables)
    }

    fn from_directory(directory: &Path) -> Result<Self, BadVariables> {
        let mut variables = Self::default();
        for ((name, guid), value) in NAMES.iter().zip(&mut variables.0) {
            let (plain, efivarfs) = (directory.join(name), directory.join(format!("{name}-{guid}")));
            if efivarfs.exists() {
                *value = read(&efivarfs)?.split_off_or_empty(4);
            } else if plain.exists() {
                *value = read(&plain)?;
            }
        }
        Ok(variables)
    }

    /// The variables in a store of EDK II's; nothing if `file` holds none.
    fn from_store(file: &[u8]) -> Option<Self> {
        let start = file.windows(16).position(|window| window == STORE)?;
        // Its GUID, size, format, state and what is reserved: 28 bytes.
        let mut rest = file.get(start + 28..)?;
        let mut variables = Self::default();
        // Each begins with 0x55aa, padded to four bytes.
        while let Some(header) = rest.get(..60).filter(|header| header.starts_with(&[0xaa, 0x55])) {
            let size = |offset: usize| -> Option<usize> {
                let bytes: [u8; 4] = header.get(offset..offset + 4)?.try_into().ok()?;
                usize::try_from(u32::from_le_bytes(bytes)).ok()
            };
            let (name_size, data_size) = (size(36)?, size(40)?);
            let name = rest.get(60..60_usize.checked_add(name_size)?)?;
            let data = rest.get(60 + name_size..(60 + name_size).checked_add(data_size)?)?;
            for ((wanted, guid), value) in NAMES.iter().zip(&mut variables.0) {
                let mut encoded: Vec<u8> = wanted.encode_utf16().flat_map(u16::to_le_bytes).collect();
                encoded.extend_from_slice(&[0, 0]);
                if header.get(2) == Some(&ADDED) && header.get(44..60) == Some(&guid.0) && name == encoded {
                    *value = data.to_vec();
                }
            }
            rest = rest.get((60 + name_size + data_size).next_multiple_of(4)..)?;
        }
        Some(variables)
    }

    /// The value of db.
    pub fn db(&self) -> &[u8] {
        let [_, _, db, _] = &self.0;
        db
    }
}

impl std::fmt::Display for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g, h, i, rest @ ..] = self.0;
        write!(f, "{d:02x}{c:02x}{b:02x}{a:02x}-{g:02x}{e:02x}-{i:02x}{h:02x}-")?;
        for (index, byte) in rest.iter().enumerate() {
            let dash = if index == 2 { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

trait SplitOrEmpty {
    /// What follows the first `count` bytes.
    fn split_off_or_empty(self, count: usize) -> Vec<u8>;
}

impl SplitOrEmpty for Vec<u8> {
    fn split_off_or_empty(mut self, count: usize) -> Vec<u8> {
        if self.len() <= count { Vec::new() } else { self.split_off(count) }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, BadVariables> {
    fs::read(path).map_err(|cause| BadVariables::Read { path: path.display().to_string(), cause })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{ADDED, BadVariables, Guid, NAMES, STORE, Variables};

    fn variable(name: &str, guid: Guid, state: u8, value: &[u8]) -> Vec<u8> {
        let name: Vec<u8> = format!("{name}\0").encode_utf16().flat_map(u16::to_le_bytes).collect();
        let number = |number: usize| u32::try_from(number).unwrap().to_le_bytes();
        let mut bytes = vec![0xaa, 0x55, state, 0];
        bytes.extend([0; 32]);
        bytes.extend(number(name.len()));
        bytes.extend(number(value.len()));
        bytes.extend(guid.0);
        bytes.extend(name);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0xff);
        bytes
    }

    #[test]
    fn a_store_of_ovmf_has_the_valid_variables() {
        let mut file = vec![0; 72];
        file.extend(STORE);
        file.extend([0; 12]);
        for ((name, guid), value) in NAMES.into_iter().zip(["a", "bc", "def", "ghij"]) {
            // Deleted, and of another vendor.
            file.extend(variable(name, guid, 0x3c, b"old"));
            file.extend(variable(name, Guid([7; 16]), ADDED, b"foreign"));
            file.extend(variable(name, guid, ADDED, value.as_bytes()));
        }
        file.extend([0xff; 64]);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("VARS.fd");
        fs::write(&path, &file).unwrap();
        let values = ["a", "bc", "def", "ghij"].map(|value| value.as_bytes().to_vec());
        assert_eq!(Variables::read(&path).unwrap(), Variables(values));
        // Cut anywhere: an error, or fewer variables.
        for end in 0..file.len() {
            let _cut = Variables::from_store(&file[..end]);
        }
    }

    #[test]
    fn a_directory_has_lists_or_files_of_efivarfs() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("PK"), "pk").unwrap();
        fs::write(at("KEK-8be4df61-93ca-11d2-aa0d-00e098032b8c"), b"\x27\0\0\0kek").unwrap();
        let error = Variables::read_with_keys(directory.path()).unwrap_err();
        assert!(matches!(error, BadVariables::Missing(_, "db")), "{error}");
        fs::write(at("db-d719b2cb-3d3a-4596-a3bc-dad00e67656f"), b"\x27\0\0\0db").unwrap();
        let values = ["pk", "kek", "db", ""].map(|value| value.as_bytes().to_vec());
        assert_eq!(Variables::read_with_keys(directory.path()).unwrap(), Variables(values));
    }
}
