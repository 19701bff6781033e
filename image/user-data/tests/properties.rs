//! Properties of the readers, for any input: a hostile cloud writes it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

mod common;

use base64ct::{Base64, Encoding};
use proptest::prelude::*;
use user_data::files::{FileName, UserData};
use user_data::init_data::InitDataError;
use user_data::{cloud_config, init_data};

/// The longest error, in bytes.
const ERROR_MAX: usize = 300;
/// A word that no error may repeat.
const SECRET: &str = "hunter2";

/// Pieces of YAML, so that texts get past the first line.
fn yaml() -> impl Strategy<Value = String> {
    let pieces = [
        "write_files:\n",
        "- ",
        "  - ",
        "path: ",
        "content: ",
        "/run/peerpod/",
        "apf.json",
        "cdh.toml",
        "|",
        "|-",
        "|+",
        "|2",
        ">",
        "\n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "    ",
        "      ",
        "'",
        "\"",
        "\\",
        "\\x4",
        "{",
        "}",
        "[",
        "&a ",
        "*a",
        "!a ",
        "<<: ",
        "? ",
        ": ",
        "#",
        " #",
        "---\n",
        "...\n",
        "%YAML",
        "~",
        "\u{feff}",
        "\u{e9}",
        "\u{2028}",
        "\0",
        SECRET,
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..40).prop_map(|pieces| pieces.concat())
}

/// The text of a file as a block can hold it: it begins with no space and ends in one line break.
fn block() -> impl Strategy<Value = String> {
    (
        "[!-~\u{a0}-\u{2027}\u{1f600}]",
        prop::collection::vec("[ -~\t\u{a0}-\u{2027}\u{1f600}]{0,12}", 0..6),
        "[!-~]",
    )
        .prop_map(|(first, lines, last)| format!("{first}{}{last}\n", lines.join("\n")))
}

/// A JSON object in the generator's style.
fn json() -> impl Strategy<Value = String> {
    prop::collection::btree_map("[a-z]{1,4}", "[ -~\u{a0}-\u{2027}\u{1f600}]{0,12}", 0..5)
        .prop_map(|object| serde_json::to_string_pretty(&object).unwrap() + "\n")
}

/// Files, as the generator orders them.
fn files() -> impl Strategy<Value = Vec<(FileName, String)>> {
    let base64 =
        prop::collection::vec(any::<u8>(), 1..200).prop_map(|bytes| Base64::encode_string(&bytes) + "\n");
    (json(), prop::option::of(json()), prop::option::of(base64), any::<bool>(), prop::option::of(block()))
        .prop_map(|(apf, auth, init_data, has_marker, cdh)| {
            let mut files = vec![(FileName::Apf, apf)];
            files.extend(auth.map(|text| (FileName::Auth, text)));
            files.extend(init_data.map(|text| (FileName::InitData, text)));
            files.extend(cdh.map(|text| (FileName::ConfidentialDataHub, text)));
            files.extend(has_marker.then(|| (FileName::ScratchSpaceMarker, String::new())));
            files
        })
}

/// Writes files as cloud-api-adaptor's generator does.
fn generate(files: &[(FileName, String)]) -> String {
    let mut text = "#cloud-config\n\nwrite_files:\n".to_owned();
    for (name, content) in files {
        text += &format!("  - path: /run/peerpod/{}\n", name.as_str());
        if !content.is_empty() {
            text += "    content: |\n";
            // A blank line is written without its indentation, or with it.
            text.extend(content.lines().map(|line| format!("      {line}\n")));
        }
    }
    text
}

/// How else the same may be written.
#[derive(Clone, Debug)]
struct Style {
    list: usize,
    more: usize,
    text: usize,
    is_content_first: bool,
    line_break: &'static str,
    quote: &'static str,
    comment: &'static str,
}

fn style() -> impl Strategy<Value = Style> {
    let line_break = prop::sample::select(vec!["\n", "\r\n"]);
    let quote = prop::sample::select(vec!["", "'", "\""]);
    let comment = prop::sample::select(vec!["", "\n", " # c\n", "#c\n\n"]);
    (0..5_usize, 0..3_usize, 1..6_usize, any::<bool>(), line_break, quote, comment).prop_map(
        |(list, more, text, is_content_first, line_break, quote, comment)| Style {
            list,
            more,
            text,
            is_content_first,
            line_break,
            quote,
            comment,
        },
    )
}

fn write(files: &[(FileName, String)], style: &Style) -> String {
    let Style { list, more, text, is_content_first, line_break, quote, comment } = style.clone();
    let column = list + 2 + more;
    let mut written = format!("{comment}write_files: # c\n{comment}");
    for (name, content) in files {
        let path = format!("{quote}path{quote}: {quote}/run/peerpod/{}{quote}\n", name.as_str());
        let mut block = "content: |\n".to_owned();
        block.extend(content.lines().map(|line| format!("{:indent$}{line}\n", "", indent = column + text)));
        let keys = match (content.is_empty(), is_content_first) {
            (true, _) => vec![path],
            (false, true) => vec![block, path],
            (false, false) => vec![path, block],
        };
        written += &format!(
            "{:list$}-{:more$}{}",
            "",
            "",
            keys.join(&format!("{comment}{:column$}", "")),
            more = more + 1
        );
        written += comment;
    }
    written.replace('\n', line_break)
}

fn bytes(files: &[(FileName, String)]) -> Vec<(FileName, Vec<u8>)> {
    files.iter().map(|(name, text)| (*name, text.clone().into_bytes())).collect()
}

fn is_fit_for_a_log(shown: &str) -> bool {
    !shown.is_empty()
        && shown.len() <= ERROR_MAX
        && !shown.chars().any(char::is_control)
        && !shown.contains(SECRET)
}

fn judge(result: Result<UserData, cloud_config::CloudConfigError>) {
    match result {
        Ok(user_data) => {
            assert!(user_data.skipped.len() + user_data.files.len() <= cloud_config::ITEMS_MAX);
            assert!(user_data.skipped.iter().all(|skipped| is_fit_for_a_log(&skipped.to_string())));
        }
        Err(error) => assert!(is_fit_for_a_log(&error.to_string()), "{error}"),
    }
}

proptest! {
    #[test]
    fn no_bytes_break_the_readers(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        judge(cloud_config::read(&bytes));
        if let Err(error) = init_data::decode(&bytes) {
            prop_assert!(is_fit_for_a_log(&error.to_string()), "{}", error);
        }
        // The same behind valid base64.
        if let Err(error) = init_data::decode(Base64::encode_string(&bytes).as_bytes()) {
            prop_assert!(is_fit_for_a_log(&error.to_string()), "{}", error);
        }
    }

    #[test]
    fn no_yaml_breaks_the_reader(text in yaml(), prefix in any::<bool>()) {
        judge(cloud_config::parse(text.as_bytes()));
        let start = if prefix { "write_files:\n  - path: /run/peerpod/cdh.toml\n    content: " } else { "write_files:\n" };
        judge(cloud_config::read(format!("{start}{text}").as_bytes()));
    }

    #[test]
    fn no_toml_breaks_the_reader(text in "[a-z0-9 .=\\[\\]{}'\"#\n\r\\\\\u{0}\u{e9}-]{0,120}", keys in any::<bool>()) {
        let head = if keys { "algorithm = 'sha256'\nversion = '0.1.0'\n[data]\n" } else { "" };
        let toml = format!("{head}{text}{SECRET}");
        let base64 = Base64::encode_string(&common::gzip(toml.as_bytes(), 1));
        match init_data::decode(base64.as_bytes()) {
            Ok(init_data) => prop_assert_eq!(init_data.toml, toml.as_bytes()),
            Err(error) => prop_assert!(is_fit_for_a_log(&error.to_string()), "{}", error),
        }
    }

    #[test]
    fn what_the_generator_writes_is_read_back(files in files()) {
        let user_data = cloud_config::parse(generate(&files).as_bytes()).unwrap();
        prop_assert_eq!(user_data, UserData { files: bytes(&files), skipped: Vec::new() });
    }

    #[test]
    fn every_style_of_the_subset_means_the_same(files in files(), style in style()) {
        let text = write(&files, &style);
        let user_data = cloud_config::parse(text.as_bytes());
        prop_assert_eq!(user_data, Ok(UserData { files: bytes(&files), skipped: Vec::new() }), "{}", text);
    }

    #[test]
    fn a_cut_text_is_fetched_again_or_complete_as_far_as_it_goes(files in files(), style in style(), at in any::<prop::sample::Index>()) {
        for text in [generate(&files), write(&files, &style)] {
            let cut = &text.as_bytes()[..at.index(text.len())];
            match cloud_config::parse(cut) {
                Err(error) => prop_assert!(!error.is_permanent(), "{}: {}", error, text),
                Ok(user_data) => {
                    // Half a path is none that another program may have meant.
                    prop_assert_eq!(&user_data.skipped, &[]);
                    let whole = bytes(&files);
                    for (index, (name, content)) in user_data.files.iter().enumerate() {
                        prop_assert_eq!(*name, whole[index].0);
                        let is_partial = whole[index].1 != *content;
                        // Init-data have their own checks; JSON without its last line break is complete.
                        let is_last = index + 1 == user_data.files.len();
                        let may_be_partial = match name {
                            FileName::Apf | FileName::Auth => whole[index].1.trim_ascii_end() == content.trim_ascii_end(),
                            FileName::InitData => true,
                            // Cut between two lines: no one can see that.
                            FileName::ConfidentialDataHub => content.ends_with(b"\n"),
                            _ => false,
                        };
                        prop_assert!(!is_partial || (is_last && may_be_partial), "{:?} {}", name, text);
                    }
                }
            }
        }
    }

    #[test]
    fn any_text_can_be_quoted(text in "[\\PC\n\t\r\u{0}\u{7f}]{0,40}") {
        let mut double = String::new();
        for character in text.chars() {
            match character {
                ' '..='~' if !"\"\\".contains(character) => double.push(character),
                _ => double += &format!("\\U{:08x}", u32::from(character)),
            }
        }
        let single = text.replace('\'', "''");
        let is_one_line = !text.chars().any(|character| character.is_control() || "\u{2028}\u{2029}\u{fffe}\u{ffff}".contains(character));
        for value in [Some(format!("\"{double}\"")), is_one_line.then(|| format!("'{single}'"))].into_iter().flatten() {
            let config = format!("write_files:\n- content: {value}\n  path: /run/peerpod/aa.toml\n");
            let user_data = cloud_config::read(config.as_bytes()).unwrap();
            prop_assert_eq!(&user_data.files, &[(FileName::AttestationAgent, text.clone().into_bytes())]);
        }
    }

    #[test]
    fn init_data_are_what_was_packed(policy in "\\PC{0,300}", level in 0..10_u8, split in any::<prop::sample::Index>(), width in 1..100_usize) {
        // JSON's escapes are TOML's, but for this one.
        let escaped = serde_json::to_string(&policy).unwrap().replace('\u{7f}', "\\u007f");
        let toml = format!("version = '0.1.0'\nalgorithm = 'sha512'\n[data]\n\"policy.rego\" = {escaped}\n");
        let (head, tail) = toml.as_bytes().split_at(split.index(toml.len()));
        let packed = [common::gzip(head, level), common::gzip(tail, 9 - level)].concat();
        let base64 = Base64::encode_string(&packed);
        let wrapped = base64.as_bytes().chunks(width).collect::<Vec<_>>().join(b"\r\n".as_slice());
        let init_data = init_data::decode(&wrapped).unwrap();
        prop_assert_eq!(init_data.toml, toml.as_bytes());
        prop_assert_eq!(init_data.digest.len(), 128);
        prop_assert_eq!(init_data.files, [(FileName::Policy, policy.into_bytes())]);
    }

    #[test]
    fn damaged_init_data_are_refused(at in any::<prop::sample::Index>(), bit in 0..8_u8, is_cut in any::<bool>()) {
        let mut packed = common::gzip(b"algorithm = 'sha256'\nversion = '0.1.0'\n[data]\n'aa.toml' = 'a a a a a'\n", 6);
        let at = at.index(packed.len());
        if is_cut {
            let cut = init_data::decode(Base64::encode_string(&packed[..at]).as_bytes());
            prop_assert!(cut.is_err_and(|error| !error.is_permanent()));
            let base64 = Base64::encode_string(&packed);
            let cut = init_data::decode(&base64.as_bytes()[..at]);
            prop_assert!(cut.is_err_and(|error| !error.is_permanent()));
        } else if !(4..10).contains(&at) {
            packed[at] ^= 1 << bit;
            let damaged = init_data::decode(Base64::encode_string(&packed).as_bytes());
            let is_same = damaged == init_data::decode(Base64::encode_string(&{ packed[at] ^= 1 << bit; packed }).as_bytes());
            // A bit of the header's flags that says nothing about the text, or of padding.
            prop_assert!(damaged.is_err() || is_same);
            let is_silent = matches!(damaged, Err(InitDataError::Algorithm { .. } | InitDataError::Toml { .. }));
            prop_assert!(!is_silent, "the checksum comes first");
        }
    }
}
