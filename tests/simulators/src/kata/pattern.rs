//! Pseudo-random bytes that are known at each position: a byte that is lost, doubled, moved or changed is detected.

use std::fmt;

/// Fills `out` with the bytes of the pattern of `seed` from `offset` on.
pub fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    let mut index = offset / 8;
    // `offset` may be in the middle of the first word.
    let skip = usize::try_from(offset % 8).unwrap_or_default();
    let (head, body) = out.split_at_mut(((8 - skip) % 8).min(out.len()));
    if skip > 0 {
        copy(word(seed, index).to_le_bytes().get(skip..).unwrap_or_default(), head);
        index += 1;
    }
    for chunk in body.chunks_mut(8) {
        copy(&word(seed, index).to_le_bytes(), chunk);
        index += 1;
    }
}

fn copy(from: &[u8], to: &mut [u8]) {
    // `from` is as long as `to`, or longer at the end of the slice.
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// The word at `index`: splitmix64, which does not need the previous word.
fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The first wrong byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Position in the stream.
    pub offset: u64,
    /// Expected byte.
    pub expected: u8,
    /// Actual byte.
    pub found: u8,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} is {:#04x} instead of {:#04x}", self.offset, self.found, self.expected)
    }
}

impl std::error::Error for Mismatch {}

/// Checks a stream against the pattern of a seed, piece by piece.
#[derive(Debug)]
pub struct Checker {
    seed: u64,
    offset: u64,
    expected: Vec<u8>,
}

impl Checker {
    /// A checker at the start of the pattern.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, offset: 0, expected: Vec::new() }
    }

    /// Checks the next bytes.
    ///
    /// # Errors
    /// With the first wrong byte.
    pub fn check(&mut self, found: &[u8]) -> Result<(), Mismatch> {
        self.expected.resize(found.len(), 0);
        fill(self.seed, self.offset, &mut self.expected);
        if self.expected != found {
            let mut pairs = (self.offset..).zip(self.expected.iter().zip(found));
            if let Some((offset, (&expected, &found))) =
                pairs.find(|(_, (expected, found))| expected != found)
            {
                return Err(Mismatch { offset, expected, found });
            }
        }
        self.offset += found.len() as u64;
        Ok(())
    }

    /// Bytes checked so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// A 64-bit checksum that depends on each byte and its position. It detects accidents, not attacks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum {
    state: u64,
    /// The bytes of an incomplete word, first byte lowest.
    partial: u64,
    length: u64,
}

impl Checksum {
    /// Adds bytes; how a stream is cut into pieces makes no difference.
    pub fn update(&mut self, bytes: &[u8]) {
        let fill = usize::try_from((8 - self.length % 8) % 8).unwrap_or_default();
        let (head, body) = bytes.split_at(fill.min(bytes.len()));
        head.iter().for_each(|byte| self.push(*byte));
        let mut words = body.chunks_exact(8);
        for word in &mut words {
            self.state =
                mix(self.state, word.iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte)));
            self.length += 8;
        }
        words.remainder().iter().for_each(|byte| self.push(*byte));
    }

    fn push(&mut self, byte: u8) {
        self.partial |= u64::from(byte) << (8 * (self.length % 8));
        self.length += 1;
        if self.length.is_multiple_of(8) {
            self.state = mix(self.state, std::mem::take(&mut self.partial));
        }
    }

    /// Number of bytes added.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Checksum of all bytes so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        mix(mix(self.state, self.partial), self.length)
    }

    /// Checksum of the first `length` bytes of the pattern of `seed`.
    #[must_use]
    pub fn of_pattern(seed: u64, length: u64) -> u64 {
        let mut checksum = Self::default();
        let mut buffer = vec![0; super::BUFFER];
        while checksum.length < length {
            let left = usize::try_from(length - checksum.length).unwrap_or(usize::MAX);
            let size = left.min(buffer.len());
            let Some(piece) = buffer.get_mut(..size) else { break };
            fill(seed, checksum.length, piece);
            checksum.update(piece);
        }
        checksum.value()
    }
}

fn mix(state: u64, word: u64) -> u64 {
    (state.rotate_left(23) ^ word).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
        let mut out = vec![0; length];
        fill(seed, offset, &mut out);
        out
    }

    #[test]
    fn any_piece_of_the_pattern_is_the_same_bytes() {
        let whole = pattern(7, 0, 64);
        for start in 0..32 {
            for length in 0..32 {
                assert_eq!(pattern(7, start as u64, length), whole[start..start + length]);
            }
        }
    }

    #[test]
    fn the_checker_names_the_first_wrong_byte() {
        let mut bytes = pattern(7, 0, 100);
        bytes[57] ^= 0x10;
        let mut checker = Checker::new(7);
        checker.check(&bytes[..33]).unwrap();
        let wrong = checker.check(&bytes[33..]).unwrap_err();
        assert_eq!((wrong.offset, wrong.expected ^ wrong.found), (57, 0x10));
    }

    #[test]
    fn the_checker_sees_a_lost_and_a_doubled_byte() {
        let mut lost = pattern(7, 0, 100);
        lost.remove(40);
        assert!(Checker::new(7).check(&lost).is_err());
        let mut doubled = pattern(7, 0, 100);
        doubled.insert(40, doubled[40]);
        assert!(Checker::new(7).check(&doubled).is_err());
    }

    #[test]
    fn the_checksum_does_not_depend_on_the_pieces() {
        let bytes = pattern(3, 0, 301);
        for size in 1..40 {
            let mut checksum = Checksum::default();
            bytes.chunks(size).for_each(|piece| checksum.update(piece));
            assert_eq!((checksum.value(), checksum.length()), (Checksum::of_pattern(3, 301), 301));
        }
    }

    #[test]
    fn the_checksum_depends_on_the_length_and_each_byte() {
        assert_ne!(Checksum::of_pattern(3, 300), Checksum::of_pattern(3, 301));
        let mut zeros = Checksum::default();
        zeros.update(&[0; 3]);
        let mut more = Checksum::default();
        more.update(&[0; 4]);
        assert_ne!(zeros.value(), more.value());
    }
}
