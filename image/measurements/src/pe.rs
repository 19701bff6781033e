//! EFI programs: their sections, and the digest by which firmware and signers know them.

use crate::event::Digests;

/// The largest section, in bytes of memory.
const SECTION_MAX: usize = 1 << 30;

/// A file that is not an EFI program, or not one that firmware would start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPe {
    /// Another kind of file.
    #[error("not an EFI program")]
    Magic,
    /// An offset or a size beyond the file's end.
    #[error("its headers point beyond its end")]
    Truncated,
}

/// An EFI program.
#[derive(Clone, Debug)]
pub struct Pe<'a> {
    file: &'a [u8],
    checksum: usize,
    certificate_entry: usize,
    headers: usize,
    certificates: (usize, usize),
    sections: Vec<Section>,
}

#[derive(Clone, Debug)]
struct Section {
    name: String,
    memory: usize,
    offset: usize,
    size: usize,
}

/// `COUNT` bytes of `file` at `offset`.
fn take<const COUNT: usize>(file: &[u8], offset: usize) -> Result<[u8; COUNT], BadPe> {
    let bytes = offset.checked_add(COUNT).and_then(|end| file.get(offset..end)).ok_or(BadPe::Truncated)?;
    bytes.try_into().map_err(|_| BadPe::Truncated)
}

fn number16(file: &[u8], offset: usize) -> Result<usize, BadPe> {
    Ok(u16::from_le_bytes(take(file, offset)?).into())
}

fn number32(file: &[u8], offset: usize) -> Result<usize, BadPe> {
    usize::try_from(u32::from_le_bytes(take(file, offset)?)).map_err(|_| BadPe::Truncated)
}

impl<'a> Pe<'a> {
    /// Reads the headers of `file`.
    ///
    /// # Errors
    /// If it is no EFI program, or its headers point beyond its end.
    pub fn parse(file: &'a [u8]) -> Result<Self, BadPe> {
        if !file.starts_with(b"MZ") {
            return Err(BadPe::Magic);
        }
        let pe = number32(file, 0x3c)?;
        if take::<4>(file, pe)? != *b"PE\0\0" {
            return Err(BadPe::Magic);
        }
        let count = number16(file, pe + 6)?;
        let optional = pe + 24;
        // The offset of the data directories: PE32+ (64 bits) or PE32.
        let directories = match number16(file, optional)? {
            0x20b => optional + 112,
            0x10b => optional + 96,
            _ => return Err(BadPe::Magic),
        };
        // The fifth is that of the certificates; the only one with an offset into the file.
        let certificate_entry = directories + 4 * 8;
        let certificates = (number32(file, certificate_entry)?, number32(file, certificate_entry + 4)?);
        let table = optional + number16(file, pe + 20)?;
        let sections = (0..count).map(|index| section(file, table + index * 40)).collect::<Result<_, _>>()?;
        let headers = number32(file, optional + 60)?;
        Ok(Self { file, checksum: optional + 64, certificate_entry, headers, certificates, sections })
    }

    /// Content of the section `name` as it is in memory: what systemd-stub measures and hands on.
    ///
    /// # Errors
    /// If it lies beyond the file's end, or is larger in memory than any UKI's (1 GiB).
    pub fn section(&self, name: &str) -> Result<Option<Vec<u8>>, BadPe> {
        let Some(section) = self.sections.iter().find(|section| section.name == name) else {
            return Ok(None);
        };
        if section.memory > SECTION_MAX {
            return Err(BadPe::Truncated);
        }
        let size = section.size.min(section.memory);
        let mut content = self.slice(section.offset, size)?.to_vec();
        content.resize(section.memory, 0);
        Ok(Some(content))
    }

    /// Its Authenticode digests: of the file but for its checksum, its signatures and where they are (PE/COFF specification,
    /// "Windows Authenticode Portable Executable Signature Format"; EDK II's `MeasurePeImageAndExtend`).
    ///
    /// # Errors
    /// If a part lies beyond the file's end.
    pub fn authenticode(&self) -> Result<Digests, BadPe> {
        let between =
            |from: usize, to: usize| self.slice(from, to.checked_sub(from).ok_or(BadPe::Truncated)?);
        let mut parts = vec![
            between(0, self.checksum)?,
            between(self.checksum + 4, self.certificate_entry)?,
            between(self.certificate_entry + 8, self.headers)?,
        ];
        let mut sections: Vec<_> = self.sections.iter().filter(|section| section.size > 0).collect();
        sections.sort_by_key(|section| section.offset);
        let mut summed = self.headers;
        for section in sections {
            parts.push(self.slice(section.offset, section.size)?);
            summed += section.size;
        }
        // What follows the sections, but for the signatures.
        let end = self.file.len().checked_sub(self.certificates.1).ok_or(BadPe::Truncated)?;
        if end > summed {
            parts.push(between(summed, end)?);
        }
        Ok(Digests::of(parts))
    }

    /// Its signatures, as they are in the file; empty if it is not signed.
    ///
    /// # Errors
    /// If they lie beyond the file's end.
    pub fn signatures(&self) -> Result<&'a [u8], BadPe> {
        self.slice(self.certificates.0, self.certificates.1)
    }

    fn slice(&self, offset: usize, size: usize) -> Result<&'a [u8], BadPe> {
        offset.checked_add(size).and_then(|end| self.file.get(offset..end)).ok_or(BadPe::Truncated)
    }
}

fn section(file: &[u8], header: usize) -> Result<Section, BadPe> {
    let name = take::<8>(file, header)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Section {
        name: String::from_utf8_lossy(name).into_owned(),
        memory: number32(file, header + 8)?,
        offset: number32(file, header + 20)?,
        size: number32(file, header + 16)?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use sha2::{Digest, Sha256};

    use super::{BadPe, Pe};

    const OPTIONAL: usize = 0x40 + 24;

    /// An EFI program with these sections (name, content, size in memory), a signature and four bytes behind the sections.
    pub(crate) fn program(sections: &[(&str, &[u8], usize)], signature: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x400];
        let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
        let number = |number: usize| u32::try_from(number).unwrap().to_le_bytes();
        put(0, b"MZ");
        put(0x3c, &number(0x40));
        put(0x40, b"PE\0\0");
        put(0x46, &number(sections.len())[..2]);
        put(0x54, &number(240)[..2]);
        put(OPTIONAL, &0x20b_u16.to_le_bytes());
        put(OPTIONAL + 60, &number(0x400));
        put(OPTIONAL + 64, b"sum!");
        let (mut offset, mut data) = (0x400, Vec::new());
        for (index, (name, content, memory)) in sections.iter().enumerate() {
            let header = OPTIONAL + 240 + index * 40;
            put(header, name.as_bytes());
            put(header + 8, &number(*memory));
            put(header + 16, &number(content.len()));
            put(header + 20, &number(offset));
            offset += content.len();
            data.extend_from_slice(content);
        }
        if !signature.is_empty() {
            put(OPTIONAL + 112 + 32, &number(offset + 4));
            put(OPTIONAL + 112 + 36, &number(signature.len()));
        }
        file.extend(data);
        file.extend(b"tail");
        file.extend(signature);
        file
    }

    #[test]
    fn a_section_is_as_in_memory() {
        let file = program(&[(".a", b"padded..", 3), (".bss", b"xy", 6), (".longname", b"12345678", 8)], b"");
        let pe = Pe::parse(&file).unwrap();
        assert_eq!(pe.section(".a").unwrap().unwrap(), b"pad");
        assert_eq!(pe.section(".bss").unwrap().unwrap(), b"xy\0\0\0\0");
        assert_eq!(pe.section(".c").unwrap(), None);
    }

    #[test]
    fn the_digest_leaves_out_checksum_and_signature() {
        let sections: [(&str, &[u8], usize); 2] = [(".a", b"12345678", 8), (".b", b"abcdefgh", 8)];
        let signed = program(&sections, b"signature");
        let digest = |file: &[u8]| Pe::parse(file).unwrap().authenticode().unwrap();
        let expected = {
            let without = [
                &signed[..OPTIONAL + 64],
                &signed[OPTIONAL + 68..OPTIONAL + 144],
                &signed[OPTIONAL + 152..signed.len() - b"signature".len()],
            ];
            without.into_iter().fold(Sha256::new(), Sha256::chain_update).finalize()
        };
        assert_eq!(digest(&signed).sha256, *expected);
        assert_eq!(digest(&program(&sections, b"")), digest(&signed));
        let mut changed = signed.clone();
        changed[OPTIONAL + 64] ^= 1;
        assert_eq!(digest(&changed), digest(&signed));
        for offset in [2, OPTIONAL + 60 + 92, 0x400, signed.len() - 10] {
            let mut changed = signed.clone();
            changed[offset] ^= 1;
            assert_ne!(digest(&changed), digest(&signed), "{offset}");
        }
        assert_eq!(Pe::parse(&signed).unwrap().signatures().unwrap(), b"signature");
    }

    #[test]
    fn a_cut_or_mangled_file_is_an_error() {
        let file = program(&[(".linux", b"12345678", 8)], b"signature");
        for end in 0..file.len() {
            let read = Pe::parse(&file[..end]).and_then(|pe| {
                let whole = (pe.authenticode()?, pe.section(".linux")?, pe.signatures()?);
                Ok(whole)
            });
            assert!(read.is_err(), "{end}");
        }
        assert_eq!(Pe::parse(b"#!/bin/sh\n").unwrap_err(), BadPe::Magic);
        // Sizes and offsets of 4 GiB: errors, not panics.
        for offset in 0x3c..0x200 {
            let mut mangled = file.clone();
            mangled[offset..offset + 4].fill(0xff);
            if let Ok(pe) = Pe::parse(&mangled) {
                let _read = (pe.authenticode(), pe.signatures());
            }
        }
    }
}
