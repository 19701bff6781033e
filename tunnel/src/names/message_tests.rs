use proptest::prelude::*;

use std::net::Ipv6Addr;

use super::*;

const HEADER: usize = 12;
const RESPONSE: u16 = 0x8000;
const TRUNCATED: u16 = 0x0200;

fn question(family: Family) -> Question {
    Question::new(0x1234, "kbs.example", family).unwrap()
}

/// An answer to `question`: its header and question, then `records`.
fn answer(question: &Question, flags: u16, records: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = question.bytes().to_vec();
    bytes[2..4].copy_from_slice(&(RESPONSE | flags).to_be_bytes());
    bytes[6..8].copy_from_slice(&u16::try_from(records.len()).unwrap().to_be_bytes());
    for (record, data) in records {
        bytes.extend([0xc0, 12]);
        bytes.extend(record.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 60]);
        bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

fn addresses(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_question_is_one_of_rfc_1035() {
    let bytes = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03kbs\x07example\x00\x00\x1c\x00\x01";
    assert_eq!(question(Family::V6).bytes(), bytes);
}

#[test]
fn a_name_that_dns_can_not_have_is_no_question() {
    let long = [&*"a".repeat(63); 4].join(".");
    for name in ["", ".", "a..b", ".a", &"a".repeat(64), &long] {
        assert!(Question::new(1, name, Family::V4).is_none(), "{name:?}");
    }
    assert!(Question::new(1, &long[..253], Family::V4).is_some());
}

#[test]
fn addresses_are_read_behind_aliases_and_once_each() {
    let v4 = question(Family::V4);
    let alias: &[u8] = b"\x01b\xc0\x10";
    let records: &[(u16, &[u8])] =
        &[(5, alias), (1, &[10, 0, 0, 1]), (1, &[10, 0, 0, 2]), (1, &[10, 0, 0, 1])];
    let expected = Answer::Addresses(addresses(&["10.0.0.1", "10.0.0.2"]));
    assert_eq!(v4.reply(&answer(&v4, 0, records)), Reply::Answer(expected));
    let v6 = question(Family::V6);
    let one = answer(&v6, 0, &[(28, &Ipv6Addr::LOCALHOST.octets())]);
    assert_eq!(v6.reply(&one), Reply::Answer(Answer::Addresses(addresses(&["::1"]))));
    assert_eq!(v4.reply(&answer(&v4, 0, &[(5, alias)])), Reply::Answer(Answer::NoAddress));
}

#[test]
fn at_most_a_bounded_number_of_addresses_is_kept() {
    let v4 = question(Family::V4);
    let data: Vec<[u8; 4]> = (0..200).map(|n| [10, 0, 0, n]).collect();
    let records: Vec<(u16, &[u8])> = data.iter().map(|data| (1, &data[..])).collect();
    let Reply::Answer(Answer::Addresses(found)) = v4.reply(&answer(&v4, 0, &records)) else { panic!() };
    assert_eq!(found.len(), ADDRESSES_MAX);
}

#[test]
fn a_refusal_is_not_a_name_that_does_not_exist() {
    let v4 = question(Family::V4);
    for (flags, text) in [(1, "FORMERR"), (2, "SERVFAIL"), (4, "NOTIMP"), (5, "REFUSED"), (9, "NOTAUTH")] {
        assert_eq!(v4.reply(&answer(&v4, flags, &[])), Reply::Fault(text.into()));
        let mut bare = answer(&v4, flags, &[])[..HEADER].to_vec();
        bare[5] = 0;
        assert_eq!(v4.reply(&bare), Reply::Fault(text.into()), "without the question");
    }
    assert_eq!(v4.reply(&answer(&v4, 3, &[])), Reply::Answer(Answer::NoSuchName));
}

#[test]
fn a_truncated_answer_keeps_what_fitted() {
    let v4 = question(Family::V4);
    let mut cut = answer(&v4, TRUNCATED, &[(1, &[10, 0, 0, 1]), (1, &[10, 0, 0, 2])]);
    cut.truncate(cut.len() - 3);
    assert_eq!(v4.reply(&cut), Reply::Truncated(addresses(&["10.0.0.1"])));
}

#[test]
fn a_message_that_answers_another_question_is_unrelated() {
    let v4 = question(Family::V4);
    let good = answer(&v4, 0, &[(1, &[10, 0, 0, 1])]);
    let edited = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        v4.reply(&message)
    };
    for (at, byte) in [(0, 0), (2, 0), (2, 0x90), (5, 0), (5, 2), (14, b'x'), (26, 28)] {
        assert_eq!(edited(at, byte), Reply::Unrelated, "byte {at}");
    }
    assert!(matches!(edited(13, b'K'), Reply::Answer(Answer::Addresses(_))), "names have no case");
    assert_eq!(v4.reply(&good[..HEADER - 1]), Reply::Unrelated);
    assert_eq!(v4.reply(&good[..good.len() - 1]), Reply::Fault("a damaged answer".into()));
    let odd = answer(&v4, 0, &[(1, &[10, 0, 0])]);
    assert_eq!(v4.reply(&odd), Reply::Fault("a damaged answer".into()));
}

proptest! {
    #[test]
    fn any_bytes_are_read_within_bounds(mut message: Vec<u8>, edits in prop::collection::vec((0..200_usize, any::<u8>()), 0..4), keep: bool) {
        let v6 = question(Family::V6);
        if keep {
            message = answer(&v6, 0, &[(28, &[1; 16]), (5, b"\x01b\xc0\x10"), (28, &[2; 16])]);
            for (at, byte) in edits {
                let at = at % message.len();
                message[at] = byte;
            }
        }
        if let Reply::Answer(Answer::Addresses(found)) | Reply::Truncated(found) = v6.reply(&message) {
            prop_assert!(found.len() <= ADDRESSES_MAX);
        }
    }
}
