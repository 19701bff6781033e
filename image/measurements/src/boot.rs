//! The events of a UKI's boot.

use crate::cpio;
use crate::event::{Digests, Event};
use crate::pe::{BadPe, Pe};

/// Sections that systemd-stub measures, in its order; `.pcrsig` is not (`UnifiedSection` in systemd's
/// src/fundamental/uki.h).
const MEASURED: [&str; 14] = [
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
    ".profile", ".dtbauto", ".hwids", ".efifw",
];

/// Sections that systemd-stub hands to the kernel as files of a further initrd, in its order.
const EXTRA: [(&str, &str); 4] = [
    (".pcrsig", "tpm2-pcr-signature.json"),
    (".pcrpkey", "tpm2-pcr-public-key.pem"),
    (".osrel", "os-release"),
    (".profile", "profile"),
];

/// A file whose boot can't be predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUki {
    /// No EFI program.
    #[error(transparent)]
    Pe(#[from] BadPe),
    /// An EFI program without a kernel.
    #[error("no kernel in it: is it a UKI?")]
    NoKernel,
    /// A kernel command line that systemd-stub would not take over unchanged.
    #[error("its command line is not UTF-8")]
    CommandLine,
}

/// A UKI: a kernel with its command line and initrd, behind systemd-stub.
#[derive(Clone, Debug)]
pub struct Uki<'a> {
    pe: Pe<'a>,
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The initrd as the kernel gets it from systemd-stub, or empty.
    pub initrd: Vec<u8>,
    /// The initrd as it was packed: what a host hands over that boots the parts directly.
    pub section_initrd: Vec<u8>,
    /// The command line as the kernel gets it.
    pub command_line: String,
}

impl<'a> Uki<'a> {
    /// Takes a file apart.
    ///
    /// # Errors
    /// If it is no UKI.
    pub fn parse(file: &'a [u8]) -> Result<Self, BadUki> {
        let pe = Pe::parse(file)?;
        let kernel = pe.section(".linux")?.ok_or(BadUki::NoKernel)?;
        let command_line = command_line(pe.section(".cmdline")?.unwrap_or_default())?;
        let (initrd, section_initrd) = (initrd(&pe)?, pe.section(".initrd")?.unwrap_or_default());
        Ok(Self { pe, kernel, initrd, section_initrd, command_line })
    }

    /// Digests by which firmware measures the whole file.
    ///
    /// # Errors
    /// If the file ends too early.
    pub fn authenticode(&self) -> Result<Digests, BadUki> {
        Ok(self.pe.authenticode()?)
    }

    /// Its signatures; empty if it is not signed.
    ///
    /// # Errors
    /// If the file ends too early.
    pub fn signatures(&self) -> Result<&'a [u8], BadUki> {
        Ok(self.pe.signatures()?)
    }

    /// What the firmware measures of it, into PCR 4, if its boot option is the first that the firmware tries.
    ///
    /// Without Secure Boot the firmware is asked to load the inner kernel, and measures it. With Secure Boot systemd-stub
    /// takes the place of the firmware's check for that moment, and that check is what measures.
    ///
    /// # Errors
    /// If the file ends too early.
    pub fn loaded(&self, secure_boot: bool) -> Result<Vec<Event>, BadUki> {
        let mut events = vec![
            Event::new(4, "the firmware starts a boot option", b"Calling EFI Application from Boot Option"),
            Event::separator(4),
            Event { pcr: 4, what: "the UKI".to_owned(), digests: self.authenticode()? },
        ];
        if !secure_boot {
            let digests = Pe::parse(&self.kernel)?.authenticode()?;
            events.push(Event { pcr: 4, what: "the kernel".to_owned(), digests });
        }
        Ok(events)
    }

    /// What is measured of its parts, in the order of the measurements: by systemd-stub (PCR 11), and by the kernel's EFI stub
    /// (PCR 9). Nothing extends PCR 12.
    ///
    /// # Errors
    /// If the file ends too early.
    pub fn parts(&self) -> Result<Vec<Event>, BadUki> {
        let mut events = Vec::new();
        for name in MEASURED {
            let Some(content) = self.pe.section(name)? else { continue };
            let mut terminated = name.as_bytes().to_vec();
            terminated.push(0);
            events.push(Event::new(11, format!("the name {name}"), &terminated));
            events.push(Event::new(11, format!("the section {name}"), &content));
        }
        let mut load_options: Vec<u8> = self.command_line.encode_utf16().flat_map(u16::to_le_bytes).collect();
        load_options.extend_from_slice(&[0, 0]);
        events.push(Event::new(9, "the kernel's command line", &load_options));
        if !self.initrd.is_empty() {
            events.push(Event::new(9, "the kernel's initrd", &self.initrd));
        }
        Ok(events)
    }
}

/// The command line as systemd-stub hands it on: up to a NUL, without control characters and blanks at its ends.
fn command_line(mut section: Vec<u8>) -> Result<String, BadUki> {
    let end = section.iter().position(|byte| *byte == 0).unwrap_or(section.len());
    section.truncate(end);
    let text = String::from_utf8(section).map_err(|_| BadUki::CommandLine)?;
    // `mangle_stub_cmdline` of systemd's src/boot/util.c.
    let text: String = text.chars().map(|c| if c <= ' ' { ' ' } else { c }).collect();
    Ok(text.trim_matches(' ').to_owned())
}

/// The initrd as systemd-stub joins it: microcode, the section, and the archives that it makes.
fn initrd(pe: &Pe<'_>) -> Result<Vec<u8>, BadUki> {
    let mut parts = Vec::new();
    for name in [".ucode", ".initrd"] {
        parts.extend(pe.section(name)?);
    }
    for (name, file) in EXTRA {
        parts.extend(pe.section(name)?.map(|content| cpio::extra(file, &content)));
    }
    // One part is handed on as it is.
    if let [only] = &mut *parts {
        return Ok(std::mem::take(only));
    }
    let mut joined = Vec::new();
    for part in parts {
        cpio::join(&mut joined, &part);
    }
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::{BadUki, Uki};
    use crate::cpio;
    use crate::pe::tests::program;

    fn sha256(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    #[test]
    fn the_stub_measures_sections_in_its_own_order() {
        let file = program(
            &[(".text", b"code", 4), (".initrd", b"cpio", 4), (".pcrsig", b"no", 2), (".linux", b"kern", 4)],
            b"",
        );
        let events = Uki::parse(&file).unwrap().parts().unwrap();
        let found: Vec<_> =
            events.iter().filter(|event| event.pcr == 11).map(|event| event.digests.sha256).collect();
        assert_eq!(found, [&b".linux\0"[..], b"kern", b".initrd\0", b"cpio"].map(sha256));
    }

    #[test]
    fn the_kernel_measures_the_command_line_and_the_joined_initrd() {
        let sections: [(&str, &[u8], usize); 4] = [
            (".linux", b"k", 1),
            (".cmdline", b" a=\tb \n\0 ", 9),
            (".osrel", b"ID=x", 4),
            (".initrd", b"12345", 5),
        ];
        let file = program(&sections, b"");
        let uki = Uki::parse(&file).unwrap();
        assert_eq!(uki.command_line, "a= b");
        let mut initrd = b"12345\0\0\0".to_vec();
        initrd.extend(cpio::extra("os-release", b"ID=x"));
        let events = uki.parts().unwrap();
        let found: Vec<_> =
            events.iter().filter(|event| event.pcr == 9).map(|event| event.digests.sha256).collect();
        assert_eq!(found, [sha256(b"a\0=\0 \0b\0\0\0"), sha256(&initrd)]);
    }

    #[test]
    fn a_program_without_a_kernel_is_no_uki() {
        let file = program(&[(".text", b"code", 4)], b"");
        assert_eq!(Uki::parse(&file).unwrap_err(), BadUki::NoKernel);
    }
}
