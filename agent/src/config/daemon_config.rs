//! The daemon config (apf.json), as serde reads it.

use std::fmt;
use std::marker::PhantomData;

use secure_comms_protocol::json::unquoted;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor,
};
use zeroize::Zeroizing;

use super::user_data::UserDataMode;
use crate::pod_network::spec::PodNetworkConfig;

/// The keys of Secure Comms in apf.json.
const SECURE_COMMS: [&str; 5] = ["sc", "sc-pp-prv", "sc-wn-pub", "sc-inbounds", "sc-outbounds"];

/// A text that is wiped on drop and not printed by Debug.
#[derive(Clone)]
pub struct Secret(pub(super) Zeroizing<String>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// The keys of apf.json that the agent reads. Others are ignored.
#[derive(Clone, Debug, Default)]
pub struct DaemonConfig {
    /// `pod-name`, for logs.
    pub pod_name: Option<String>,
    /// `pod-namespace` (Kubernetes' word, not the network's), for logs.
    pub pod_namespace: Option<String>,
    /// `sc`: whether the keys are in this file.
    pub sc: Option<bool>,
    /// `sc-pp-prv`: base64 of the pod's private key.
    pub private_key: Option<Secret>,
    /// `sc-wn-pub`: base64 of the worker node's authorized_keys lines.
    pub worker_node: Option<String>,
    /// `sc-inbounds`: tags.
    pub inbounds: Option<String>,
    /// `sc-outbounds`: tags.
    pub outbounds: Option<String>,
    /// `pod-network`.
    pub pod_network: Option<PodNetworkConfig>,
    /// Keys of Secure Comms that are there and that user data may not decide. Their values were not read.
    pub ignored: Vec<&'static str>,
}

impl DaemonConfig {
    /// Reads the JSON text. Keys that user data may not decide under `mode` can hold anything: what is ignored decides nothing,
    /// not even whether the VM starts.
    ///
    /// # Errors
    /// The text is not a daemon config; with line and column.
    pub fn read(text: &[u8], mode: UserDataMode) -> serde_json::Result<Self> {
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let config = ByKey(mode).deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(config)
    }
}

impl<'de> DeserializeSeed<'de> for ByKey {
    type Value = DaemonConfig;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<DaemonConfig, D::Error> {
        // The error keeps line and column, which serde_json finds at the end of any text.
        deserializer.deserialize_map(self).map_err(|error| D::Error::custom(unquoted(&error.to_string())))
    }
}

/// Written by hand, so that an error about a value of the wrong type names its key.
struct ByKey(UserDataMode);

impl<'de> Visitor<'de> for ByKey {
    type Value = DaemonConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DaemonConfig, A::Error> {
        let mut config = DaemonConfig::default();
        let mut seen = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Some(ignored) = SECURE_COMMS.into_iter().find(|own| *own == key)
                && self.0.needed_for(ignored).is_some()
            {
                if map.next_value::<Option<IgnoredAny>>()?.is_some() && !config.ignored.contains(&ignored) {
                    config.ignored.push(ignored);
                }
                continue;
            }
            match key.as_str() {
                "pod-name" => config.pod_name = value(&key, &mut map)?,
                "pod-namespace" => config.pod_namespace = value(&key, &mut map)?,
                "pod-network" => {
                    config.pod_network = value(&key, &mut map)?.map(|Object(network)| network);
                }
                "sc" => config.sc = value(&key, &mut map)?,
                "sc-pp-prv" => config.private_key = value(&key, &mut map)?,
                "sc-wn-pub" => config.worker_node = value(&key, &mut map)?,
                "sc-inbounds" => config.inbounds = value(&key, &mut map)?,
                "sc-outbounds" => config.outbounds = value(&key, &mut map)?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            }
            // With a duplicate key, the writer and this reader could mean different values.
            if seen.contains(&key) {
                return Err(A::Error::custom(format!("key '{key}': given twice")));
            }
            seen.push(key);
        }
        Ok(config)
    }
}

/// A value that must be a JSON object: derived code would also accept a list of the fields in their order.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

struct Fields<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

fn value<'de, A: MapAccess<'de>, T: DeserializeOwned>(key: &str, map: &mut A) -> Result<Option<T>, A::Error> {
    map.next_value().map_err(|error| A::Error::custom(format!("key '{key}': {error}")))
}
