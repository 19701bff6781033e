//! The two commands to a TPM, byte by byte: TPM 2.0 Library Specification, Part 3, 22.2 (`TPM2_PCR_Extend`) and 22.4
//! (`TPM2_PCR_Read`). All numbers are big-endian.

use super::PcrError;

/// A PCR value or a digest of the SHA-256 bank.
pub(super) type Digest = [u8; 32];

/// The PCR for init-data, as upstream's and as the attestation service expects it.
const PCR: u8 = 8;
const ALG_SHA256: u16 = 0x000b;
const ST_NO_SESSIONS: u16 = 0x8001;
const ST_SESSIONS: u16 = 0x8002;
const CC_PCR_EXTEND: u32 = 0x0000_0182;
const CC_PCR_READ: u32 = 0x0000_017e;
/// The password session: PCR 8 has an empty authorization value.
const RS_PW: u32 = 0x4000_0009;
/// Its area in a command: handle, empty nonce, attributes, empty password.
const AUTH_SIZE: u32 = 9;
/// The size of a head: tag, size, command or response code.
const HEAD: usize = 10;
/// PCR 8 in a selection of three bytes: bit 0 of byte 1.
const SELECT: [u8; 3] = [0, 1, 0];

/// Extends PCR 8 of the SHA-256 bank.
pub(super) fn extend(digest: &Digest) -> Vec<u8> {
    let mut body = Vec::with_capacity(64);
    body.extend(u32::from(PCR).to_be_bytes());
    body.extend(AUTH_SIZE.to_be_bytes());
    body.extend(RS_PW.to_be_bytes());
    body.extend(0_u16.to_be_bytes());
    body.push(0);
    body.extend(0_u16.to_be_bytes());
    body.extend(1_u32.to_be_bytes());
    body.extend(ALG_SHA256.to_be_bytes());
    body.extend(digest);
    command(ST_SESSIONS, CC_PCR_EXTEND, &body)
}

/// Reads PCR 8 of the SHA-256 bank.
pub(super) fn read() -> Vec<u8> {
    let mut body = Vec::with_capacity(16);
    body.extend(1_u32.to_be_bytes());
    body.extend(ALG_SHA256.to_be_bytes());
    body.push(SELECT.len() as u8);
    body.extend(SELECT);
    command(ST_NO_SESSIONS, CC_PCR_READ, &body)
}

fn command(tag: u16, code: u32, body: &[u8]) -> Vec<u8> {
    let size = (HEAD + body.len()) as u32;
    [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes(), body].concat()
}

/// Checks the answer to [`extend`].
pub(super) fn extended(response: &[u8]) -> Result<(), PcrError> {
    let mut body = Body { name: "TPM2_PCR_Extend", rest: response };
    body.head(response.len(), ST_SESSIONS)?;
    // No parameters; then the session's area: an empty nonce, attributes, no HMAC.
    body.expect(&0_u32.to_be_bytes(), "parameters that do not belong there")?;
    body.take(5)?;
    body.end()
}

/// Takes the value out of the answer to [`read`].
pub(super) fn value(response: &[u8]) -> Result<Digest, PcrError> {
    let mut body = Body { name: "TPM2_PCR_Read", rest: response };
    body.head(response.len(), ST_NO_SESSIONS)?;
    body.take(4)?; // How often PCRs were updated.
    // A bank that is not allocated is left out, or has an empty selection.
    match body.number()? {
        0 => return Err(PcrError::NoSha256Bank),
        1 => {}
        _ => return Err(body.fault("more than one bank")),
    }
    body.expect(&ALG_SHA256.to_be_bytes(), "another bank than SHA-256")?;
    body.expect(&[SELECT.len() as u8], "a selection of another size")?;
    match body.take(SELECT.len())? {
        [0, 0, 0] => return Err(PcrError::NoSha256Bank),
        selected if selected == SELECT => {}
        _ => return Err(body.fault("other PCRs")),
    }
    body.expect(&1_u32.to_be_bytes(), "not one value")?;
    body.expect(&32_u16.to_be_bytes(), "a value that is not 32 bytes long")?;
    let digest = body.take(32)?.try_into().map_err(|_| body.fault("cut"))?;
    body.end()?;
    Ok(digest)
}

struct Body<'a> {
    name: &'static str,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn fault(&self, fault: &'static str) -> PcrError {
        PcrError::Response { command: self.name, fault }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], PcrError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.fault("cut"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u32, PcrError> {
        let bytes = self.take(4)?.try_into().map_err(|_| self.fault("cut"))?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn expect(&mut self, expected: &[u8], fault: &'static str) -> Result<(), PcrError> {
        if self.take(expected.len())? == expected { Ok(()) } else { Err(self.fault(fault)) }
    }

    /// Tag, size and response code. An answer that refuses has no more than these and its own tag.
    fn head(&mut self, length: usize, tag: u16) -> Result<(), PcrError> {
        let found = self.take(2)?;
        if usize::try_from(self.number()?) != Ok(length) {
            return Err(self.fault("not as long as it says"));
        }
        let code = self.number()?;
        if code != 0 {
            return Err(PcrError::Refused { command: self.name, code });
        }
        if found == tag.to_be_bytes() { Ok(()) } else { Err(self.fault("a tag that does not belong there")) }
    }

    fn end(&self) -> Result<(), PcrError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.fault("more than belongs there")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_the_specification_says() {
        let extend = extend(&[0xab; 32]);
        let mut expected = vec![0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 8, 0, 0, 0, 9];
        expected.extend([0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b]);
        expected.extend([0xab; 32]);
        assert_eq!(extend, expected);
        let expected = [0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3, 0, 1, 0];
        assert_eq!(read(), expected);
    }

    fn read_answer() -> Vec<u8> {
        let mut answer = vec![0x80, 1, 0, 0, 0, 62, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0x0b, 3, 0, 1, 0];
        answer.extend([0, 0, 0, 1, 0, 32]);
        answer.extend([7; 32]);
        answer
    }

    #[test]
    fn an_answer_is_read_only_if_it_is_whole() {
        let answer = read_answer();
        assert_eq!(value(&answer).unwrap(), [7; 32]);
        for at in 0..answer.len() {
            assert!(matches!(value(&answer[..at]), Err(PcrError::Response { .. })), "cut at {at}");
            // Cut, though its head agrees.
            let mut cut = answer[..at].to_vec();
            if let Some(size) = cut.get_mut(2..6) {
                size.copy_from_slice(&(at as u32).to_be_bytes());
            }
            assert!(value(&cut).is_err(), "cut at {at}");
        }
        let mut longer = answer;
        longer.push(0);
        longer[5] += 1;
        assert!(matches!(value(&longer), Err(PcrError::Response { fault: "more than belongs there", .. })));
    }

    #[test]
    fn a_bank_that_is_not_there_is_named() {
        let empty =
            [0x80, 1, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 0, 0, 0, 0, 0];
        assert!(matches!(value(&empty), Err(PcrError::NoSha256Bank)));
        let none = [0x80, 1, 0, 0, 0, 22, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(matches!(value(&none), Err(PcrError::NoSha256Bank)));
    }

    #[test]
    fn a_refusal_carries_its_code() {
        let refused = [0x80, 1, 0, 0, 0, 10, 0, 0, 9, 7];
        assert!(matches!(extended(&refused), Err(PcrError::Refused { code: 0x907, .. })));
        assert!(matches!(value(&refused), Err(PcrError::Refused { code: 0x907, .. })));
        let good = [0x80, 2, 0, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
        assert!(extended(&good).is_ok());
        for at in 0..good.len() {
            assert!(extended(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
