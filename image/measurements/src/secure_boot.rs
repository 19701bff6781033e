//! What firmware measures of Secure Boot, into PCR 7.

use crate::event::{Digests, Event};
use crate::variables::{Guid, NAMES, SECURE_BOOT, SECURITY_DATABASE, Variables};

/// GUID of a list of X.509 certificates (`EFI_CERT_X509_GUID`).
const X509: [u8; 16] = *b"\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72";

/// Why it can't be predicted who authorised a UKI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAuthority {
    /// The UKI has no signature: firmware with Secure Boot would not start it.
    #[error("the UKI is not signed (image/sign signs a disk): firmware with Secure Boot does not start it")]
    NotSigned,
    /// No certificate of db is in the UKI's signature.
    #[error(
        "no certificate of db signed the UKI itself: firmware does not start it, or by a certificate in between"
    )]
    NotInDb,
    /// A list of signatures is cut.
    #[error("db is not a list of signatures")]
    BadList,
}

/// Events of a machine with Secure Boot off; most have no variables then.
pub fn off(variables: &Variables) -> Vec<Event> {
    start(variables, 0)
}

/// What the firmware measures before it starts anything.
fn start(variables: &Variables, secure_boot: u8) -> Vec<Event> {
    let mut events = vec![variable(SECURE_BOOT, &[secure_boot])];
    events.extend(NAMES.iter().zip(&variables.0).map(|(name, value)| variable(*name, value)));
    events.push(Event::separator(7));
    events
}

/// Events of a machine with Secure Boot on that starts a file with `signatures`.
///
/// # Errors
/// If none of db's certificates signed it.
pub fn on(variables: &Variables, signatures: &[u8]) -> Result<Vec<Event>, NoAuthority> {
    let mut events = start(variables, 1);
    let authority = authority(variables.db(), signatures)?;
    events.push(Event {
        what: "the certificate of db that signed the UKI".to_owned(),
        ..variable(("db", SECURITY_DATABASE), authority)
    });
    Ok(events)
}

/// A variable as firmware measures it (`UEFI_VARIABLE_DATA` of the TCG's PC Client Platform Firmware Profile).
fn variable((name, guid): (&str, Guid), value: &[u8]) -> Event {
    let encoded: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let characters = (encoded.len() as u64 / 2).to_le_bytes();
    let size = (value.len() as u64).to_le_bytes();
    let digests = Digests::of([&guid.0[..], &characters, &size, &encoded, value]);
    Event { pcr: 7, what: format!("the variable {name}"), digests }
}

/// The entry of `db` (its owner's GUID and the certificate) whose certificate is in `signatures`.
fn authority<'a>(db: &'a [u8], signatures: &[u8]) -> Result<&'a [u8], NoAuthority> {
    if signatures.is_empty() {
        return Err(NoAuthority::NotSigned);
    }
    let mut rest = db;
    while !rest.is_empty() {
        let number = |offset: usize| -> Result<usize, NoAuthority> {
            let bytes = rest.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok());
            let number = u32::from_le_bytes(bytes.ok_or(NoAuthority::BadList)?);
            usize::try_from(number).map_err(|_| NoAuthority::BadList)
        };
        let (list, header, entry) = (number(16)?, number(20)?, number(24)?);
        let entries =
            header.checked_add(28).and_then(|start| rest.get(start..list)).ok_or(NoAuthority::BadList)?;
        if rest.starts_with(&X509) && entry > 16 {
            for entry in entries.chunks_exact(entry) {
                let certificate = entry.get(16..).unwrap_or_default();
                if signatures.windows(certificate.len()).any(|window| window == certificate) {
                    return Ok(entry);
                }
            }
        }
        rest = rest.get(list..).filter(|_| list > 0).ok_or(NoAuthority::BadList)?;
    }
    Err(NoAuthority::NotInDb)
}

#[cfg(test)]
mod tests {
    use super::{NoAuthority, X509, authority, off};
    use crate::register::{hex, pcr};
    use crate::variables::Variables;

    fn list(kind: [u8; 16], entries: &[&[u8]]) -> Vec<u8> {
        let entry = entries.first().map_or(0, |entry| entry.len());
        let number = |number: usize| u32::try_from(number).unwrap().to_le_bytes();
        let size = 28 + entries.iter().map(|entry| entry.len()).sum::<usize>();
        [&kind[..], &number(size), &number(0), &number(entry), &entries.concat()].concat()
    }

    #[test]
    fn without_keys_the_register_is_that_of_real_machines() {
        let value = hex(&pcr(7, &off(&Variables::default())));
        assert_eq!(value, "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068");
    }

    #[test]
    fn the_authority_is_the_entry_whose_certificate_signed() {
        let (first, second) =
            ([&[1; 16][..], b"first certificate"].concat(), [&[2; 16][..], b"other certificate"].concat());
        let db = [list([9; 16], &[&[0; 48]]), list(X509, &[&first, &second])].concat();
        assert_eq!(authority(&db, b"... other certificate ..."), Ok(&second[..]));
        assert_eq!(authority(&db, b"a third certificate"), Err(NoAuthority::NotInDb));
        assert_eq!(authority(&db, b""), Err(NoAuthority::NotSigned));
    }

    #[test]
    fn a_cut_list_is_an_error() {
        let db = list(X509, &[b"0123456789abcdefcertificate"]);
        for end in 1..db.len() {
            assert_eq!(authority(&db[..end], b"something"), Err(NoAuthority::BadList), "{end}");
        }
        // A list of size 0 would never end.
        assert_eq!(authority(&[0; 64], b"something"), Err(NoAuthority::BadList));
    }
}
