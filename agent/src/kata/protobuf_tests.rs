use proptest::collection::vec;
use proptest::prelude::*;
use prost::encoding::{decode_varint, encode_varint};

use super::{Field, Fields, Malformed, contents, last, number, put, put_number, varint};

proptest! {
    #[test]
    fn numbers_are_those_of_another_implementation(value: u64, tail: [u8; 2]) {
        let mut data = Vec::new();
        encode_varint(value, &mut data);
        let mut ours = Vec::new();
        put_number(1, value, &mut ours);
        prop_assert_eq!(&ours[1..], &data[..]);
        data.extend(tail);
        prop_assert_eq!(varint(&data), Ok((value, &tail[..])));
    }

    #[test]
    fn what_is_no_number_for_another_implementation_is_none_here(data in vec(any::<u8>(), 0..12)) {
        prop_assert_eq!(varint(&data).ok().map(|(value, _)| value), decode_varint(&mut &data[..]).ok());
    }

    #[test]
    fn fields_cover_the_message_without_a_gap_or_end_with_an_error(data in vec(any::<u8>(), 0..64)) {
        let mut covered = Vec::new();
        let mut failed = false;
        for field in Fields::of(&data) {
            prop_assert!(!failed, "a field after an error");
            match field {
                Ok(field) => covered.extend_from_slice(field.raw),
                Err(_) => failed = true,
            }
        }
        prop_assert!(data.starts_with(&covered));
        prop_assert!(failed || covered == data);
    }
}

#[test]
fn every_wire_type_is_passed_over() {
    let mut message = vec![0x08, 0x96, 0x01]; // 1: 150
    message.extend([0x11, 1, 2, 3, 4, 5, 6, 7, 8]); // 2: fixed64
    message.extend([0x1a, 2, b'h', b'i']); // 3: "hi"
    message.extend([0x23, 0x08, 0x01, 0x2b, 0x2c, 0x1a, 0x01, b'x', 0x24]); // 4: a group, with one in it
    message.extend([0x2d, 1, 2, 3, 4]); // 5: fixed32
    let fields: Vec<Field<'_>> = Fields::of(&message).map(Result::unwrap).collect();
    let seen: Vec<_> = fields.iter().map(|field| (field.number, field.raw.len(), field.content)).collect();
    assert_eq!(seen, [(1, 3, None), (2, 9, None), (3, 4, Some(&b"hi"[..])), (4, 9, None), (5, 5, None)]);
}

#[test]
fn what_is_cut_short_is_told_from_what_can_never_be() {
    for cut in [&[0x80][..], &[0x08], &[0x0a, 5, b'x'], &[0x11, 1], &[0x2d, 1], &[0x23, 0x08, 0x01]] {
        assert_eq!(Fields::of(cut).next(), Some(Err(Malformed::Truncated)), "{cut:x?}");
    }
    let too_long = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
    for never in [&[0x00, 0][..], &[0x0c], &[0x0e], &[0x0f], &too_long] {
        assert_eq!(Fields::of(never).next(), Some(Err(Malformed::InvalidField)), "{never:x?}");
    }
    assert_eq!(number(&[0x0a, 5, b'x']), Some(1));
    assert_eq!(number(&[]), None);
}

#[test]
fn of_several_the_last_counts_and_none_is_empty() {
    let mut message = Vec::new();
    put(2, b"one", &mut message);
    put_number(2, 9, &mut message);
    put(2, b"two", &mut message);
    assert_eq!(last(&message, 2), Ok(&b"two"[..]));
    assert_eq!(contents(&message, 2), Ok(vec![&b"one"[..], b"two"]));
    assert_eq!(last(&message, 1), Ok(&b""[..]));
}
