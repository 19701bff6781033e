//! Reads a file of limited size that another may have placed.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

/// The content of a regular file of at most `limit` bytes. Follows no symbolic link at its name, and waits for no other end of a pipe.
///
/// # Errors
/// If it can't be read, is longer, or is no regular file.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(|error| {
        // The kernel's text for it would be "too many levels of symbolic links".
        if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) { not_regular() } else { error }
    })?;
    if !file.metadata()?.is_file() {
        return Err(not_regular());
    }
    let mut content = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut content)?;
    if content.len() > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("it is longer than {limit} bytes")));
    }
    Ok(content)
}

fn not_regular() -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, "it is no regular file")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_a_regular_file_within_the_limit_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        assert_eq!(read(&path("file"), 5).unwrap(), b"12345");
        assert_eq!(read(&path("file"), 4).unwrap_err().to_string(), "it is longer than 4 bytes");
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        for other in [path("link"), path("pipe"), directory.path().to_owned()] {
            assert_eq!(
                read(&other, 5).unwrap_err().to_string(),
                "it is no regular file",
                "{}",
                other.display()
            );
        }
        assert_eq!(read(&path("none"), 5).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
