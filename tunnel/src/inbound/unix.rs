//! The unix socket of an inbound: ours alone, in a directory where no other user can put another in its place.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;
use tokio::net::{UnixListener, UnixSocket, UnixStream};

/// Clients of a unix socket that may wait to be accepted; std uses the same number for TCP.
const BACKLOG: u32 = 128;
/// Modes of the socket: for this user, and for all.
const PRIVATE: u32 = 0o600;
const OPEN: u32 = 0o666;
/// Write access of group and others, and the sticky bit, which keeps others from removing what is not theirs.
const WRITABLE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// A listening unix socket that no other user can replace. Its path is removed when it is dropped.
#[derive(Debug)]
pub struct PrivateListener {
    /// Dropped in this order. While the listener exists, no other process takes the path for a stale socket; otherwise
    /// we could remove the new socket of another process.
    unlink: UnlinkOnDrop,
    listener: UnixListener,
}

impl PrivateListener {
    /// Listens at `path`, for this user only. Replaces the socket of a process of this user that was killed, and no other
    /// file.
    ///
    /// # Errors
    /// The path is in use, or others could replace the socket.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        bind(path, PRIVATE).await
    }

    /// The same for every user who can reach the path: the server decides by the peer's credentials whom it serves.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn bind_for_all(path: &Path) -> io::Result<Self> {
        let bound = bind(path, OPEN).await?;
        // The umask took a part of the mode. No other user can have replaced the socket.
        fs::set_permissions(&bound.unlink.path, fs::Permissions::from_mode(OPEN))?;
        Ok(bound)
    }

    /// Accepts a client.
    ///
    /// # Errors
    /// Those of `accept(2)`.
    ///
    /// # Cancellation
    /// Dropping the future loses no client.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

/// Removes the path of a unix socket, if it is still that socket.
#[derive(Debug)]
struct UnlinkOnDrop {
    path: PathBuf,
    identity: Identity,
}

impl Drop for UnlinkOnDrop {
    fn drop(&mut self) {
        match fs::symlink_metadata(&self.path) {
            Ok(file) if Identity::of(&file) == self.identity => {
                if let Err(error) = fs::remove_file(&self.path) {
                    log::debug!("removing {}: {error}", self.path.display());
                }
            }
            Ok(_) => log::warn!("{}: left alone, it is not our socket any more", self.path.display()),
            Err(error) => log::debug!("removing {}: {error}", self.path.display()),
        }
    }
}

/// Device and inode: what a path is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    fn of(file: &Metadata) -> Self {
        Self(file.dev(), file.ino())
    }
}

async fn bind(path: &Path, mode: u32) -> io::Result<PrivateListener> {
    // From here on without links: one of another user could lead elsewhere after the check.
    let path = match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) => unshared(directory)?.join(name),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let socket = match bound(&path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let Some(stale) = stale(&path).await else { return Err(error) };
            // Another process of this user may have replaced it since.
            if Identity::of(&fs::symlink_metadata(&path)?) == stale {
                fs::remove_file(&path)?;
            }
            bound(&path, mode)?
        }
        bound => bound?,
    };
    let identity = Identity::of(&fs::symlink_metadata(&path)?);
    let unlink = UnlinkOnDrop { path, identity };
    Ok(PrivateListener { unlink, listener: socket.listen(BACKLOG)? })
}

/// A socket at `path` that does not listen yet. It is made with its mode, and at no time another user can connect.
fn bound(path: &Path, mode: u32) -> io::Result<UnixSocket> {
    let socket = UnixSocket::new_stream()?;
    // Linux takes the mode of the path from the socket.
    fchmod(&socket, Mode::from_bits_truncate(mode))?;
    socket.bind(path)?;
    Ok(socket)
}

/// Checks that no other user can replace what is in `directory`; returns its canonical path.
fn unshared(directory: &Path) -> io::Result<PathBuf> {
    let canonical = fs::canonicalize(directory)?;
    for above in canonical.ancestors() {
        let found = fs::symlink_metadata(above)?;
        let is_trusted = found.uid() == 0 || found.uid() == geteuid().as_raw();
        if !is_trusted || found.mode() & WRITABLE != 0 && found.mode() & STICKY == 0 {
            let mode = found.mode() & 0o7777;
            return Err(io::Error::other(format!(
                "another user could put a socket in its place: the directory {} has mode {mode:04o} and owner {}; choose a \
                 directory that only this user may write to, such as one below /run",
                above.display(),
                found.uid()
            )));
        }
    }
    Ok(canonical)
}

/// The identity of `path`, if it is the socket of a process of this user that was killed. No other file may be removed.
async fn stale(path: &Path) -> Option<Identity> {
    let file = fs::symlink_metadata(path).ok()?;
    let is_ours = file.file_type().is_socket() && file.uid() == geteuid().as_raw();
    // Any other error (a full backlog, no permission) means that a process listens.
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    (is_ours && UnixStream::connect(path).await.is_err_and(refused)).then(|| Identity::of(&file))
}
