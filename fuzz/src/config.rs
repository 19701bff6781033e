//! Properties of the agent's reading of any apf.json.

use agent_protocol_forwarder::config::flags::{self, Options};
use agent_protocol_forwarder::config::user_data::UserDataMode;
use agent_protocol_forwarder::config::{Config, ConfigError, DaemonConfig, Inputs, KeySource};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::tag::{Bind, Tag, Target};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// Start of the base64 of a PEM text. Other values may contain the agent's own words: the fuzzer sees comparisons.
const PEM: &str = "LS0tLS1CRUdJTi";

type Is = fn(&Value) -> bool;

/// A JSON object as written: a key may occur twice.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

impl Pairs {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Whether the agent must refuse it: a value of the wrong type, or a single key that occurs twice. A key that user data
    /// may not decide holds anything.
    fn is_wrong(&self, mode: UserDataMode) -> bool {
        let types: [(&str, Is); 8] = [
            ("pod-name", Value::is_string),
            ("pod-namespace", Value::is_string),
            ("sc", Value::is_boolean),
            ("sc-pp-prv", Value::is_string),
            ("sc-wn-pub", Value::is_string),
            ("sc-inbounds", Value::is_string),
            ("sc-outbounds", Value::is_string),
            ("pod-network", Value::is_object),
        ];
        types.iter().filter(|(key, _)| counts(key, mode)).any(|(key, is_right)| {
            let values: Vec<&Value> =
                self.0.iter().filter(|(name, _)| name == key).map(|(_, value)| value).collect();
            values.len() > 1 || values.iter().any(|value| !value.is_null() && !is_right(value))
        })
    }
}

/// Whether user data may decide a key.
fn counts(key: &str, mode: UserDataMode) -> bool {
    match key {
        "sc" | "sc-pp-prv" => mode == UserDataMode::All,
        "sc-wn-pub" | "sc-inbounds" | "sc-outbounds" => mode != UserDataMode::None,
        _ => true,
    }
}

/// The first byte selects the flags.
pub(crate) fn exercise(data: &[u8]) {
    let Some((flags, text)) = data.split_first() else { return };
    let options = options(*flags);
    let mode = options.user_data;
    let read = DaemonConfig::read(text, mode);
    let pairs = serde_json::from_slice::<Pairs>(text);
    let config = match (read, &pairs) {
        (Ok(config), Ok(pairs)) => {
            says_the_same(&config, pairs, mode);
            config
        }
        // Ignored values are checked less closely: they may be nested too deep, or not be text.
        (Ok(config), Err(_)) => config,
        (Err(_), Err(_)) => return,
        (Err(error), Ok(pairs)) => {
            // `pod-network` has keys of its own.
            assert!(
                pairs.is_wrong(mode) || error.to_string().contains("duplicate field"),
                "refused: {error}"
            );
            return hides(text, pairs, &error.to_string());
        }
    };
    let pairs = pairs.unwrap_or(Pairs(Vec::new()));
    hides(text, &pairs, &format!("{config:?}"));
    let inputs = Inputs { daemon: Some(config.clone()), ..Inputs::default() };
    match Config::resolve(options.clone(), inputs) {
        Ok(resolved) => {
            is_sound(&resolved, &config, mode);
            decides_no_more(&resolved, &options);
            hides(text, &pairs, &format!("{resolved:?}"));
        }
        Err(error) => {
            assert!(matches!(error.exit_code(), 1 | 2));
            let is_asked_for = flags & 1 == 1 || config.sc == Some(true);
            assert_eq!(matches!(error, ConfigError::NotSecureComms(_)), !is_asked_for);
            hides(text, &pairs, &format!("{error} {error:?}"));
        }
    }
}

fn options(flags: u8) -> Options {
    let all = [
        "-secure-comms",
        "-host-interface=eth1",
        "-pod-namespace=",
        "-secure-comms-inbounds=BOTH_PHASES:kbs:1",
    ];
    let mode = match flags >> 4 & 3 {
        1 => "-secure-comms-user-data=none",
        2 => "-secure-comms-user-data=tunnels",
        _ => "-secure-comms-user-data=all",
    };
    let given = all.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1).map(|(_, flag)| *flag);
    flags::parse(given.chain([mode]).map(Into::into)).expect("these are good")
}

/// What anyone can write who runs the cloud: it moves no built-in tunnel, reaches no socket of the VM, and adds nothing to
/// the Attestation phase.
fn decides_no_more(resolved: &Config, options: &Options) {
    let Ok(measured) = Config::resolve(options.clone(), Inputs::default()) else { return };
    let (inbounds, outbounds) = (texts(&resolved.inbounds), texts(&resolved.outbounds));
    let (own_inbounds, own_outbounds) = (texts(&measured.inbounds), texts(&measured.outbounds));
    assert!(own_inbounds.iter().all(|tag| inbounds.contains(tag)), "{own_inbounds:?} {inbounds:?}");
    assert!(own_outbounds.iter().all(|tag| outbounds.contains(tag)), "{own_outbounds:?} {outbounds:?}");
    if resolved.user_data == UserDataMode::All {
        return;
    }
    assert!(matches!(resolved.source, KeySource::Kbs { .. }));
    if resolved.user_data == UserDataMode::None {
        assert_eq!((inbounds, outbounds), (own_inbounds, own_outbounds));
        assert!(matches!(resolved.source, KeySource::Kbs { worker_node: None }));
        return;
    }
    let added = resolved.inbounds.iter().filter(|tag| !own_inbounds.contains(&tag.to_string()));
    for tag in added {
        assert!(!tag.phases.includes(PhaseName::Attestation) && !matches!(tag.bind, Bind::Unix(_)), "{tag}");
    }
    let added = resolved.outbounds.iter().filter(|tag| !own_outbounds.contains(&tag.to_string()));
    for tag in added {
        assert!(
            !tag.phases.includes(PhaseName::Attestation) && !matches!(tag.target, Target::Unix(_)),
            "{tag}"
        );
    }
}

fn texts<T: Tag>(tags: &[T]) -> Vec<String> {
    tags.iter().map(ToString::to_string).collect()
}

fn says_the_same(config: &DaemonConfig, pairs: &Pairs, mode: UserDataMode) {
    assert!(!pairs.is_wrong(mode), "it is taken");
    let text = |key| pairs.text(key).filter(|_| counts(key, mode));
    let value = |key| pairs.get(key).filter(|_| counts(key, mode));
    assert_eq!(config.pod_name.as_deref(), text("pod-name"));
    assert_eq!(config.pod_namespace.as_deref(), text("pod-namespace"));
    assert_eq!(config.worker_node.as_deref(), text("sc-wn-pub"));
    assert_eq!(config.inbounds.as_deref(), text("sc-inbounds"));
    assert_eq!(config.outbounds.as_deref(), text("sc-outbounds"));
    assert_eq!(config.private_key.is_some(), value("sc-pp-prv").is_some());
    assert_eq!(config.sc, value("sc").and_then(Value::as_bool));
    assert_eq!(config.pod_network.is_some(), value("pod-network").is_some());
}

/// The private key does not appear in the output, unless another value has the same text.
fn hides(text: &[u8], pairs: &Pairs, shown: &str) {
    let Some(key) = pairs.text("sc-pp-prv") else { return };
    let once = std::str::from_utf8(text).is_ok_and(|text| text.matches(key).count() == 1);
    if key.starts_with(PEM) && once {
        assert!(!shown.contains(key), "the private key is shown: {shown}");
    }
}

fn is_sound(resolved: &Config, config: &DaemonConfig, mode: UserDataMode) {
    assert_eq!(resolved.user_data, mode);
    for phase in [PhaseName::Attestation, PhaseName::Kubernetes] {
        let kbs = resolved.inbounds.iter().filter(|tag| tag.phases.includes(phase) && is(*tag, "kbs"));
        assert_eq!(kbs.count(), 1, "{:?}", resolved.inbounds);
    }
    let kata = resolved
        .outbounds
        .iter()
        .filter(|tag| tag.phases.includes(PhaseName::Kubernetes) && is(*tag, "kataagent"));
    assert_eq!(kata.count(), 1, "{:?}", resolved.outbounds);
    // A given key must not be ignored: without it, the agent would accept peers that it must refuse.
    match &resolved.source {
        KeySource::UserData(_) => assert!(config.sc == Some(true) && config.private_key.is_some()),
        KeySource::Kbs { worker_node } => {
            assert!(config.sc != Some(true) && config.private_key.is_none());
            assert_eq!(worker_node.is_some(), config.worker_node.is_some());
        }
    }
    let is_wanted = config.pod_network.as_ref().is_some_and(|network| !network.is_empty());
    assert_eq!(resolved.pod_network.is_some(), is_wanted);
}

fn is(tag: &impl Tag, name: &str) -> bool {
    tag.name().as_str().eq_ignore_ascii_case(name)
}
