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

/// Checks the peer's first packet for the marker.
#[derive(Debug)]
pub(super) struct StrictKex {
    marker: &'static [u8],
    /// Bytes that have arrived; none once the check has passed.
    seen: Option<Vec<u8>>,
}

impl StrictKex {
    pub(super) fn new(peer: Peer) -> Self {
        let marker: &[u8] = match peer {
            Peer::Client => b"kex-strict-c-v00@openssh.com",
            Peer::Server => b"kex-strict-s-v00@openssh.com",
        };
        Self { marker, seen: Some(Vec::new()) }
    }

    /// Checks bytes that have arrived.
    ///
    /// # Errors
    /// The peer does not offer strict key exchange.
    pub(super) fn feed(&mut self, data: &[u8]) -> io::Result<()> {
        let Some(seen) = &mut self.seen else { return Ok(()) };
        if seen.len() + data.len() > MAX {
            // Too many bytes without a first packet, or a huge first read: only the first bytes count.
            seen.extend_from_slice(data.get(..MAX.saturating_sub(seen.len())).unwrap_or_default());
        } else {
            seen.extend_from_slice(data);
        }
        match offers(seen, self.marker) {
            Some(true) => self.seen = None,
            Some(false) => return Err(refusal(self.marker)),
            None if seen.len() >= MAX => return Err(refusal(self.marker)),
            None => {}
        }
        Ok(())
    }
}

fn refusal(marker: &[u8]) -> io::Error {
    let text = format!(
        "the peer does not offer strict key exchange ({}); use a release with the fix of CVE-2023-48795",
        String::from_utf8_lossy(marker)
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Whether the peer's first packet offers the marker; none until the whole list has arrived.
fn offers(mut seen: &[u8], marker: &[u8]) -> Option<bool> {
    // A server may send other lines before its identification (RFC 4253 4.2). They are not part of the exchange hash. A
    // line that russh could read differently must not pass, or we would check other bytes than its first packet.
    loop {
        let end = seen.iter().position(|&byte| byte == b'\n')?;
        let (line, rest) = seen.split_at(end);
        seen = rest.get(1..)?;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let is_text = !line.is_empty() && line.iter().all(|byte| (b' '..=b'~').contains(byte));
        match line {
            _ if !is_text => return Some(false),
            [b'S', b'S', b'H', b'-', version @ ..] => {
                if !version.starts_with(b"2.0-") && !version.starts_with(b"1.99-") {
                    return Some(false);
                }
                break;
            }
            _ => {}
        }
    }
    // uint32 length, byte padding, byte message, 16 bytes cookie, then the name-list with its own length.
    let message = *seen.get(5)?;
    if message != KEXINIT {
        return Some(false);
    }
    let length: [u8; 4] = seen.get(22..26)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let names = seen.get(26..)?;
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
