//! The device mapper's messages: `struct dm_ioctl` and `struct dm_target_spec` of <linux/dm-ioctl.h>, as bytes.

/// Bytes of `struct dm_ioctl`.
pub(super) const HEADER: usize = 312;
/// Bytes of `struct dm_target_spec`.
const TARGET: usize = 40;
/// Size of a message: the header, one target and its table or status.
const SIZE: usize = 4096;
/// `DM_READONLY_FLAG`.
const READ_ONLY: u32 = 1;

/// Command to the device mapper.
#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    /// Makes a device without a table.
    Create,
    /// Makes the loaded table the live one (the suspend flag is not set).
    Resume,
    /// Loads a table for the device.
    LoadTable,
    /// Reads the status of the targets of the live table.
    Status,
}

impl Command {
    /// Number of the ioctl.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Create => 3,
            Self::Resume => 6,
            Self::LoadTable => 9,
            Self::Status => 12,
        }
    }
}

/// A message; after the call, its answer.
pub(super) struct Message([u8; SIZE]);

impl Message {
    /// Makes a message about the read-only device of this name.
    pub(super) fn new(device: &str) -> Self {
        let mut message = Self([0; SIZE]);
        for (at, word) in [(0, 4), (12, SIZE as u32), (16, HEADER as u32), (28, READ_ONLY)] {
            message.put(at, &word.to_ne_bytes());
        }
        // The field has 128 bytes, and ends with a zero.
        message.put(48, device.as_bytes().get(..127).unwrap_or(device.as_bytes()));
        message
    }

    /// Adds one target of this type over `sectors` sectors; none if the table is too long.
    pub(super) fn with_target(mut self, target_type: &str, sectors: u64, table: &str) -> Option<Self> {
        if TARGET + HEADER + table.len() >= SIZE || target_type.len() >= 16 {
            return None;
        }
        self.put(20, &1u32.to_ne_bytes());
        self.put(HEADER + 8, &sectors.to_ne_bytes());
        self.put(HEADER + 20, &((SIZE - HEADER) as u32).to_ne_bytes());
        self.put(HEADER + 24, target_type.as_bytes());
        self.put(HEADER + TARGET, table.as_bytes());
        Some(self)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, byte) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *byte;
        }
    }

    /// All bytes of the message; their number is the header's data_size.
    pub(super) fn as_mut_bytes(&mut self) -> &mut [u8; SIZE] {
        &mut self.0
    }

    /// Minor number of the device in the answer (`huge_encode_dev` of the kernel).
    pub(super) fn minor(&self) -> u32 {
        let mut device = [0; 4];
        for (to, byte) in device.iter_mut().zip(self.0.iter().skip(40)) {
            *to = *byte;
        }
        let device = u32::from_ne_bytes(device);
        device & 0xff | device >> 12 & 0xf_ff00
    }

    /// First byte of the first target's status.
    pub(super) fn status(&self) -> Option<u8> {
        let mut start = [0; 4];
        for (to, byte) in start.iter_mut().zip(self.0.iter().skip(16)) {
            *to = *byte;
        }
        let start = usize::try_from(u32::from_ne_bytes(start)).ok()?;
        self.0.get(start + TARGET).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::Message;

    #[test]
    fn a_table_is_at_the_offset_that_the_kernel_reads() {
        let mut message = Message::new("root").with_target("verity", 80, "1 2 3").unwrap();
        let bytes = message.as_mut_bytes();
        assert_eq!(bytes[..4], 4u32.to_ne_bytes());
        assert_eq!(bytes[12..24], [4096u32.to_ne_bytes(), 312u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat());
        assert_eq!(&bytes[48..53], b"root\0");
        assert_eq!(bytes[320..328], 80u64.to_ne_bytes());
        assert_eq!(&bytes[336..343], b"verity\0");
        assert_eq!(&bytes[352..358], b"1 2 3\0");
        assert!(Message::new("root").with_target("verity", 80, &"x".repeat(4000)).is_none());
    }

    #[test]
    fn a_minor_number_has_two_parts() {
        let mut message = Message::new("root");
        message.put(40, &(0x0010_fd02_u32).to_ne_bytes());
        assert_eq!(message.minor(), 0x102);
    }
}
