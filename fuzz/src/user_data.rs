//! Properties of what a pod VM takes from its cloud: the answer of the metadata service, the cloud-config, the init-data.

use base64ct::{Base64, Encoding};
use user_data::cloud_config::{self, CloudConfigError, Fault};
use user_data::files::{FileName, InitData, UserData};
use user_data::http::{self, HttpError, Source};
use user_data::init_data::{self, InitDataError};

/// The longest error, in bytes.
const ERROR_MAX: usize = 300;

/// The first byte selects the reader of the rest.
pub(crate) fn exercise(data: &[u8]) {
    let Some((what, rest)) = data.split_first() else { return };
    match what {
        b'b' => drop(init_data(rest)),
        b'z' => drop(init_data(Base64::encode_string(rest).as_bytes())),
        b't' => toml(rest),
        b'h' => answer(rest),
        // An answer of Azure's wire server.
        b'x' => drop(user_data::azure_ready::xml::texts(rest)),
        // A cloud-config stands there as it is.
        _ => cloud_config(data),
    }
}

fn is_fit_for_a_log(shown: &str) {
    assert!(!shown.is_empty() && shown.len() <= ERROR_MAX, "{} bytes", shown.len());
    assert!(!shown.chars().any(char::is_control), "not for a log: {shown:?}");
}

fn cloud_config(text: &[u8]) {
    let read = cloud_config::read(text);
    match &read {
        Ok(user_data) => {
            is_within_its_limits(user_data, text);
            means_the_same_otherwise(user_data, text);
        }
        Err(error) => is_fit_for_a_log(&error.to_string()),
    }
    is_a_pod(cloud_config::parse(text), read);
    // Wherever it is cut, it is fetched again or its JSON is whole.
    for part in 1..8 {
        let _: Result<(), CloudConfigError> =
            cloud_config::parse(&text[..text.len() * part / 8]).map(|user_data| {
                is_json(&user_data, FileName::Apf).expect("a pod needs it");
            });
    }
}

fn is_within_its_limits(user_data: &UserData, text: &[u8]) {
    assert!(text.len() <= cloud_config::USER_DATA_MAX);
    assert!(user_data.files.len() + user_data.skipped.len() <= cloud_config::ITEMS_MAX);
    let mut names: Vec<FileName> = user_data.files.iter().map(|(name, _)| *name).collect();
    assert!(names.iter().all(|name| FileName::USER_DATA.contains(name)));
    names.sort();
    names.dedup();
    assert_eq!(names.len(), user_data.files.len(), "one of each");
    let lines = 1 + text.iter().filter(|byte| **byte == b'\n').count();
    for skipped in &user_data.skipped {
        assert!((1..=lines).contains(&skipped.line));
        is_fit_for_a_log(&skipped.to_string());
    }
    // An escape of two bytes may stand for a character of three.
    let bytes: usize = user_data.files.iter().map(|(_, content)| content.len()).sum();
    assert!(2 * bytes <= 3 * text.len(), "{bytes} bytes of {}", text.len());
}

/// A byte order mark, carriage returns and a comment before it change nothing.
fn means_the_same_otherwise(user_data: &UserData, text: &[u8]) {
    let text = std::str::from_utf8(text).expect("it was read");
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let crlf = text.replace("\r\n", "\n").replace('\n', "\r\n");
    for other in [format!("\u{feff}{text}"), format!("# c\n{text}"), crlf] {
        if other.len() <= cloud_config::USER_DATA_MAX {
            let again = cloud_config::read(other.as_bytes());
            assert_eq!(again.map(|again| again.files).as_ref(), Ok(&user_data.files), "{other:?}");
        }
    }
}

fn is_a_pod(parsed: Result<UserData, CloudConfigError>, read: Result<UserData, CloudConfigError>) {
    match (parsed, read) {
        (Ok(parsed), Ok(read)) => {
            assert_eq!(parsed, read);
            is_json(&parsed, FileName::Apf).expect("a pod needs it");
            is_json(&parsed, FileName::Auth);
        }
        (Err(error), Ok(_)) => {
            assert!(matches!(error.fault(), Fault::NoDaemonConfig | Fault::Incomplete(_)), "{error}");
            assert!(!error.is_permanent());
        }
        (parsed, read) => assert_eq!(parsed, read),
    }
}

fn is_json(user_data: &UserData, name: FileName) -> Option<()> {
    let (_, content) = user_data.files.iter().find(|(file, _)| *file == name)?;
    let text = std::str::from_utf8(content).expect("it is text").trim_ascii();
    assert!(text.starts_with('{') && text.ends_with('}'), "{text:?}");
    Some(())
}

/// A text behind gzip and base64 that are right.
fn toml(text: &[u8]) {
    let Some(length) = u16::try_from(text.len()).ok() else { return };
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    packed.extend([length.to_le_bytes(), (!length).to_le_bytes()].concat());
    packed.extend(text);
    let crc = !text.iter().fold(!0_u32, |crc, byte| {
        let shift = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        (0..8).fold(crc ^ u32::from(*byte), shift)
    });
    packed.extend(crc.to_le_bytes());
    packed.extend(u32::from(length).to_le_bytes());
    match init_data(Base64::encode_string(&packed).as_bytes()) {
        Ok(init_data) => assert_eq!(init_data.toml, text),
        Err(InitDataError::Toml { line, .. }) => {
            assert!((1..=1 + text.iter().filter(|byte| **byte == b'\n').count()).contains(&line));
        }
        Err(
            InitDataError::Missing(_)
            | InitDataError::Algorithm { .. }
            | InitDataError::Version { .. }
            | InitDataError::Doubtful { .. },
        ) => {}
        Err(error) => panic!("it is packed as it should be: {error}"),
    }
}

fn init_data(base64: &[u8]) -> Result<InitData, InitDataError> {
    let decoded = init_data::decode(base64);
    match &decoded {
        Ok(init_data) => {
            assert!(init_data.toml.len() <= init_data::TOML_MAX);
            assert!([64, 96, 128].contains(&init_data.digest.len()));
            assert!(init_data.digest.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
            assert!(init_data.files.iter().all(|(name, _)| FileName::INIT_DATA.contains(name)));
            init_data.skipped.iter().for_each(|skipped| is_fit_for_a_log(&skipped.to_string()));
            // The digest is of the text alone, however it is packed.
            let wrapped = base64.chunks(76).collect::<Vec<_>>().join(b"\r\n".as_slice());
            assert_eq!(init_data::decode(&wrapped).as_ref(), Ok(init_data));
        }
        Err(error) => is_fit_for_a_log(&error.to_string()),
    }
    decoded
}

/// A service that sends these bytes, a few at a time, and closes the connection.
struct Bytes<'d> {
    rest: &'d [u8],
    at_a_time: usize,
}

impl Source for Bytes<'_> {
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, HttpError> {
        let length = self.rest.len().min(buffer.len()).min(self.at_a_time);
        let (now, rest) = self.rest.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.rest = rest;
        Ok(length)
    }
}

/// How an answer arrives changes nothing.
fn answer(bytes: &[u8]) {
    let read = |at_a_time| http::read_answer(&mut Bytes { rest: bytes, at_a_time });
    let [whole, single] = [read(usize::MAX), read(1)];
    match (whole, single) {
        (Ok(whole), Ok(single)) => {
            assert_eq!(whole, single);
            assert!(whole.body.len() <= http::BODY_LIMIT);
            assert!(matches!(whole.status, 200..=299 | 400..=999));
            cloud_config(&whole.body);
        }
        (Err(whole), Err(single)) => {
            is_fit_for_a_log(&whole.to_string());
            is_fit_for_a_log(&single.to_string());
        }
        (whole, single) => panic!("{whole:?} {single:?}"),
    }
}
