use super::*;

/// A cloud-config with this item, which must begin with a dash.
fn config(items: &str) -> String {
    format!("#cloud-config\nwrite_files:\n{items}")
}

/// The text of cdh.toml in the item's `content: VALUE`.
fn content(value: &str) -> Result<String, CloudConfigError> {
    let text = config(&format!("- path: /run/peerpod/cdh.toml\n  content: {value}\n"));
    let user_data = read(text.as_bytes())?;
    let [(FileName::ConfidentialDataHub, content)] = user_data.files.as_slice() else {
        panic!("{user_data:?}");
    };
    Ok(String::from_utf8(content.clone()).unwrap())
}

fn fault(text: &str) -> (Option<usize>, Fault) {
    let error = read(text.as_bytes()).expect_err(text);
    (error.line(), error.fault())
}

#[test]
fn values_are_read_as_yaml_does() {
    for (value, expected) in [
        ("a b", "a b"),
        ("  a  ", "a"),
        ("a #b", "a"),
        ("a#b", "a#b"),
        ("-a", "-a"),
        ("?a", "?a"),
        (":a", ":a"),
        ("a:b", "a:b"),
        ("a\\nb", "a\\nb"),
        ("\"\"", ""),
        ("''", ""),
        ("'it''s' # c", "it's"),
        ("\"a # b: c\"", "a # b: c"),
        (
            r#""\0\a\b\t\n\v\f\r\e\ \"\\\N\_\L\P""#,
            "\0\u{7}\u{8}\t\n\u{b}\u{c}\r\u{1b} \"\\\u{85}\u{a0}\u{2028}\u{2029}",
        ),
        (r#""\x41\u00e9\U0001F600""#, "A\u{e9}\u{1f600}"),
        ("|\n    a\n     b\n    c", "a\n b\nc\n"),
        ("|-\n    a\n\n\n", "a"),
        ("|+\n    a\n\n\n", "a\n\n\n\n"),
        ("|\n\n \n    a\n\n    b\n\n", "\n\na\n\nb\n"),
        ("|\n    a\n      \n    b", "a\n  \nb\n"),
        ("|2\n      a\n    b", "  a\nb\n"),
        ("|1-\n    a", " a"),
        ("|-1\n    a", " a"),
        ("|   # c\n    # a", "# a\n"),
        ("|\n   a\n# c", "a\n"),
        ("|\n    a\t\tb", "a\t\tb\n"),
        ("|\n    a: b\n    - &c *d !e {f} [g] > % @", "a: b\n- &c *d !e {f} [g] > % @\n"),
    ] {
        assert_eq!(content(value), Ok(expected.to_owned()), "{value}");
    }
}

#[test]
fn what_is_not_a_plain_value_is_refused_by_name() {
    for (value, line, expected) in [
        ("&a b", 4, Fault::Anchor),
        ("*a", 4, Fault::Alias),
        ("!a b", 4, Fault::Tag),
        ("!!str b", 4, Fault::Tag),
        ("{}", 4, Fault::FlowStyle),
        ("[a]", 4, Fault::FlowStyle),
        (", a", 4, Fault::FlowStyle),
        (">", 4, Fault::Folded),
        (">-", 4, Fault::Folded),
        ("@a", 4, Fault::Reserved),
        ("`a", 4, Fault::Reserved),
        ("%a", 4, Fault::Reserved),
        ("? a", 4, Fault::ComplexKey),
        ("- a", 4, Fault::WrongType),
        ("a: b", 4, Fault::Colon),
        ("a:", 4, Fault::Colon),
        ("a\tb", 4, Fault::Tab),
        ("\"a", 4, Fault::OpenQuote),
        ("'a", 4, Fault::OpenQuote),
        ("\"a\\", 4, Fault::OpenQuote),
        ("\"a\" b", 4, Fault::Trailing),
        ("'a'b", 4, Fault::Trailing),
        ("'a'#b", 4, Fault::Trailing),
        ("\"\\/\"", 4, Fault::Escape),
        ("\"\\x4\"", 4, Fault::Escape),
        ("\"\\x+4\"", 4, Fault::Escape),
        ("\"\\ud83d\\ude00\"", 4, Fault::Escape),
        ("\"\\U00110000\"", 4, Fault::Escape),
        ("\"\\u\u{e9}\u{e9}\"", 4, Fault::Escape),
        ("|a", 4, Fault::BlockHeader),
        ("|0", 4, Fault::BlockHeader),
        ("|12", 4, Fault::BlockHeader),
        ("|--", 4, Fault::BlockHeader),
        ("|-+", 4, Fault::BlockHeader),
        ("| a", 4, Fault::BlockHeader),
        ("|#a", 4, Fault::BlockHeader),
        ("|\n    \ta", 5, Fault::Tab),
        ("|\n    a\n \tb", 6, Fault::Tab),
        ("|\n     \n    a", 6, Fault::Indentation),
        ("|\n    a\n   b", 6, Fault::Indentation),
        ("\n    a", 5, Fault::MultiLine),
        ("a\n    b", 5, Fault::MultiLine),
        ("'a'\n    b", 5, Fault::MultiLine),
        ("a\n b", 5, Fault::Indentation),
        ("\n  - a", 5, Fault::WrongType),
        ("a\n  content: b", 5, Fault::DuplicateKey),
        ("a\n  <<: b", 5, Fault::MergeKey),
        ("a\n  ? b", 5, Fault::ComplexKey),
        ("a\n  mode: b", 5, Fault::UnknownKey),
        ("a\n  b", 5, Fault::WrongType),
        ("a\n  'content': b", 5, Fault::DuplicateKey),
        ("a\n--- b", 5, Fault::DocumentMarker),
        ("|\n    a\n...", 6, Fault::DocumentMarker),
        ("a\n%TAG", 5, Fault::Directive),
        ("", 3, Fault::NoContent),
        ("~", 3, Fault::NoContent),
        ("NULL", 3, Fault::NoContent),
        ("|", 3, Fault::NoContent),
        ("|\n\n", 3, Fault::NoContent),
    ] {
        let error = content(value).expect_err(value);
        assert_eq!((error.line(), error.fault()), (Some(line), expected), "{value}");
    }
}

#[test]
fn keys_and_items_stand_in_their_columns() {
    for items in [
        "- path: /run/peerpod/cdh.toml\n  content: a\n",
        "    - path: /run/peerpod/cdh.toml\n      content: a\n",
        "  -   path: /run/peerpod/cdh.toml\n      content: a\n",
        "  - # c\n   # c\n\n   path: /run/peerpod/cdh.toml\n\n# c\n   content: a\n",
        "- content: a\n  path: /run/peerpod/cdh.toml\n",
        "- content: |-\n   a\n  path: '/run/peerpod/cdh.toml'\n",
        "- \"path\" : \"/run/peerpod/cdh.toml\"\n  'content': a\n",
        "- path: /etc/passwd\n- path: /run/peerpod/cdh.toml\n  content: a\n",
        "- path: /run/peerpod/cdh.toml\n  content: a\n- content: b\n- path: ''\n",
    ] {
        for text in [config(items), config(items).replace('\n', "\r\n"), format!("\u{feff}{}", config(items))]
        {
            let user_data = read(text.as_bytes()).unwrap();
            assert_eq!(user_data.files, [(FileName::ConfidentialDataHub, b"a".to_vec())], "{text}");
        }
    }
    for (items, line, expected) in [
        (" - path: a\n- path: b\n", 4, Fault::Indentation),
        ("- path: a\n - path: b\n", 4, Fault::Indentation),
        ("  - path: a\n     content: b\n", 4, Fault::MultiLine),
        ("  - path: a\n   content: b\n", 4, Fault::Indentation),
        ("  - path: a\n  content: b\n", 4, Fault::Indentation),
        ("  path: a\n", 3, Fault::WrongType),
        ("path: a\n", 3, Fault::UnknownKey),
        ("- - path: a\n", 3, Fault::WrongType),
        ("- a\n", 3, Fault::WrongType),
        ("-\n", 3, Fault::WrongType),
        ("-\n- path: a\n", 3, Fault::WrongType),
        ("- path:a\n", 3, Fault::WrongType),
        ("- \"path\":a\n", 3, Fault::WrongType),
        ("- &a\n", 3, Fault::Anchor),
        ("- |\n", 3, Fault::WrongType),
        ("- {path: a}\n", 3, Fault::FlowStyle),
        ("- path: a\n  path: b\n", 4, Fault::DuplicateKey),
        ("- path: a\nwrite_files:\n", 4, Fault::DuplicateKey),
        ("- path: a\nruncmd:\n", 4, Fault::UnknownKey),
        ("- path: a\n\tcontent: b\n", 4, Fault::Tab),
        ("- path: a\n\t\n", 4, Fault::Tab),
        ("- path: a\n \t# c\n", 4, Fault::Tab),
        ("-\tpath: a\n", 3, Fault::Tab),
    ] {
        assert_eq!(fault(&config(items)), (Some(line), expected), "{items}");
    }
}

#[test]
fn of_two_items_with_one_path_the_last_counts() {
    let two = "- path: /run/peerpod/cdh.toml\n  content: a\n- path: /run/peerpod/cdh.toml\n  content: b\n";
    assert_eq!(read(config(two).as_bytes()).unwrap().files, [(FileName::ConfidentialDataHub, b"b".to_vec())]);
}

#[test]
fn an_item_for_another_path_is_noted_not_kept() {
    let items = "- path: /run/peerpod/policy.rego\n  content: a\n- content: b\n- path: ~\n- path: /a\n";
    let user_data = read(config(items).as_bytes()).unwrap();
    assert_eq!(user_data.files, []);
    let notes: Vec<String> = user_data.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        notes,
        [
            "line 3: an item for a path that user data may not write: skipped",
            "line 5: an item without a path: skipped",
            "line 6: an item without a path: skipped",
            "line 7: an item for a path that user data may not write: skipped",
        ]
    );
}

#[test]
fn items_and_bytes_are_limited() {
    let items = "- path: /a\n".repeat(ITEMS_MAX);
    assert_eq!(read(config(&items).as_bytes()).unwrap().skipped.len(), ITEMS_MAX);
    assert_eq!(fault(&config(&format!("{items}- path: /a\n"))), (Some(3 + ITEMS_MAX), Fault::TooManyItems));
    let mut text = config("- path: /a\n#");
    text.push_str(&"x".repeat(USER_DATA_MAX - text.len()));
    assert_eq!(read(text.as_bytes()).map(|user_data| user_data.skipped.len()), Ok(1));
    text.push('x');
    assert_eq!(fault(&text), (None, Fault::TooLarge));
}

#[test]
fn a_pod_needs_a_complete_daemon_config() {
    let with = |apf: &str, auth: &str| {
        let item = |name, content: &str| format!("- path: /run/peerpod/{name}\n  content: '{content}'\n");
        parse(config(&(item("apf.json", apf) + &item("auth.json", auth))).as_bytes()).map(|_| ())
    };
    assert_eq!(with("{\"a\": [1, null, {}]}", " {} "), Ok(()));
    for apf in ["", "{", "{\"a\": 1", "{\"a\": 1,}", "{} {}", "[]", "null", "\"{}\"", "1"] {
        let error = with(apf, "{}").expect_err(apf);
        assert_eq!((error.fault(), error.is_permanent()), (Fault::Incomplete(FileName::Apf), false), "{apf}");
        let error = with("{}", apf).expect_err(apf);
        assert_eq!(
            (error.fault(), error.is_permanent()),
            (Fault::Incomplete(FileName::Auth), false),
            "{apf}"
        );
    }
    let error = parse(config("- path: /run/peerpod/cdh.toml\n  content: a\n").as_bytes()).unwrap_err();
    assert_eq!((error.fault(), error.is_permanent()), (Fault::NoDaemonConfig, false));
}

#[test]
fn depth_of_json_costs_nothing() {
    let deep = |text: &str| config(&format!("- path: /run/peerpod/apf.json\n  content: |\n    {text}\n"));
    let open = format!("{{\"a\": {}", "[".repeat(100_000));
    let whole = format!("{open}{}}}", "]".repeat(100_000));
    assert!(parse(deep(&whole).as_bytes()).is_ok());
    assert_eq!(parse(deep(&open).as_bytes()).unwrap_err().fault(), Fault::Incomplete(FileName::Apf));
}

#[test]
fn other_kinds_of_user_data_are_named() {
    for (bytes, expected) in [
        (b"\x1f\x8b\x08\x00".as_slice(), Fault::Gzip),
        (b"\xff\xfe#\x00", Fault::Utf16),
        (b"\xfe\xff\x00#", Fault::Utf16),
        (b"Content-Type: multipart/mixed", Fault::Mime),
        (b"mime-version: 1.0", Fault::Mime),
        (b"I2Nsb3VkLWNvbmZpZwo=\n", Fault::Base64),
        (b"I2Nsb3VkLWNv\r\nbmZpZwo=", Fault::Base64),
        (b"#\x00c\x00\n", Fault::ControlCharacter),
        (b"a\x7f\n", Fault::ControlCharacter),
        (b"\xc2\x80\n", Fault::ControlCharacter),
        (b"a: \xe9\n", Fault::NotUtf8),
        (b"a\rb\n", Fault::LineBreak),
        (b"\xef\xbb\xbf", Fault::Empty),
        (b"", Fault::Empty),
        (b"<html>\n", Fault::WrongType),
    ] {
        assert_eq!(read(bytes).unwrap_err().fault(), expected, "{bytes:?}");
    }
}

#[test]
fn a_fault_of_an_unfinished_last_line_may_be_a_cut() {
    for (text, is_permanent) in [
        ("write_files:\n- pa", false),
        ("write_files:\n- path: /a\n- content: a\n", false),
        ("write_files:\n- pa\n", true),
        ("write_files:\n- path: /a\n  mode: 1\n- path: /run", true),
        ("write_files:\n- path: /run/peerpod/cdh.to", false),
        ("write_files:\n- path: '/run/peerpod/cdh.to'", true),
        ("write_files:\n- content: a\n  path: /run/peerpod/cdh.toml", true),
        ("write_files:\n- path: /run/peerpod/cdh.toml\n  content: a", false),
        ("write_files:\n- path: /run/peerpod/cdh.toml\n  content: |\n   a", false),
        ("write_files:\n- path: /run/peerpod/cdh.toml\n  content: |\n   a\n   ", false),
        ("write_files:\n- path: /run/peerpod/cdh.toml\n  content: 'a'", true),
        ("write_files:\n- path: /run/peerpod/cdh.toml\n  content: 'a", false),
        ("write_files:\r\n- path: /run/peerpod/cdh.toml\r", false),
    ] {
        let is_refused_as_cut = read(text.as_bytes()).is_err_and(|error| !error.is_permanent());
        assert_eq!(is_refused_as_cut, !is_permanent, "{text:?}");
    }
    let half_a_character = read(b"write_files:\n- path: \xc3").unwrap_err();
    assert_eq!((half_a_character.fault(), half_a_character.is_permanent()), (Fault::NotUtf8, false));
}

#[test]
fn an_error_names_the_line_and_the_fault() {
    let shown = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
    assert_eq!(shown("a: b\n"), "line 1: an unknown key; expected write_files with path and content");
    assert_eq!(
        shown("write_files:\n-"),
        "line 2: expected write_files: with a list of items that have a path and a content; \
         this is the last line and has no line break: is the text cut?"
    );
    assert_eq!(Fault::Incomplete(FileName::Apf).to_string(), "apf.json: not a complete JSON object");
}
