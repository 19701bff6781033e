use super::*;

#[test]
fn the_dummy_is_what_its_base64_says() {
    assert_eq!(decode(DUMMY.as_bytes()), Ok(dummy()));
    assert_eq!(DUMMY.len(), 120);
}
