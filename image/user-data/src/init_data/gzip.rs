//! gzip (RFC 1952): members, one after the other, and nothing else.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::error::InitDataError;

/// Bits of a header's flags (RFC 1952 2.3.1).
const HAS_HEADER_CRC: u8 = 1 << 1;
const HAS_EXTRA: u8 = 1 << 2;
const HAS_NAME: u8 = 1 << 3;
const HAS_COMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0b1110_0000;
/// The longest name or comment of a header, in bytes, with the zero at its end: Go's reader takes no longer one, and a text that only
/// one of two readers takes is none.
const TEXT_MAX: usize = 512;
/// The first buffer for a member, in bytes; it doubles until all fits.
const BUFFER_FIRST: usize = 4096;

/// Inflates all members into at most `max` bytes.
pub(super) fn inflate(bytes: &[u8], max: usize) -> Result<Vec<u8>, InitDataError> {
    let mut input = Input(bytes);
    let mut output = Vec::new();
    let mut state = Box::<DecompressorOxide>::default();
    loop {
        header(&mut input)?;
        state.init();
        let member = member(&mut input, &mut state, max.saturating_sub(output.len()))?;
        let crc = u32::from_le_bytes(input.array()?);
        let length = u32::from_le_bytes(input.array()?);
        if crc != crc32(&member) || usize::try_from(length) != Ok(member.len()) {
            return Err(InitDataError::Checksum);
        }
        output.extend_from_slice(&member);
        if input.0.is_empty() {
            return Ok(output);
        }
    }
}

/// What is left to read.
struct Input<'i>(&'i [u8]);

impl<'i> Input<'i> {
    fn take(&mut self, length: usize) -> Result<&'i [u8], InitDataError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(InitDataError::CutGzip)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], InitDataError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(InitDataError::CutGzip)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn skip_text(&mut self) -> Result<(), InitDataError> {
        for _ in 0..TEXT_MAX {
            if self.array()? == [0] {
                return Ok(());
            }
        }
        Err(InitDataError::Gzip)
    }
}

/// Reads the header of a member; none of its fields is used.
fn header(input: &mut Input<'_>) -> Result<(), InitDataError> {
    let whole = input.0;
    let [0x1f, 0x8b, 8, flags] = input.array()? else { return Err(InitDataError::Gzip) };
    if flags & RESERVED != 0 {
        return Err(InitDataError::Gzip);
    }
    // The time, the extra flags and the system.
    input.take(6)?;
    if flags & HAS_EXTRA != 0 {
        let length = u16::from_le_bytes(input.array()?);
        input.take(length.into())?;
    }
    if flags & HAS_NAME != 0 {
        input.skip_text()?;
    }
    if flags & HAS_COMMENT != 0 {
        input.skip_text()?;
    }
    if flags & HAS_HEADER_CRC != 0 {
        let before = whole.get(..whole.len() - input.0.len()).unwrap_or_default();
        let [low, high, ..] = crc32(before).to_le_bytes();
        if input.array()? != [low, high] {
            return Err(InitDataError::Checksum);
        }
    }
    Ok(())
}

/// Inflates the compressed bytes of a member.
fn member(
    input: &mut Input<'_>,
    state: &mut DecompressorOxide,
    max: usize,
) -> Result<Vec<u8>, InitDataError> {
    // One more than allowed: a full buffer does not show whether anything follows.
    let most = max.saturating_add(1);
    let mut buffer = vec![0; BUFFER_FIRST.min(most)];
    let mut length = 0;
    loop {
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, taken, written) = decompress(state, input.0, &mut buffer, length, flags);
        input.take(taken)?;
        length += written;
        if length > max {
            return Err(InitDataError::TooLarge);
        }
        match status {
            TINFLStatus::Done => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            TINFLStatus::HasMoreOutput => buffer.resize((2 * buffer.len()).min(most), 0),
            TINFLStatus::FailedCannotMakeProgress | TINFLStatus::NeedsMoreInput => {
                return Err(InitDataError::CutGzip);
            }
            _ => return Err(InitDataError::Damaged),
        }
    }
}

/// CRC-32 as of RFC 1952 section 8.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        let entry = usize::try_from(index).ok().and_then(|index| CRC_TABLE.get(index));
        (crc >> 8) ^ entry.copied().unwrap_or_default()
    })
}

/// The remainder of each byte.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0_u32;
    let mut rest: &mut [u32] = &mut table;
    while let Some((entry, after)) = rest.split_first_mut() {
        let mut crc = byte;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        *entry = crc;
        byte += 1;
        rest = after;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32_has_its_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
