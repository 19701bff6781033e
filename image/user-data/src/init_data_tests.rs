use miniz_oxide::deflate::compress_to_vec;

use super::*;

const TOML: &str = "algorithm = \"sha256\"\nversion = \"0.1.0\"\n";

/// Flags of gzip's header, and what belongs to them.
fn gzip_with(flags: u8, fields: &[u8], text: &[u8]) -> Vec<u8> {
    let mut member = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 2, 3];
    member.extend(fields);
    member.extend(compress_to_vec(text, 6));
    member.extend(gzip::crc32(text).to_le_bytes());
    member.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    member
}

fn encode(bytes: &[u8]) -> Vec<u8> {
    Base64::encode_string(bytes).into_bytes()
}

fn decode_toml(toml: &str) -> Result<InitData, InitDataError> {
    decode(&encode(&gzip_with(0, b"", toml.as_bytes())))
}

#[test]
fn the_dummy_is_what_its_base64_says() {
    assert_eq!(decode(DUMMY.as_bytes()), Ok(dummy()));
    assert_eq!(DUMMY.len(), 120);
}

#[test]
fn each_field_of_a_gzip_header_may_be_there() {
    let all = b"\x03\x00abcname\0comment\0";
    let header_crc = |flags, fields: &[u8]| {
        let before = [&[0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 2, 3], fields].concat();
        let crc = gzip::crc32(&before).to_le_bytes();
        [fields, &crc[..2]].concat()
    };
    for (flags, fields) in [
        (0b0000_0001, Vec::new()),
        (0b0000_0100, all[..5].to_vec()),
        (0b0000_1000, b"name\0".to_vec()),
        (0b0001_0000, b"\0".to_vec()),
        (0b0000_0010, header_crc(0b0000_0010, b"")),
        (0b0001_1111, header_crc(0b0001_1111, all)),
    ] {
        let member = gzip_with(flags, &fields, TOML.as_bytes());
        assert!(decode(&encode(&member)).is_ok(), "{flags:b}");
        // All but the last byte: cut wherever it is.
        for end in 0..member.len() {
            let error = decode(&encode(&member[..end])).expect_err("cut");
            assert!(!error.is_permanent(), "{flags:b} {end} {error}");
        }
    }
    let wrong = gzip_with(0b0000_0010, b"\0\0", TOML.as_bytes());
    assert_eq!(decode(&encode(&wrong)), Err(InitDataError::Checksum));
    for bit in 5..8 {
        let reserved = gzip_with(1 << bit, b"", TOML.as_bytes());
        assert_eq!(decode(&encode(&reserved)), Err(InitDataError::Gzip));
    }
}

#[test]
fn members_are_joined_and_nothing_may_follow() {
    let (head, tail) = TOML.split_at(10);
    let members =
        [gzip_with(0, b"", head.as_bytes()), gzip_with(0, b"", b""), gzip_with(0, b"", tail.as_bytes())];
    assert_eq!(decode(&encode(&members.concat())).unwrap().toml, TOML.as_bytes());
    let with = |rest: &[u8]| decode(&encode(&[gzip_with(0, b"", TOML.as_bytes()).as_slice(), rest].concat()));
    assert_eq!(with(b"\0\0\0\0"), Err(InitDataError::Gzip));
    assert_eq!(with(b"trash"), Err(InitDataError::Gzip));
    assert_eq!(with(b"x"), Err(InitDataError::CutGzip));
}

#[test]
fn a_member_sees_nothing_of_the_one_before() {
    // zlib's deflate of the same text, with the text as its dictionary: one copy from 30 bytes back.
    let text = b"012345678901234567890123456789";
    let mut copy = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 0xc3, 0xcf, 2, 0];
    copy.extend(gzip::crc32(text).to_le_bytes());
    copy.extend(30_u32.to_le_bytes());
    assert_eq!(decode(&encode(&[gzip_with(0, b"", text), copy].concat())), Err(InitDataError::Damaged));
}

#[test]
fn the_toml_is_at_most_a_mebibyte() {
    let toml = format!("{TOML}#{}", "x".repeat(TOML_MAX - TOML.len() - 1));
    assert_eq!(decode_toml(&toml).unwrap().toml.len(), TOML_MAX);
    assert_eq!(decode_toml(&format!("{toml}x")), Err(InitDataError::TooLarge));
    // 700 MiB if they were inflated.
    let member = gzip_with(0, b"", &vec![b'x'; 4 * TOML_MAX]);
    assert_eq!(decode(&encode(&member.repeat(180))), Err(InitDataError::TooLarge));
    let (head, tail) = toml.split_at(TOML_MAX / 2);
    let two = |tail: &str| [gzip_with(0, b"", head.as_bytes()), gzip_with(0, b"", tail.as_bytes())].concat();
    assert!(decode(&encode(&two(tail))).is_ok());
    assert_eq!(decode(&encode(&two(&format!("{tail}x")))), Err(InitDataError::TooLarge));
}

#[test]
fn only_line_breaks_may_stand_in_base64() {
    let text = String::from_utf8(encode(&gzip_with(0, b"", TOML.as_bytes()))).unwrap();
    let wrapped = format!("\r\n{}\r\n{}\n\n", &text[..7], &text[7..]);
    assert!(decode(wrapped.as_bytes()).is_ok());
    for (text, expected) in [
        (String::new(), InitDataError::Empty),
        ("\r\n".to_owned(), InitDataError::Empty),
        (format!(" {text}"), InitDataError::Base64),
        (format!("{text}\t"), InitDataError::Base64),
        (text.replace("H4sI", "H4s_"), InitDataError::Base64),
        (format!("{text}===="), InitDataError::Base64),
        (text[..text.len() - 1].to_owned(), InitDataError::CutBase64),
        // The last digit has bits that belong to no byte.
        ("AB==".to_owned(), InitDataError::Base64),
    ] {
        assert_eq!(decode(text.as_bytes()), Err(expected), "{text}");
    }
}

#[test]
fn versions_of_the_first_format_are_known() {
    let with = |version: &str| {
        decode_toml(&format!("algorithm = \"sha384\"\nversion = \"{version}\"\n")).map(|_| ())
    };
    for version in ["0.1.0", "0.1.1", "0.1.12", "0.1.999"] {
        assert_eq!(with(version), Ok(()), "{version}");
    }
    for version in
        ["", "0.1", "0.1.", "0.1.00", "0.1.01", "0.1.1000", "0.1.x", "0.2.0", "1.1.0", "0.1.0 ", "0.1.+1"]
    {
        assert_eq!(with(version), Err(InitDataError::Version { line: 2 }), "{version}");
    }
}

#[test]
fn what_another_reader_may_take_for_a_known_key_is_refused() {
    let with = |key: &str| decode_toml(&format!("{TOML}[data]\n\"x\" = \"\"\n\"{key}\" = \"a\"\n"));
    for key in ["aa.toml", "cdh.toml", "policy.rego", "secure-comms.toml"] {
        assert_eq!(with(key).unwrap().files.len(), 1, "{key}");
        for doubtful in [
            key.to_uppercase(),
            format!("./{key}"),
            format!("/{key}/"),
            format!("x/../{key}/."),
            format!("{key}/x/.."),
            format!(" {key}"),
        ] {
            assert_eq!(with(&doubtful), Err(InitDataError::Doubtful { line: 5 }), "{doubtful}");
        }
    }
    for key in
        ["", "/", "..", "aa.tom", "apf.json", "initdata", "initdata.digest", "initdata.toml", "aa.toml.bak"]
    {
        let init_data = with(key).unwrap();
        assert_eq!(init_data.files, [], "{key}");
        assert_eq!(
            init_data.skipped.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [4, 5].map(|line| format!("line {line}: a file that init-data may not bring: skipped")),
        );
    }
    for key in ["Algorithm", "VERSION", "Data", "data"] {
        let toml = format!("{TOML}{key} = \"a\"\n");
        assert_eq!(decode_toml(&toml), Err(InitDataError::Doubtful { line: 3 }), "{key}");
    }
    let note = decode_toml(&format!("{TOML}other = 'a'\n")).unwrap().skipped;
    assert_eq!(note, [Skipped { line: 3, reason: SkipReason::Key }]);
}

#[test]
fn strings_are_read_as_toml_says() {
    for (value, expected) in [
        ("''", ""),
        ("'a\\n'", "a\\n"),
        ("\"a\\n\\u00e9\\U0001F600\\t\\\"\\\\\"", "a\n\u{e9}\u{1f600}\t\"\\"),
        ("'''\na'b''\n'''", "a'b''\n"),
        ("'''a'''''", "a''"),
        ("\"\"\"\na\\\n   b\"\"\"", "ab"),
        ("\"\"\"a\r\nb\"\"\"", "a\r\nb"),
        ("'a' # c", "a"),
    ] {
        let init_data = decode_toml(&format!("{TOML}[data]\n'aa.toml' = {value}\n")).expect(value);
        assert_eq!(init_data.files, [(FileName::AttestationAgent, expected.as_bytes().to_vec())], "{value}");
    }
}

#[test]
fn toml_that_is_more_than_strings_is_refused_by_name() {
    for (text, line, expected) in [
        ("[data]\naa.toml = 'a'\n", 4, TomlFault::DottedKey),
        ("data.x = 'a'\n", 3, TomlFault::DottedKey),
        ("data = {}\n", 3, TomlFault::InlineTable),
        ("x = {a = 1, a = 2}\n", 3, TomlFault::InlineTable),
        ("x = [1]\n", 3, TomlFault::Array),
        ("x = [\n", 3, TomlFault::Array),
        ("[[data]]\n", 3, TomlFault::ArrayOfTables),
        ("[data]\n[data]\n", 4, TomlFault::Table),
        ("[data]\n[data.x]\n", 4, TomlFault::Table),
        ("[x]\n[data]\n", 3, TomlFault::Table),
        ("[Data]\n", 3, TomlFault::Table),
        ("[\"da\\u0074a\"]\n[data]\n", 4, TomlFault::Table),
        ("x = 1\n", 3, TomlFault::NotText),
        ("x = 1979-05-27T07:32:00Z\n", 3, TomlFault::NotText),
        ("x = nan\n", 3, TomlFault::NotText),
        ("x = false\n", 3, TomlFault::NotText),
        ("x = ''\nx = ''\n", 4, TomlFault::Duplicate),
        ("[data]\nx = ''\n\"\\u0078\" = ''\n", 5, TomlFault::Duplicate),
        ("data = ''\n[data]\n", 3, TomlFault::Duplicate),
        ("x\n", 3, TomlFault::Syntax),
        ("x =\n", 3, TomlFault::Syntax),
        ("= ''\n", 3, TomlFault::Syntax),
        ("x = 'a\n", 3, TomlFault::Syntax),
        ("x = '' y = ''\n", 3, TomlFault::Syntax),
        ("x = \"\\q\"\n", 3, TomlFault::Syntax),
        ("x = \"\\ud800\"\n", 3, TomlFault::Syntax),
        ("x = 'a\0'\n", 3, TomlFault::Syntax),
        ("# \u{7f}\n", 3, TomlFault::Syntax),
        ("# a\rb\n", 3, TomlFault::Syntax),
        ("[data\n", 3, TomlFault::Syntax),
        ("]\n", 3, TomlFault::Syntax),
    ] {
        assert_eq!(
            decode_toml(&format!("{TOML}{text}")),
            Err(InitDataError::Toml { line, fault: expected }),
            "{text}"
        );
    }
    assert_eq!(decode_toml("version = '0.1.0'\n"), Err(InitDataError::Missing("algorithm")));
    assert_eq!(decode_toml("algorithm = 'sha256'\n"), Err(InitDataError::Missing("version")));
    // In [data] they are files.
    let in_data = format!("[data]\n{TOML}");
    assert_eq!(decode_toml(&in_data), Err(InitDataError::Missing("algorithm")));
}

#[test]
fn keys_are_limited_and_depth_costs_nothing() {
    let keys = |count: usize| (0..count).map(|key| format!("k{key} = ''\n")).collect::<String>();
    assert!(decode_toml(&format!("{TOML}{}", keys(62))).is_ok());
    assert_eq!(
        decode_toml(&format!("{TOML}{}", keys(63))),
        Err(InitDataError::Toml { line: 65, fault: TomlFault::TooManyKeys })
    );
    for (start, hostile) in [
        ("x = ", "["),
        ("x = ", "{a="),
        ("x = ", "{"),
        ("", "["),
        ("x", ".x"),
        ("[x", ".x"),
        ("", "\"\n"),
        ("", "a=1\n"),
    ] {
        let text = format!("{TOML}{start}{}", hostile.repeat(200_000 / hostile.len()));
        assert!(matches!(decode_toml(&text), Err(InitDataError::Toml { .. })), "{start}{hostile}");
    }
}
