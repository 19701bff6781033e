//! Reads each setting from the source that counts: flag, variable, file, default. Collects the faults of all of them.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use secure_comms_keys::text::escape;
use secure_comms_protocol::PodId;
use secure_comms_protocol::tag::{Tag, parse_lists};

use super::file::{DEFAULT_CONFIG, SettingsFile};
use super::{Env, UsageError};
use crate::cli::setting::{DefaultValue, Flags, Kind, Setting};

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nothing sets it.
    Default,
    /// A line of the settings' file.
    File(PathBuf, usize),
    /// This environment variable.
    Variable(&'static str),
    /// Its flag.
    Flag,
}

/// What sets a setting.
pub(super) struct Given {
    /// What faults name: the flag, the variable, or the line of the file.
    pub(super) name: String,
    pub(super) source: Source,
    pub(super) values: Vec<OsString>,
}

/// Reads flags, variables and the file, and collects their faults.
pub(super) struct SettingsReader<'a> {
    env: Env<'a>,
    flags: Flags,
    file: SettingsFile,
    pub(super) faults: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl<'a> SettingsReader<'a> {
    /// A reader of flags and the environment.
    pub(super) fn with_flags(env: Env<'a>, flags: Flags) -> Self {
        Self { env, flags, file: SettingsFile::default(), faults: Vec::new(), warnings: Vec::new() }
    }

    /// Reads the settings' file as well.
    pub(super) fn with_file(env: Env<'a>, flags: Flags, file: Option<PathBuf>) -> Self {
        let mut reader = Self::with_flags(env, flags);
        let named = file.or_else(|| {
            (reader.env)("SECURE_COMMS_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
        });
        let (path, required) =
            named.as_deref().map_or((Path::new(DEFAULT_CONFIG), false), |path| (path, true));
        match SettingsFile::read(path, required) {
            Ok(file) => reader.file = file,
            Err(faults) => reader.faults.extend(faults),
        }
        reader
    }

    pub(super) fn fault(&mut self, name: &str, value: &str, expected: impl fmt::Display) {
        self.faults.push(escape(&format!("{name} '{value}': {expected}")));
    }

    pub(super) fn missing(&mut self, flag: &str, what: &str) {
        self.faults.push(format!("{flag}: missing: {what}"));
    }

    /// A setting of a KBS, given although there is none.
    pub(super) fn contradicts_no_trustee(&mut self, name: &str) {
        let advice = "contradicts --no-trustee (or SECURE_COMMS_NO_TRUSTEE=true): remove one of them";
        self.faults.push(format!("{name}: {advice}"));
    }

    /// What sets a setting; `None`: nothing does.
    pub(super) fn given(&self, setting: &Setting) -> Option<Given> {
        if let Some(values) = self.flags.get(setting) {
            return Some(Given { name: setting.flag(), source: Source::Flag, values: values.to_vec() });
        }
        // Empty counts as unset, because a config map cannot leave a variable out for single pods.
        let set = |name: &&'static str| Some((*name, (self.env)(name).filter(|value| !value.is_empty())?));
        if let Some((name, value)) = setting.variables.iter().find_map(set) {
            return Some(Given {
                name: name.to_owned(),
                source: Source::Variable(name),
                values: vec![value],
            });
        }
        let (path, line, texts) = self.file.get(setting)?;
        let name = format!("{}:{line}: {}", path.display(), setting.name);
        let values = texts.iter().map(OsString::from).collect();
        Some(Given { name, source: Source::File(path.to_owned(), line), values })
    }

    /// What sets a setting to something else than its default for this node. Variables do not: a config map sets them for all.
    pub(super) fn given_on_purpose(&self, setting: &Setting) -> Option<Given> {
        let given = self.given(setting)?;
        let is_default = matches!(setting.default, DefaultValue::Text(text) if given.values == [text]);
        match given.source {
            Source::Flag => Some(given),
            // `config show` writes all of them.
            Source::File(..) => Some(given).filter(|_| !is_default),
            Source::Variable(_) | Source::Default => None,
        }
    }

    /// The value of a setting, also if it is the default.
    pub(super) fn given_or_default(&self, setting: &Setting) -> Option<Given> {
        self.given(setting).or_else(|| {
            let values = match setting.default {
                DefaultValue::Text(text) => vec![text.into()],
                DefaultValue::List(texts) => texts.iter().map(OsString::from).collect(),
                DefaultValue::None | DefaultValue::Derived(_) => return None,
            };
            Some(Given { name: setting.flag(), source: Source::Default, values })
        })
    }

    /// The texts of a setting, with the name for faults.
    fn texts(&mut self, setting: &Setting) -> Option<(String, Vec<String>)> {
        let given = self.given_or_default(setting)?;
        let mut texts = Vec::new();
        for value in &given.values {
            match value.to_str() {
                Some(text) => texts.push(text.to_owned()),
                None => self.fault(&given.name, &value.to_string_lossy(), "expected UTF-8"),
            }
        }
        Some((given.name, texts))
    }

    /// The text of a setting, with the name for faults.
    pub(super) fn text(&mut self, setting: &Setting) -> Option<(String, String)> {
        let (name, texts) = self.texts(setting)?;
        // The last one, if a flag is repeated; the parser allows it for lists only.
        texts.into_iter().next_back().map(|text| (name, text))
    }

    pub(super) fn path(&self, setting: &Setting) -> Option<PathBuf> {
        self.given_or_default(setting)?.values.into_iter().next_back().map(PathBuf::from)
    }

    /// Whether a switch is on; a wrong word is a fault, and off.
    pub(super) fn switch(&mut self, setting: &Setting) -> bool {
        let Some((name, text)) = self.text(setting) else { return false };
        match text.to_ascii_lowercase().as_str() {
            "on" | "true" => true,
            "off" | "false" => false,
            _ => {
                let expected = if setting.kind == Kind::Switch { "on or off" } else { "true or false" };
                self.fault(&name, &text, format!("expected {expected}"));
                false
            }
        }
    }

    /// The value of a setting; a fault if it is not one.
    pub(super) fn value<T: FromStr<Err: fmt::Display>>(&mut self, setting: &Setting) -> Option<T> {
        let (name, text) = self.text(setting)?;
        self.parsed(&name, &text)
    }

    pub(super) fn parsed<T: FromStr<Err: fmt::Display>>(&mut self, name: &str, value: &str) -> Option<T> {
        value.parse().map_err(|error| self.fault(name, value, error)).ok()
    }

    /// The texts of a list.
    pub(super) fn list(&mut self, setting: &Setting) -> (String, Vec<String>) {
        self.texts(setting).unwrap_or_else(|| (setting.flag(), Vec::new()))
    }

    /// The tags of all lists of a setting.
    pub(super) fn tags<T: Tag>(&mut self, setting: &Setting) -> Vec<T> {
        let (name, lists) = self.list(setting);
        parse_lists(lists.iter().map(String::as_str)).unwrap_or_else(|errors| {
            self.faults.extend(errors.iter().map(|error| format!("{name}: {error}")));
            Vec::new()
        })
    }

    /// A variable that is not a setting; empty counts as unset.
    pub(super) fn variable(&mut self, name: &str) -> Option<String> {
        let value = (self.env)(name)?;
        match value.into_string() {
            Ok(text) => Some(text).filter(|text| !text.is_empty()),
            Err(value) => {
                self.fault(name, &value.to_string_lossy(), "expected UTF-8");
                None
            }
        }
    }

    /// The flag's value, else the variable's, with the name of the flag or variable.
    pub(super) fn flag_or<'n>(
        &mut self,
        flag: (&'n str, Option<String>),
        variable: &'n str,
    ) -> Option<(&'n str, String)> {
        let (name, value) = flag;
        value.map(|value| (name, value)).or_else(|| Some((variable, self.variable(variable)?)))
    }

    pub(super) fn pod(&mut self, value: Option<&str>) -> Option<PodId> {
        match value {
            // The parser's error quotes the text.
            Some(text) => text.parse().map_err(|error| self.faults.push(format!("--pod-id: {error}"))).ok(),
            None => {
                self.missing("--pod-id", "give the pod's id (the runtime's sandbox id)");
                None
            }
        }
    }

    /// `SECURE_COMMS=false` is a fault: every command of this program needs Secure Comms.
    pub(super) fn refuse_if_off(&mut self) {
        let Some(value) = self.variable("SECURE_COMMS") else { return };
        match value.to_ascii_lowercase().as_str() {
            "true" => {}
            "false" => self.fault(
                "SECURE_COMMS",
                "false",
                "Secure Comms is off: set it to true, or do not start this program",
            ),
            _ => self.fault("SECURE_COMMS", &value, "expected true or false"),
        }
    }

    /// The settings, or all faults. `None` without a fault would be a bug; it is reported as an incomplete command line.
    pub(super) fn done<T>(mut self, settings: Option<T>) -> Result<T, UsageError> {
        // A setting that is read twice has its fault once.
        let mut seen = HashSet::new();
        self.faults.retain(|fault| seen.insert(fault.clone()));
        match settings {
            Some(settings) if self.faults.is_empty() => Ok(settings),
            _ => {
                if self.faults.is_empty() {
                    self.faults.push("the command line is incomplete: see --help".to_owned());
                }
                Err(UsageError(self.faults))
            }
        }
    }
}
