//! Makes gzip for tests.

use miniz_oxide::deflate::compress_to_vec;

/// A gzip member without optional fields.
pub(crate) fn gzip(text: &[u8], level: u8) -> Vec<u8> {
    let mut member = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    member.extend(compress_to_vec(text, level));
    member.extend(crc32(text).to_le_bytes());
    member.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    member
}

/// CRC-32, bit by bit: not the code that is tested.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}
