//! Properties of the parser of any `pod-network` of a worker node.

use agent_protocol_forwarder::pod_network::spec::{
    Faults, HardwareAddress, InterfaceName, PodNetworkConfig, Prefix, Spec,
};
use serde_json::{Map, Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The keys, and whether an empty text counts as absent.
const KEYS: [(&str, bool); 12] = [
    ("podip", true),
    ("pod-hw-addr", true),
    ("interface", true),
    ("worker-node-ip", true),
    ("tunnel-type", true),
    ("routes", false),
    ("neighbors", false),
    ("mtu", false),
    ("vxlan-port", false),
    ("vxlan-id", false),
    ("dedicated", false),
    ("external-net-via-pod-vm", false),
];

/// The first byte selects the key, the rest is its JSON value.
pub(crate) fn exercise(data: &[u8]) {
    let Some((which, text)) = data.split_first() else { return };
    if let Ok(text) = std::str::from_utf8(text) {
        values(text);
    }
    let Ok(Value::Object(object)) = serde_json::from_slice(text) else { return };
    // A key given twice is refused by the reader of the file, which sees both.
    let Ok(config) = read(&object) else { return };
    let result = config.validate();
    let said = KEYS.iter().take(5).filter(|(key, _)| *key != "pod-hw-addr" && !absent(&object, key, true));
    assert_eq!(config.is_empty(), said.count() == 0);
    if let Err(faults) = &result {
        assert!(
            KEYS.iter().any(|(key, _)| faults.to_string().contains(key)),
            "it does not say where: {faults}"
        );
    }
    let mut other = object.clone();
    other.insert("of-a-later-version".into(), json!([{}]));
    assert_eq!(validate(&other), result, "a key that nobody knows matters");
    let (key, text_too) = KEYS[usize::from(*which) % KEYS.len()];
    if absent(&object, key, text_too) {
        let absences = [Some(Value::Null), Some(json!("")).filter(|_| text_too), None];
        for absence in absences {
            let mut other = object.clone();
            other.remove(key);
            other.extend(absence.map(|absence| (key.to_owned(), absence)));
            assert_eq!(validate(&other), result, "an absent '{key}' is not another");
        }
    }
    let mut other = object;
    other.insert(key.into(), json!({}));
    let faults = validate(&other).expect_err("no key is an object").to_string();
    assert!(faults.contains(&format!("'{key}'")), "{faults}");
}

fn absent(object: &Map<String, Value>, key: &str, text_too: bool) -> bool {
    match object.get(key) {
        None | Some(Value::Null) => true,
        Some(value) => text_too && value.as_str() == Some(""),
    }
}

fn read(object: &Map<String, Value>) -> Result<PodNetworkConfig, serde_json::Error> {
    serde_json::from_value(Value::Object(object.clone()))
}

fn validate(object: &Map<String, Value>) -> Result<Spec, Faults> {
    read(object).expect("each of its values may be anything").validate()
}

fn values(text: &str) {
    if let Ok(prefix) = text.parse::<Prefix>() {
        let network = prefix.network();
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
        assert_eq!(network.network(), network);
        assert!(prefix.contains(prefix.address()) && prefix.contains(network.address()));
        let (bits, past) = match prefix.address() {
            IpAddr::V4(address) => {
                (32, address.to_bits().checked_add(1).map(|next| Ipv4Addr::from_bits(next).into()))
            }
            IpAddr::V6(address) => {
                (128, address.to_bits().checked_add(1).map(|next| Ipv6Addr::from_bits(next).into()))
            }
        };
        assert_eq!(prefix.is_host(), prefix.length() == bits);
        if let Some(past) = past {
            assert!(!(prefix.is_host() && prefix.contains(past)));
        }
    }
    if let Ok(name) = text.parse::<InterfaceName>() {
        assert!(
            name.as_str() == text
                && (1..16).contains(&text.len())
                && !text.contains(['/', ':', '%', ' ', '\n', '\0'])
        );
    }
    if let Ok(address) = text.parse::<HardwareAddress>() {
        let shown: Vec<String> = address.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(shown.join(":"), text.to_ascii_lowercase().replace('-', ":"));
    }
}
