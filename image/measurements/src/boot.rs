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

    /// What is measured from the firmware's boot option on, in its order: by the firmware (PCR 4), by systemd-stub (PCR 11),
    /// and by the kernel's EFI stub (PCR 9).
    ///
    /// # Errors
    /// If the file ends too early.
    pub fn events(&self) -> Result<Vec<Event>, BadUki> {
        let mut events = vec![
            Event::new(4, "the firmware starts a boot option", b"Calling EFI Application from Boot Option"),
            Event::separator(4),
            Event { pcr: 4, what: "the UKI".to_owned(), digests: self.authenticode()? },
        ];
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
