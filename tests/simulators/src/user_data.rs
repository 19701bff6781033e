//! Simulates `process-user-data`: finds apf.json where a cloud puts it, and writes it where the agent looks for it.
//!
//! For tests only: in a confidential VM, data from the host must be measured before they are used.

mod credential;
mod no_cloud;

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Directory of the pod VM's daemon configuration.
pub const DIRECTORY: &str = "/run/peerpod";
/// The one file that a credential can hold.
const APF: &str = "apf.json";
/// Limit of user data in bytes, above that of the known clouds.
const LIMIT: u64 = 1024 * 1024;

/// A file for [`DIRECTORY`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct File {
    name: String,
    content: Vec<u8>,
}

/// Reads SMBIOS, fw_cfg and a NoCloud seed, in this order. Writes the content of the first that
///  exists, and returns which it was; `None` if none exists.
///
/// # Errors
/// If one of them exists and can't be read, or the file can't be written.
pub fn process() -> Result<Option<String>> {
    let found = match credential::find()? {
        Some((place, content)) => Some((place, vec![File { name: APF.to_owned(), content }])),
        None => no_cloud::find()?,
    };
    let Some((place, files)) = found else { return Ok(None) };
    for file in files {
        write(Path::new(DIRECTORY), &file).with_context(|| format!("user data of {place}"))?;
    }
    Ok(Some(place))
}

/// Atomically, and readable by root only.
fn write(directory: &Path, file: &File) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making {}", directory.display()));
        }
        _ => {}
    }
    let (path, temporary) = (directory.join(&file.name), directory.join(format!(".{}", file.name)));
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    written
        .and_then(|mut written| written.write_all(&file.content))
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("writing {}", path.display()))
}

/// Reads a file of at most [`LIMIT`] bytes; `None` if it does not exist.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    use std::io::Read;
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("opening {}", path.display()))?,
    };
    let mut content = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut content).with_context(|| format!("reading {}", path.display()))?;
    if content.len() as u64 > LIMIT {
        bail!("{} is longer than {LIMIT} bytes", path.display());
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_is_private_and_replaced_atomically() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("peerpod");
        for content in ["first, and longer", "second"] {
            write(&directory, &File { name: "apf.json".into(), content: content.into() }).unwrap();
            assert_eq!(fs::read_to_string(directory.join("apf.json")).unwrap(), content);
        }
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(directory.join("apf.json")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }
}
