//! `config`: shows and checks the settings of `serve`.

use std::time::Duration;

use secure_comms_adaptor::kbs::KbsClient;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_keys::text::one_line;
use serde_json::{Map, Value, json};

use super::screen;
use crate::caa::strict;
use crate::cli::serve::ConfigFormat;
use crate::cli::setting::Kind;
use crate::settings::{EffectiveSetting, ServeSettings, Source};

/// Longest origin of a value that is shown.
const ORIGIN_MAX: usize = 4096;

/// Prints every setting, its value, and where that comes from. There is no secret among them: secrets are in files.
///
/// # Errors
/// Standard output cannot be written.
pub fn show(settings: &ServeSettings, format: ConfigFormat) -> anyhow::Result<()> {
    let text = match format {
        ConfigFormat::Toml => settings.effective.iter().map(toml_line).collect(),
        ConfigFormat::Json => format!("{:#}\n", json_object(&settings.effective)),
    };
    screen::show(&text).map(drop)
}

/// Prints that the settings have no fault, after the warnings. With a fault, it is not reached. Reads the KBS's files and those
/// of the strict variant as the service does, and sends nothing.
///
/// # Errors
/// The KBS admin's key, the KBS's CA or the certificates cannot be used, or standard output cannot be written.
pub fn check(settings: &ServeSettings) -> anyhow::Result<()> {
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    if let KeySource::Kbs(kbs) = &settings.key_source {
        KbsClient::new(kbs, Duration::ZERO)?;
    }
    if let Some(directory) = settings.caa.as_ref().and_then(|caa| caa.certificates.as_deref()) {
        strict::load(directory)?;
    }
    screen::show("the settings have no fault\n").map(drop)
}

/// A line of a settings' file.
fn toml_line(effective: &EffectiveSetting) -> String {
    let name = effective.setting.name;
    match &effective.value {
        Some(_) => format!("{name} = {} # {}\n", toml(value(effective)), origin(&effective.source)),
        None => {
            let default = effective.setting.default_text();
            format!("# {name}: {}\n", default.unwrap_or_else(|| "not set".to_owned()))
        }
    }
}

fn origin(source: &Source) -> String {
    match source {
        Source::Default => "default".to_owned(),
        Source::File(path, line) => one_line(&format!("{}:{line}", path.display()), ORIGIN_MAX),
        Source::Variable(name) => (*name).to_owned(),
        Source::Flag => "flag".to_owned(),
    }
}

/// Strings, numbers, booleans and lists of strings are written alike in JSON and in TOML, but for one character.
fn toml(value: Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007f")
}

fn value(effective: &EffectiveSetting) -> Value {
    let Some(texts) = &effective.value else { return Value::Null };
    let text = texts.last().map(String::as_str).unwrap_or_default();
    match effective.setting.kind {
        Kind::List => json!(texts),
        Kind::Number => text.parse::<u64>().map_or_else(|_| json!(text), |number| json!(number)),
        Kind::Switch | Kind::Boolean => json!(["on", "true"].contains(&text.to_ascii_lowercase().as_str())),
        Kind::Text => json!(text),
    }
}

fn json_object(settings: &[EffectiveSetting]) -> Value {
    let object = |effective: &EffectiveSetting| {
        let source = match &effective.source {
            Source::Default => json!({"kind": "default"}),
            Source::File(path, line) => json!({"kind": "file", "file": path.to_string_lossy(), "line": line}),
            Source::Variable(name) => json!({"kind": "variable", "variable": name}),
            Source::Flag => json!({"kind": "flag", "flag": effective.setting.flag()}),
        };
        (effective.setting.name.to_owned(), json!({"value": value(effective), "source": source}))
    };
    Value::Object(settings.iter().map(object).collect::<Map<_, _>>())
}
