//! The settings' file: TOML, whose keys are the names of the flags.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use secure_comms_keys::text::{escape, one_line};
use strsim::jaro_winkler;
use toml::de::{DeTable, DeValue};

use super::variables::SIMILAR;
use crate::cli::setting::{Kind, SERVE, Setting};

/// Where the file is looked for without a flag.
pub const DEFAULT_CONFIG: &str = "/etc/secure-comms/adaptor.toml";
/// The largest file, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// Bits of the mode that let others write.
const WRITABLE: u32 = 0o022;
/// Longest key that is shown.
const KEY_MAX: usize = 100;

/// The values of a settings' file, by the names of the settings.
#[derive(Clone, Debug, Default)]
pub(super) struct SettingsFile {
    path: PathBuf,
    values: BTreeMap<&'static str, (usize, Vec<String>)>,
}

impl SettingsFile {
    /// Reads a file. Its content decides which VMs get keys, so it must not be writable for others.
    ///
    /// # Errors
    /// All faults of the file, each with its line. One that is not there has none, unless it is `required`.
    pub(super) fn read(path: &Path, required: bool) -> Result<Self, Vec<String>> {
        match read(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(error) => Err(vec![escape(&format!("{}: {error}", path.display()))]),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Vec<String>> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let at = |offset: usize| format!("{}:{}", path.display(), line_of(text, offset));
        let fault = |error: &toml::de::Error| {
            let place = error.span().map_or_else(|| path.display().to_string(), |span| at(span.start));
            escape(&format!("{place}: not TOML: {}", error.message()))
        };
        let mut faults: Vec<(usize, String)> =
            errors.iter().map(|error| (error.span().map_or(0, |span| span.start), fault(error))).collect();
        let mut values = BTreeMap::new();
        for (key, value) in table.get_ref() {
            let start = key.span().start;
            let Some(setting) = SERVE.iter().find(|setting| setting.name == key.get_ref().as_ref()) else {
                faults.push((start, format!("{}: {}", at(start), unknown(key.get_ref()))));
                continue;
            };
            match texts(setting, value.get_ref()) {
                Ok(texts) => drop(values.insert(setting.name, (line_of(text, start), texts))),
                Err(expected) => {
                    faults.push((start, format!("{}: {}: expected {expected}", at(start), setting.name)));
                }
            }
        }
        if faults.is_empty() {
            return Ok(Self { path: path.to_owned(), values });
        }
        faults.sort();
        Err(faults.into_iter().map(|(_, fault)| fault).collect())
    }

    /// The value of a setting, and `FILE:LINE`.
    pub(super) fn get(&self, setting: &Setting) -> Option<(&Path, usize, &[String])> {
        self.values.get(setting.name).map(|(line, texts)| (self.path.as_path(), *line, texts.as_slice()))
    }
}

fn read(path: &Path) -> io::Result<String> {
    // Else a FIFO would hold the start up until it has a writer.
    let mut file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    let status = file.metadata()?;
    if !status.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if status.permissions().mode() & WRITABLE != 0 {
        let mode = status.permissions().mode() & 0o7777;
        return Err(io::Error::other(format!("others may write it (mode {mode:04o}): run chmod go-w on it")));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > FILE_MAX) {
        return Err(io::Error::other("longer than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("not UTF-8"))
}

/// The number of a line, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn unknown(key: &str) -> String {
    let similarity = |setting: &&&Setting| jaro_winkler(&key.replace('_', "-"), setting.name);
    let nearest = SERVE.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    let advice = match nearest.filter(|setting| similarity(setting) >= SIMILAR) {
        Some(setting) => format!("did you mean {}?", setting.name),
        None => "see secure-comms-adaptor config show for the keys".to_owned(),
    };
    format!("unknown key '{}': {advice}", one_line(key, KEY_MAX))
}

/// The value as texts, as a flag has them; or what is expected instead.
fn texts(setting: &Setting, value: &DeValue<'_>) -> Result<Vec<String>, &'static str> {
    let expected = match setting.kind {
        Kind::Text => "a string, as \"x\"",
        Kind::Number => "a whole number, or a string",
        Kind::Switch | Kind::Boolean => "true or false",
        Kind::List => "a list of strings, as [\"x\", \"y\"]",
    };
    let one = |text: &str| Ok(vec![text.to_owned()]);
    match (setting.kind, value) {
        (Kind::Switch, DeValue::Boolean(on)) => one(if *on { "on" } else { "off" }),
        (Kind::Boolean, DeValue::Boolean(on)) => one(if *on { "true" } else { "false" }),
        (Kind::Number, DeValue::Integer(number)) if number.radix() == 10 => {
            one(&number.as_str().replace('_', ""))
        }
        (_, DeValue::String(text)) => one(text),
        (Kind::List, DeValue::Array(values)) => values
            .iter()
            .map(|value| match value.get_ref() {
                DeValue::String(text) => Ok(text.to_string()),
                DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().replace('_', "")),
                _ => Err(expected),
            })
            .collect(),
        _ => Err(expected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::setting::{CAA, DefaultValue, GRACE, INBOUNDS, LISTEN_PORT, NO_TRUSTEE};

    fn parse(text: &str) -> Result<SettingsFile, Vec<String>> {
        SettingsFile::parse(Path::new("/f"), text)
    }

    #[test]
    fn values_have_the_line_of_their_key() {
        let file = parse(
            "# x\ncaa = false\n\ngrace = \"5m\"\ninbounds = [\n  \"a\",\n  \"b\",\n]\nlisten-port = 15_152\nno-trustee = true",
        )
        .unwrap();
        let of = |setting: &Setting| file.get(setting).map(|(_, line, texts)| (line, texts.join(" ")));
        assert_eq!(of(&CAA), Some((2, "off".to_owned())));
        assert_eq!(of(&GRACE), Some((4, "5m".to_owned())));
        assert_eq!(of(&INBOUNDS), Some((5, "a b".to_owned())));
        assert_eq!(of(&LISTEN_PORT), Some((9, "15152".to_owned())));
        assert_eq!(of(&NO_TRUSTEE), Some((10, "true".to_owned())));
        assert_eq!(of(&crate::cli::setting::STORE), None);
    }

    #[test]
    fn all_faults_come_with_their_lines() {
        let faults =
            parse("kbs_url = \"x\"\ngrace = 5.5\nzzz = 1\ninbounds = [1.5]\n[caa]\nx = 1\n").unwrap_err();
        assert_eq!(
            faults,
            [
                "/f:1: unknown key 'kbs_url': did you mean kbs-url?",
                "/f:2: grace: expected a string, as \"x\"",
                "/f:3: unknown key 'zzz': see secure-comms-adaptor config show for the keys",
                "/f:4: inbounds: expected a list of strings, as [\"x\", \"y\"]",
                "/f:5: caa: expected true or false",
            ]
        );
        let faults = parse("grace = \"5m\"\ngrace = \"6m\"\nstore =\n").unwrap_err();
        assert!(
            faults[0].starts_with("/f:2: not TOML: ") && faults[1].starts_with("/f:3: not TOML: "),
            "{faults:?}"
        );
    }

    #[test]
    fn the_example_file_has_every_setting_and_its_default() {
        let example = include_str!("../../../deploy/adaptor.toml");
        let is_value =
            |line: &str| line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', ':', '`']));
        let values = example.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| is_value(line));
        let file = parse(&values.collect::<Vec<_>>().join("\n")).unwrap();
        for setting in SERVE {
            let (_, _, texts) = file.get(setting).unwrap_or_else(|| panic!("{} is missing", setting.name));
            match setting.default {
                DefaultValue::Text(default) => {
                    let texts = texts.join(" ").replace("true", "on").replace("false", "off");
                    let default = default.replace("true", "on").replace("false", "off");
                    assert_eq!(texts, default, "{}", setting.name);
                }
                DefaultValue::List(default) => assert_eq!(texts, default, "{}", setting.name),
                DefaultValue::None | DefaultValue::Derived(_) => {}
            }
            assert!(setting.variables.iter().all(|variable| example.contains(variable)), "{}", setting.name);
        }
        assert!(parse(example).is_ok());
    }

    #[test]
    fn the_reference_lists_every_setting() {
        let reference = include_str!("../../../docs/operations/REFERENCE.md");
        let (_, table) = reference.split_once("### `serve`").unwrap();
        let (table, _) = table.split_once("\n### ").unwrap();
        for setting in SERVE {
            let row = table.lines().find(|line| line.starts_with(&format!("| `{}` |", setting.name)));
            let row = row.unwrap_or_else(|| panic!("{} is missing", setting.name));
            for variable in setting.variables {
                assert!(row.contains(&format!("`{variable}`")), "{row}");
            }
            if let DefaultValue::Text(default) = setting.default {
                assert!(row.contains(&format!("| `{default}` |")), "{default}: {row}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC{0,80}|([a-z-]{1,8} ?= ?[\"'\\[\\]{}0-9a-z.,\n]{0,9}\n?){0,6}") {
            if let Err(faults) = parse(&text) {
                for fault in faults {
                    proptest::prop_assert!(!fault.contains('\n'), "{}", fault);
                }
            }
        }
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let read = |mode: u32, required| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            SettingsFile::read(&path, required).map(|file| file.values.len())
        };
        assert_eq!(SettingsFile::read(&path, false).map(|file| file.values.len()), Ok(0));
        assert!(SettingsFile::read(&path, true).unwrap_err()[0].contains("No such file"));
        std::fs::write(&path, "caa = true\n").unwrap();
        assert_eq!(read(0o644, true), Ok(1));
        assert_eq!(
            read(0o646, false),
            Err(vec![format!("{}: others may write it (mode 0646): run chmod go-w on it", path.display())])
        );
        assert!(read(0o664, false).is_err());
        assert!(SettingsFile::read(dir.path(), false).unwrap_err()[0].contains("not a regular file"));
        std::fs::write(&path, vec![b'#'; 1 << 21]).unwrap();
        assert!(read(0o644, true).unwrap_err()[0].contains("longer than 1 MiB"));
    }
}
