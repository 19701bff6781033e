//! Requires strict key exchange (OpenSSH PROTOCOL 1.10, the fix of CVE-2023-48795), which russh only prefers.
//!
//! The peer's first packet is sent in the clear and is part of the exchange hash, so inspecting it on arrival is
//! enough: it must be a KEXINIT whose first name-list (RFC 4253 7.1) has the peer's strict marker.

use std::io;

/// Role of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The peer connected to us.
    Client,
    /// We connected to the peer.
    Server,
}

/// Limit of the peer's identification and first packet, in bytes; ours take about 1 KiB.
const MAX: usize = 64 * 1024;
/// Message number of KEXINIT (RFC 4253 12).
const KEXINIT: u8 = 20;

/// Most bytes that are quoted of what a peer said that does not speak SSH.
const QUOTE: usize = 80;

/// Checks the peer's first packet for the marker.
#[derive(Debug)]
pub(super) struct StrictKex {
    peer: Peer,
    /// Bytes that have arrived; none once the check has passed.
    seen: Option<Vec<u8>>,
}

/// What the bytes that have arrived are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// The first packet has not arrived, and nothing is wrong so far.
    Incomplete {
        /// Whether the identification line has arrived.
        identified: bool,
    },
    /// Not SSH.
    Foreign,
    /// SSH of another version than 2.
    OldVersion,
    /// A first packet without the marker, or another one than KEXINIT.
    Unmarked,
    /// A first packet with the marker.
    Marked,
}

impl StrictKex {
    pub(super) fn new(peer: Peer) -> Self {
        Self { peer, seen: Some(Vec::new()) }
    }

    /// Checks bytes that have arrived.
    ///
    /// # Errors
    /// The peer does not speak SSH, or does not offer strict key exchange.
    pub(super) fn feed(&mut self, data: &[u8]) -> io::Result<()> {
        let Some(seen) = &mut self.seen else { return Ok(()) };
        if seen.len() + data.len() > MAX {
            // Too many bytes without a first packet, or a huge first read: only the first bytes count.
            seen.extend_from_slice(data.get(..MAX.saturating_sub(seen.len())).unwrap_or_default());
        } else {
            seen.extend_from_slice(data);
        }
        let text = match first_packet(seen, self.peer.marker()) {
            First::Marked => {
                self.seen = None;
                return Ok(());
            }
            First::Incomplete { .. } if seen.len() < MAX => return Ok(()),
            First::Incomplete { identified: true } | First::Unmarked => unmarked(self.peer.marker()),
            First::Incomplete { identified: false } | First::Foreign => foreign(self.peer, seen),
            First::OldVersion => old_version(self.peer, seen),
        };
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }

    /// Whether the first packet has passed.
    pub(super) fn is_done(&self) -> bool {
        self.seen.is_none()
    }

    /// Whether the identification of SSH 2 has arrived.
    pub(super) fn identified(&self) -> bool {
        self.seen.as_ref().is_none_or(|seen| {
            matches!(
                first_packet(seen, self.peer.marker()),
                First::Incomplete { identified: true } | First::Unmarked | First::Marked
            )
        })
    }

    /// What is wrong with a server that has said something, but not that it speaks SSH.
    pub(super) fn complaint(&self) -> Option<String> {
        let seen = self.seen.as_ref().filter(|seen| !seen.is_empty() && self.peer == Peer::Server)?;
        match first_packet(seen, self.peer.marker()) {
            // The beginning of an identification.
            First::Incomplete { identified: false } if seen.starts_with(b"SSH-") => None,
            First::Incomplete { identified: false } | First::Foreign => Some(foreign(self.peer, seen)),
            First::OldVersion => Some(old_version(self.peer, seen)),
            _ => None,
        }
    }
}

impl Peer {
    fn marker(self) -> &'static [u8] {
        match self {
            Self::Client => b"kex-strict-c-v00@openssh.com",
            Self::Server => b"kex-strict-s-v00@openssh.com",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

fn unmarked(marker: &[u8]) -> String {
    format!(
        "the peer does not offer strict key exchange ({}); use a release with the fix of CVE-2023-48795",
        String::from_utf8_lossy(marker)
    )
}

fn foreign(peer: Peer, seen: &[u8]) -> String {
    // The first bytes of a TLS record (RFC 8446 5.1): an alert or a handshake message, of SSL 3 or later.
    if matches!(seen, [0x15 | 0x16, 0x03, ..]) {
        return format!("this is not an SSH {} (it speaks TLS)", peer.name());
    }
    format!("this is not an SSH {} (it said '{}')", peer.name(), first_line(seen))
}

fn old_version(peer: Peer, seen: &[u8]) -> String {
    let line = seen.split(|&byte| byte == b'\n').find(|line| line.starts_with(b"SSH-")).unwrap_or(seen);
    format!("this SSH {} does not speak version 2 (it said '{}'): update it", peer.name(), first_line(line))
}

/// The first line, escaped and cut.
fn first_line(seen: &[u8]) -> String {
    let line = seen.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let cut = line.get(..QUOTE).unwrap_or(line);
    let more = if cut.len() < line.len() { "..." } else { "" };
    format!("{}{more}", cut.escape_ascii())
}

/// What the first bytes of the peer are. A list of algorithms is looked at once all of it has arrived.
fn first_packet(mut seen: &[u8], marker: &[u8]) -> First {
    // A server may send other lines before its identification (RFC 4253 4.2). They are not part of the exchange hash. A
    // line that russh could read differently must not pass, or we would check other bytes than its first packet.
    loop {
        let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
            return First::Incomplete { identified: false };
        };
        let (line, rest) = seen.split_at(end);
        seen = rest.get(1..).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let is_text = !line.is_empty() && line.iter().all(|byte| (b' '..=b'~').contains(byte));
        match line {
            _ if !is_text => return First::Foreign,
            [b'S', b'S', b'H', b'-', version @ ..] => {
                if !version.starts_with(b"2.0-") && !version.starts_with(b"1.99-") {
                    return First::OldVersion;
                }
                break;
            }
            _ => {}
        }
    }
    match offers(seen, marker) {
        Some(true) => First::Marked,
        Some(false) => First::Unmarked,
        None => First::Incomplete { identified: true },
    }
}

/// Whether the first packet offers the marker; none until the whole list has arrived.
fn offers(packet: &[u8], marker: &[u8]) -> Option<bool> {
    // uint32 length, byte padding, byte message, 16 bytes cookie, then the name-list with its own length.
    let message = *packet.get(5)?;
    if message != KEXINIT {
        return Some(false);
    }
    let length: [u8; 4] = packet.get(22..26)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let names = packet.get(26..)?;
    let names = names.get(..length)?;
    Some(names.split(|&byte| byte == b',').any(|name| name == marker))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(names: &str) -> Vec<u8> {
        let mut bytes = b"SSH-2.0-Test\r\n".to_vec();
        bytes.extend_from_slice(&[0, 0, 1, 0, 4, KEXINIT]);
        bytes.extend_from_slice(&[7; 16]);
        bytes.extend_from_slice(&(names.len() as u32).to_be_bytes());
        bytes.extend_from_slice(names.as_bytes());
        bytes
    }

    fn feed(bytes: &[u8], chunk: usize) -> io::Result<bool> {
        let mut strict = StrictKex::new(Peer::Client);
        for part in bytes.chunks(chunk) {
            strict.feed(part)?;
        }
        Ok(strict.seen.is_none())
    }

    #[test]
    fn a_peer_with_strict_kex_passes_in_chunks_of_any_size() {
        let bytes = hello("curve25519-sha256,kex-strict-c-v00@openssh.com");
        for chunk in [1, 2, 7, bytes.len()] {
            assert!(feed(&bytes, chunk).unwrap(), "{chunk}");
        }
    }

    #[test]
    fn a_peer_without_strict_kex_is_refused_with_advice() {
        for names in
            ["curve25519-sha256", "kex-strict-s-v00@openssh.com", "xkex-strict-c-v00@openssh.com", ""]
        {
            let error = feed(&hello(names), 9).unwrap_err();
            assert!(error.to_string().contains("CVE-2023-48795"), "{error}");
        }
    }

    #[test]
    fn an_ambiguous_line_before_the_identification_is_refused() {
        let fake = hello("kex-strict-c-v00@openssh.com").split_off(14);
        for line in
            ["SSH-1.0-x", "SSH-", "SSH-2.0", "SSH-1.99x", "", "\r", "SSH-2.0-\u{e9}", "a\u{0}b", "a\rb", "\t"]
        {
            let bytes =
                [line.as_bytes(), b"\n", &fake, b"\nSSH-2.0-x\r\n", &hello("curve25519-sha256")[14..]]
                    .concat();
            for chunk in [1, bytes.len()] {
                assert!(feed(&bytes, chunk).is_err(), "{line:?}");
            }
        }
        let bytes =
            [b"Welcome.\r\nto (this) machine\n", hello("kex-strict-c-v00@openssh.com").as_slice()].concat();
        assert!(feed(&bytes, 5).unwrap());
    }

    #[test]
    fn a_peer_that_is_not_ssh_is_named_as_such() {
        let said = |bytes: &[u8]| {
            let mut strict = StrictKex::new(Peer::Server);
            let error = strict.feed(bytes).err().map(|error| error.to_string());
            assert!(
                error.as_ref().is_none_or(|error| Some(error) == strict.complaint().as_ref()),
                "{error:?}"
            );
            strict.complaint()
        };
        let long = [b"x".repeat(MAX).as_slice(), b"\n"].concat();
        let cases: [(&[u8], &str); 9] = [
            (
                b"HTTP/1.1 400 Bad Request\r\nA: b\r\n\r\n<html>",
                "server (it said 'HTTP/1.1 400 Bad Request')",
            ),
            (b"220 mail ESMTP\r\n500 unrecognized\r\n", "server (it said '220 mail ESMTP')"),
            (b"\x15\x03\x03\x00\x02\x02\x28", "server (it speaks TLS)"),
            (b"\x16\x03\x01\n", "server (it speaks TLS)"),
            (b"\x05\xff", "server (it said '\\x05\\xff')"),
            (b"\r\n", "server (it said '')"),
            ("\u{202e}\u{2028}\n".as_bytes(), "server (it said '\\xe2\\x80\\xae\\xe2\\x80\\xa8')"),
            (b"a\x1b[2Jb\n", "server (it said 'a\\x1b[2Jb')"),
            (&long, "..."),
        ];
        for (bytes, expected) in cases {
            let text = said(bytes).unwrap();
            assert!(text.starts_with("this is not an SSH server (it ") && text.contains(expected), "{text}");
            assert!(text.len() < 4 * QUOTE + 60, "{} bytes", text.len());
        }
        let old = said(b"SSH-1.5-OpenSSH_2\r\n").unwrap();
        assert_eq!(old, "this SSH server does not speak version 2 (it said 'SSH-1.5-OpenSSH_2'): update it");
        for ssh in [b"".as_slice(), b"SSH-2.0-x", b"SSH-2.0-x\r\n", b"Welcome\r\nSSH-2.0-x\r\n"] {
            assert_eq!(said(ssh), None, "{}", ssh.escape_ascii());
        }
        let mut client = StrictKex::new(Peer::Client);
        let text = client.feed(b"GET / HTTP/1.1\r\n\r\n").unwrap_err().to_string();
        assert_eq!(text, "this is not an SSH client (it said 'GET / HTTP/1.1')");
    }

    #[test]
    fn a_first_packet_other_than_kexinit_is_refused() {
        let mut bytes = hello("kex-strict-c-v00@openssh.com");
        bytes[14 + 5] = 2;
        assert!(feed(&bytes, 64).is_err());
    }

    #[test]
    fn a_peer_that_never_sends_kexinit_is_refused() {
        assert!(feed(&vec![b'x'; 2 * MAX], 1000).is_err());
    }
}
