//! User data and init-data for tests.

#[path = "../../tests/common/mod.rs"]
mod common;

use base64ct::{Base64, Encoding};

use crate::files::{FileName, UserData};

/// Init-data with these files, as user data bring them.
pub(super) fn init_data(files: &[(&str, &str)]) -> Vec<u8> {
    let mut toml = String::from("algorithm = \"sha256\"\nversion = \"0.1.0\"\n[data]\n");
    for (name, content) in files {
        toml.push_str(&format!("\"{name}\" = '''\n{content}'''\n"));
    }
    Base64::encode_string(&common::gzip(toml.as_bytes(), 6)).into_bytes()
}

/// User data with these files and, unless `None`, init-data.
pub(super) fn user_data(files: &[(FileName, &str)], init_data_files: Option<&[(&str, &str)]>) -> UserData {
    let mut files: Vec<_> = files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect();
    files.extend(init_data_files.map(|files| (FileName::InitData, init_data(files))));
    UserData { files, skipped: Vec::new() }
}
