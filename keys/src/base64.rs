//! Base64 of secrets, in constant time and without copies that nothing wipes.

use base64ct::{Base64, Encoding};
use zeroize::Zeroizing;

/// Decodes base64, however it is wrapped into lines. `None` if it is not base64.
pub fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    // Allocated in full first: a buffer that grows leaves copies behind.
    let mut packed = Zeroizing::new(String::with_capacity(text.len()));
    packed.extend(text.chars().filter(|c| !c.is_ascii_whitespace()));
    let mut bytes = Zeroizing::new(vec![0; packed.len()]);
    let length = Base64::decode(packed.as_bytes(), &mut bytes).ok()?.len();
    bytes.truncate(length);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn wrapped_base64_is_decoded(bytes: Vec<u8>, width in 1..100_usize, end in "\r?\n|[ \t]") {
            let text = Base64::encode_string(&bytes);
            let lines: Vec<&str> =
                text.as_bytes().chunks(width).map(|line| std::str::from_utf8(line).unwrap()).collect();
            prop_assert_eq!(&*decode(&lines.join(&end)).unwrap(), &bytes);
        }

        #[test]
        fn other_text_is_refused(text in "[A-Za-z0-9+/]{0,40}[^A-Za-z0-9+/=\\s].*") {
            prop_assert!(decode(&text).is_none());
        }
    }
}
