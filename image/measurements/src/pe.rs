//! EFI programs: their sections, and the digest by which firmware and signers know them.

use crate::event::Digests;

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
    /// If it lies beyond the file's end.
    pub fn section(&self, name: &str) -> Result<Option<Vec<u8>>, BadPe> {
        let Some(section) = self.sections.iter().find(|section| section.name == name) else {
            return Ok(None);
        };
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
