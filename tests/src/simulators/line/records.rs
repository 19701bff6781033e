//! The boundaries of SSH packets in what passes.

/// Finds where records end in one direction of a connection: the identification line, packets in clear up to `NEWKEYS`, then
/// packets of AES-GCM (RFC 4253 4.2, 6; RFC 5647 7.3).
#[derive(Debug, Default)]
pub(super) struct Records {
    phase: Phase,
    /// The first bytes of the packet that is passing.
    header: Vec<u8>,
    /// Bytes of it that are to come, once its header is complete.
    left: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Identification,
    Clear,
    Sealed,
}

/// Bytes of a packet's length.
const LENGTH: usize = 4;
/// Position of the message's type in a packet in clear, after the length of the padding.
const KIND: usize = 5;
const NEWKEYS: u8 = 21;
/// Bytes of the tag after a sealed packet.
const TAG: usize = 16;

impl Records {
    /// How many of these bytes belong to the record that is passing, and whether it ends with them.
    pub(super) fn take(&mut self, bytes: &[u8]) -> (usize, bool) {
        if self.phase == Phase::Identification {
            let Some(end) = bytes.iter().position(|&byte| byte == b'\n') else { return (bytes.len(), false) };
            self.phase = Phase::Clear;
            return (end + 1, true);
        }
        let wanted = if self.phase == Phase::Clear { KIND + 1 } else { LENGTH };
        let mut taken = 0;
        if self.header.len() < wanted {
            taken = (wanted - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(bytes.get(..taken).unwrap_or_default());
            if self.header.len() < wanted {
                return (taken, false);
            }
            let total = LENGTH + self.length() + if self.phase == Phase::Sealed { TAG } else { 0 };
            self.left = total.saturating_sub(wanted);
        }
        let body = self.left.min(bytes.len() - taken);
        self.left -= body;
        if self.left > 0 {
            return (taken + body, false);
        }
        if self.phase == Phase::Clear && self.header.get(KIND) == Some(&NEWKEYS) {
            self.phase = Phase::Sealed;
        }
        self.header.clear();
        (taken + body, true)
    }

    fn length(&self) -> usize {
        let length = self.header.first_chunk().map_or(0, |length| u32::from_be_bytes(*length));
        usize::try_from(length).unwrap_or(usize::MAX - LENGTH - TAG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_end_where_they_do_however_the_bytes_are_cut() {
        let clear = |kind: u8| [&[0, 0, 0, 12, 10, kind][..], &[0; 10]].concat();
        let sealed = [&[0, 0, 0, 32][..], &[7; 32 + TAG]].concat();
        let records = [b"SSH-2.0-x\r\n".to_vec(), clear(20), clear(NEWKEYS), sealed.clone(), sealed];
        let all = records.concat();
        let ends: Vec<usize> = records
            .iter()
            .scan(0, |end, record| {
                *end += record.len();
                Some(*end)
            })
            .collect();
        for size in 1..all.len() {
            let (mut found, mut at, mut parser) = (Vec::new(), 0, Records::default());
            for mut piece in all.chunks(size) {
                while !piece.is_empty() {
                    let (taken, ends) = parser.take(piece);
                    at += taken;
                    piece = &piece[taken..];
                    if ends {
                        found.push(at);
                    }
                }
            }
            assert_eq!(found, ends, "pieces of {size} bytes");
        }
    }
}
