//! Which sandboxes live: those on whose `agent.ttrpc` cloud-api-adaptor listens.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use secure_comms_protocol::PodId;

/// The unix sockets of our network namespace, in which cloud-api-adaptor is as well (hostNetwork).
const SOCKETS: &str = "/proc/net/unix";

/// The socket in a sandbox's directory.
const AGENT_SOCKET: &str = "/agent.ttrpc";

/// A limit for what is read, in bytes: some 500,000 sockets.
const READ_MAX: u64 = 64 * 1024 * 1024;

/// The sandboxes of the pods directory that live.
///
/// A socket is listed by the path that its process bound. So the directory must have the same path for cloud-api-adaptor and
/// for us, or a path that leads to the same place by symbolic links.
pub(super) fn living(pods_directory: &Path) -> io::Result<HashSet<PodId>> {
    let mut prefixes = vec![pods_directory.to_owned()];
    // A directory that is not there has no sandboxes.
    prefixes.extend(pods_directory.canonicalize().ok().filter(|real| real != pods_directory));
    living_in(BufReader::new(File::open(SOCKETS)?.take(READ_MAX)), &prefixes)
}

fn living_in(mut sockets: impl io::BufRead, prefixes: &[PathBuf]) -> io::Result<HashSet<PodId>> {
    let mut living = HashSet::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if sockets.read_until(b'\n', &mut line)? == 0 {
            return Ok(living);
        }
        // Paths are any bytes; those of sandboxes are text.
        let Ok(line) = std::str::from_utf8(&line) else { continue };
        living.extend(listener(line.trim_end_matches('\n')).and_then(|path| sandbox(path, prefixes)));
    }
}

/// The path of a stream socket that listens (`__SO_ACCEPTCON`, unconnected).
/// Columns: Num RefCount Protocol Flags Type St Inode Path.
fn listener(line: &str) -> Option<&str> {
    let (_number, mut rest) = line.split_once(": ")?;
    let mut columns = [""; 6];
    for column in &mut columns {
        (*column, rest) = rest.trim_start().split_once(' ')?;
    }
    let [_count, _protocol, flags, kind, state, _inode] = columns;
    (flags == "00010000" && kind == "0001" && state == "01").then_some(rest)
}

fn sandbox(path: &str, prefixes: &[PathBuf]) -> Option<PodId> {
    let directory = path.strip_suffix(AGENT_SOCKET)?;
    let (parent, id) = directory.rsplit_once('/')?;
    prefixes.iter().any(|prefix| prefix == Path::new(parent)).then(|| id.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_in_the_directory_live() {
        let sockets = "\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01    17 /run/peerpod/pods/one/agent.ttrpc
0000000000000000: 00000002 00000000 00010000 0001 01 212381 /run/peerpod/pods/two/agent.ttrpc
0000000000000000: 00000003 00000000 00000000 0001 03 212382 /run/peerpod/pods/connected/agent.ttrpc
0000000000000000: 00000002 00000000 00000000 0002 01 212383 /run/peerpod/pods/datagram/agent.ttrpc
0000000000000000: 00000002 00000000 00010000 0001 01 212384 /run/peerpod/pods/other/other.sock
0000000000000000: 00000002 00000000 00010000 0001 01 212385 /run/secure-comms/pods/ours/agent.ttrpc
0000000000000000: 00000002 00000000 00010000 0001 01 212386 @/run/peerpod/pods/abstract/agent.ttrpc
0000000000000000: 00000002 00000000 00010000 0001 01 212387
0000000000000000: 00000002 00000000 00010000 0001 01 212388 /run/peerpod/pods/a b/agent.ttrpc
0000000000000000: 00000002 00000000 00010000 0001 01 212389 /run/peerpod/pods/x/y/agent.ttrpc
odd
";
        let mut bytes = sockets.as_bytes().to_vec();
        bytes.extend(b"0: 00000002 00000000 00010000 0001 01 1 /run/\xff\n");
        let living = living_in(bytes.as_slice(), &["/run/peerpod/pods".into()]).unwrap();
        assert_eq!(living, ["one", "two"].map(|id| id.parse().unwrap()).into());
    }
}
