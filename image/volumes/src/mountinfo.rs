//! The mounts of this process's mount namespace (proc_pid_mountinfo(5)). They are the only state of this program: a
//! restart loses nothing.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::roots::Roots;

/// A device number, "major:minor" in sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Number of the driver.
    pub major: u64,
    /// Number of the device among the driver's.
    pub minor: u64,
}

impl DeviceNumber {
    /// Reads "major:minor".
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device of its file system; of no block device, an anonymous number.
    pub device: DeviceNumber,
    /// Which directory of the file system is mounted: `/` but for bind mounts.
    pub root: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// The list can't be read, or a line of it is not as documented (InvalidData).
pub fn read(roots: &Roots) -> io::Result<Vec<Mount>> {
    let text = std::fs::read(&roots.mountinfo)?;
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "a line of mountinfo is not as documented");
    lines.map(|line| parse(line).ok_or_else(bad)).collect()
}

/// The mount that is on top at this path.
#[must_use]
pub fn at<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rfind(|mount| mount.at == path)
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let device = DeviceNumber::parse(std::str::from_utf8(fields.next()?).ok()?)?;
    let (root, at) = (unescape(fields.next()?), unescape(fields.next()?));
    Some(Mount { device, root, at })
}

/// Reads the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let escaped = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = after.get(if escaped.is_some() { 3 } else { 0 }..).unwrap_or_default();
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_gives_device_root_and_place() {
        let line = b"36 35 98:0 /sub /mnt\\040a\\134b rw,noatime master:1 - ext3 /dev/root rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, DeviceNumber { major: 98, minor: 0 });
        assert_eq!((mount.root, mount.at), ("/sub".into(), "/mnt a\\b".into()));
        assert_eq!(unescape(b"\\9\\04"), PathBuf::from("\\9\\04"));
        assert!(parse(b"36 35 98 / /").is_none());
    }

    #[test]
    fn the_mounts_of_this_process_are_read() {
        let mounts = read(&Roots::system()).unwrap();
        assert!(at(&mounts, Path::new("/")).is_some());
    }

    proptest! {
        #[test]
        fn no_line_upsets_it(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _: Option<Mount> = parse(&line);
            prop_assert!(unescape(&line).as_os_str().len() <= line.len());
        }
    }
}
