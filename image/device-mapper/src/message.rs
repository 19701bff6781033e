//! The device mapper's messages: `struct dm_ioctl` and `struct dm_target_spec` of <linux/dm-ioctl.h>, as bytes.

use std::io;

use zeroize::{Zeroize, Zeroizing};

use crate::Target;

/// Bytes of `struct dm_ioctl`.
pub(crate) const HEADER: usize = 312;
/// Bytes of a name, with its zero.
pub(crate) const NAME: usize = 128;
/// Bytes of `struct dm_target_spec`.
const TARGET: usize = 40;
/// Size of a message: the header, one target and its table or status.
const SIZE: usize = 4096;
/// `DM_READONLY_FLAG`.
const READ_ONLY: u32 = 1;
/// `DM_STATUS_TABLE_FLAG`.
const STATUS_TABLE: u32 = 1 << 4;
/// `DM_BUFFER_FULL_FLAG`: the answer did not fit.
const BUFFER_FULL: u32 = 1 << 8;
/// `DM_SECURE_DATA_FLAG`.
const SECURE_DATA: u32 = 1 << 15;
/// `DM_DEFERRED_REMOVE`.
const DEFERRED_REMOVE: u32 = 1 << 17;

/// Command to the device mapper.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Command {
    /// Makes a device without a table.
    Create,
    /// Removes a device.
    Remove,
    /// Makes the loaded table the live one (the suspend flag is not set).
    Resume,
    /// Loads a table for the device.
    LoadTable,
    /// Reads the status or the table of the targets of the live table.
    Status,
}

impl Command {
    /// Number of the ioctl.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Create => 3,
            Self::Remove => 4,
            Self::Resume => 6,
            Self::LoadTable => 9,
            Self::Status => 12,
        }
    }
}

/// What a message asks for besides its command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    /// The device is read-only.
    pub(crate) read_only: bool,
    /// A status is the table.
    pub(crate) table: bool,
    /// The kernel clears its copy of the message.
    pub(crate) secret: bool,
    /// A device in use is removed later.
    pub(crate) deferred: bool,
}

impl Flags {
    fn bits(self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(self.read_only, READ_ONLY)
            | bit(self.table, STATUS_TABLE)
            | bit(self.secret, SECURE_DATA)
            | bit(self.deferred, DEFERRED_REMOVE)
    }
}

/// A message; after the call, its answer. Cleared on drop.
pub(crate) struct Message([u8; SIZE]);

impl Drop for Message {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Message {
    /// Makes a message about the device of this name.
    pub(crate) fn new(device: &str, flags: Flags) -> io::Result<Self> {
        if device.is_empty() || device.len() >= NAME || device.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "bad name of a device"));
        }
        let mut message = Self([0; SIZE]);
        for (at, word) in [(0, 4), (12, SIZE as u32), (16, HEADER as u32), (28, flags.bits())] {
            message.put(at, &word.to_ne_bytes());
        }
        message.put(48, device.as_bytes());
        Ok(message)
    }

    /// Adds the target. In place: a moved message would leave a copy of a secret behind.
    pub(crate) fn add_target(&mut self, target: &Target<'_>) -> io::Result<()> {
        if TARGET + HEADER + target.table.len() >= SIZE || target.kind.len() >= 16 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the table is too long"));
        }
        self.put(20, &1u32.to_ne_bytes());
        self.put(HEADER + 8, &target.sectors.to_ne_bytes());
        self.put(HEADER + 20, &((SIZE - HEADER) as u32).to_ne_bytes());
        self.put(HEADER + 24, target.kind.as_bytes());
        self.put(HEADER + TARGET, target.table.as_bytes());
        Ok(())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, byte) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *byte;
        }
    }

    fn word(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        for (to, byte) in word.iter_mut().zip(self.0.iter().skip(at)) {
            *to = *byte;
        }
        u32::from_ne_bytes(word)
    }

    /// The text at an offset, up to its zero.
    fn text(&self, at: usize) -> Option<Zeroizing<String>> {
        let bytes = self.0.get(at..)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        // Copied once the text is known to be one: a failed conversion would leave a copy behind.
        let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
        Some(Zeroizing::new(text.to_owned()))
    }

    /// All bytes of the message; their number is the header's data_size.
    pub(crate) fn as_mut_bytes(&mut self) -> &mut [u8; SIZE] {
        &mut self.0
    }

    /// Minor number of the device in the answer (`huge_encode_dev` of the kernel).
    pub(crate) fn minor(&self) -> u32 {
        let device = self.word(40);
        device & 0xff | device >> 12 & 0xf_ff00
    }

    /// First byte of the first target's status.
    pub(crate) fn status(&self) -> Option<u8> {
        self.0.get(self.start()? + TARGET).copied()
    }

    /// Type and arguments of the only target; none if there are several or the answer is cut.
    pub(crate) fn table(&self) -> Option<(String, Zeroizing<String>)> {
        if self.word(20) != 1 || self.word(28) & BUFFER_FULL != 0 {
            return None;
        }
        let start = self.start()?;
        let mut kind = self.text(start.checked_add(24)?)?;
        let table = self.text(start.checked_add(TARGET)?)?;
        let (name, _) = (kind.as_str().to_owned(), kind.zeroize());
        Some((name, table))
    }

    /// Offset of the first target in an answer.
    fn start(&self) -> Option<usize> {
        usize::try_from(self.word(16)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::{Flags, HEADER, Message};
    use crate::Target;

    fn target(table: &str) -> Target<'_> {
        Target { kind: "verity", sectors: 80, table, read_only: true, secret: false }
    }

    fn root(flags: Flags) -> Message {
        Message::new("root", flags).unwrap()
    }

    fn with_table(flags: Flags) -> Message {
        let mut message = root(flags);
        message.add_target(&target("1 2 3")).unwrap();
        message
    }

    #[test]
    fn a_table_is_at_the_offset_that_the_kernel_reads() {
        let flags = Flags { read_only: true, ..Flags::default() };
        let mut message = with_table(flags);
        let bytes = message.as_mut_bytes();
        assert_eq!(bytes[..4], 4u32.to_ne_bytes());
        assert_eq!(bytes[12..24], [4096u32.to_ne_bytes(), 312u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat());
        assert_eq!(bytes[28..32], 1u32.to_ne_bytes());
        assert_eq!(&bytes[48..53], b"root\0");
        assert_eq!(bytes[320..328], 80u64.to_ne_bytes());
        assert_eq!(&bytes[336..343], b"verity\0");
        assert_eq!(&bytes[352..358], b"1 2 3\0");
    }

    #[test]
    fn each_flag_has_the_kernels_bit() {
        let bits = |flags: Flags| root(flags).word(28);
        assert_eq!(bits(Flags::default()), 0);
        assert_eq!(bits(Flags { table: true, ..Flags::default() }), 0x10);
        assert_eq!(bits(Flags { secret: true, ..Flags::default() }), 0x8000);
        assert_eq!(bits(Flags { deferred: true, ..Flags::default() }), 0x2_0000);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(root(Flags::default()).add_target(&target(&"x".repeat(4000))).is_err());
        let long = Target { kind: "sixteen-bytes-xx", ..target("") };
        assert!(root(Flags::default()).add_target(&long).is_err());
        for name in ["", "a\0b", &"n".repeat(128)] {
            assert!(Message::new(name, Flags::default()).is_err(), "{name}");
        }
        assert!(Message::new(&"n".repeat(127), Flags::default()).is_ok());
    }

    #[test]
    fn a_minor_number_has_two_parts() {
        let mut message = root(Flags::default());
        message.put(40, &(0x0010_fd02_u32).to_ne_bytes());
        assert_eq!(message.minor(), 0x102);
    }

    #[test]
    fn an_answer_names_its_target_and_arguments() {
        let mut message = with_table(Flags::default());
        let (kind, table) = message.table().unwrap();
        assert_eq!((kind.as_str(), table.as_str()), ("verity", "1 2 3"));
        message.put(28, &0x100u32.to_ne_bytes());
        assert!(message.table().is_none(), "a cut answer");
        message.put(28, &[0; 4]);
        message.put(20, &2u32.to_ne_bytes());
        assert!(message.table().is_none(), "two targets");
        message.put(20, &1u32.to_ne_bytes());
        message.put(16, &u32::MAX.to_ne_bytes());
        assert!(message.table().is_none() && message.status().is_none(), "an offset beyond the answer");
        assert_eq!(HEADER, 312);
    }
}
