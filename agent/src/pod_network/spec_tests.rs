use serde_json::json;

use super::*;

fn config(json: Value) -> PodNetworkConfig {
    serde_json::from_value(json).unwrap()
}

fn whole() -> Value {
    json!({
        "podip": "10.244.1.7/24", "pod-hw-addr": "0a:58:0a:f4:01:07", "interface": "eth0",
        "worker-node-ip": "192.168.1.9/16", "tunnel-type": "vxlan", "mtu": 1400, "index": 3,
        "vxlan-port": 4790, "vxlan-id": 555_003, "dedicated": false, "external-net-via-pod-vm": true,
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "10.244.1.1", "dev": "eth0", "protocol": 3},
            {"dst": "10.244.1.9/24", "gw": "", "dev": "eth0", "protocol": 2, "scope": 253},
        ],
        "neighbors": [{"ip": "10.244.1.1", "hw-addr": "0a-58-0A-f4-01-01", "dev": "eth0", "state": 128}],
        "of-a-later-version": [],
    })
}

fn with(changes: &[(&str, Value)]) -> Result<Spec, String> {
    let mut json = whole();
    for (key, value) in changes {
        json[key] = value.clone();
    }
    config(json).validate().map_err(|faults| faults.to_string())
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

#[test]
fn routes_without_a_gateway_come_first() {
    let spec = with(&[]).unwrap();
    assert_eq!((spec.pod.to_string().as_str(), spec.interface.as_str()), ("10.244.1.7/24", "eth0"));
    assert_eq!(spec.hardware_address.unwrap().bytes(), &[0x0a, 0x58, 0x0a, 0xf4, 1, 7]);
    assert_eq!(spec.worker_node.to_string(), "192.168.1.9");
    assert_eq!(
        (spec.port, spec.id, spec.mtu, spec.dedicated, spec.external),
        (4790, 555_003, 1400, false, true)
    );
    let [near, default] = &*spec.routes else { panic!("{:?}", spec.routes) };
    assert_eq!(
        (near.destination, near.gateway, near.protocol, near.scope),
        (prefix("10.244.1.0/24"), None, 2, 253)
    );
    assert_eq!((default.destination, default.protocol, default.scope), (prefix("0.0.0.0/0"), 3, 0));
    assert_eq!(spec.neighbours[0].state, STATE_PERMANENT);
    assert_eq!(spec.neighbours[0].hardware_address.unwrap().bytes(), &[0x0a, 0x58, 0x0a, 0xf4, 1, 1]);
}

#[test]
fn empty_texts_zeros_and_nulls_are_absences_with_defaults() {
    let spec = with(&[
        ("pod-hw-addr", json!("")),
        ("mtu", json!(0)),
        ("vxlan-port", json!(0)),
        ("vxlan-id", Value::Null),
        ("dedicated", Value::Null),
        ("neighbors", Value::Null),
        ("routes", json!([{"dst": "", "gw": "10.244.1.1"}, {"dst": "", "gw": "", "dev": "", "scope": 0}])),
    ])
    .unwrap();
    assert_eq!((spec.hardware_address, spec.mtu, spec.port, spec.id), (None, MTU_MAX, VXLAN_PORT, 0));
    assert!(spec.neighbours.is_empty());
    let [near, default] = &*spec.routes else { panic!("{:?}", spec.routes) };
    assert_eq!(
        (near.destination, near.scope, near.protocol),
        (prefix("0.0.0.0/0"), SCOPE_LINK, PROTOCOL_BOOT)
    );
    assert_eq!((default.destination, default.scope), (prefix("0.0.0.0/0"), 0));
    assert!(
        config(json!({"podip": "", "interface": "", "mtu": 0, "routes": null, "dedicated": false}))
            .is_empty()
    );
    assert!(!config(whole()).is_empty());
}

#[test]
fn the_mtu_is_at_most_what_the_tunnel_leaves() {
    assert_eq!(with(&[("mtu", json!(9000))]).unwrap().mtu, 1450);
    assert_eq!(with(&[("mtu", json!(1450))]).unwrap().mtu, 1450);
    assert!(
        with(&[("mtu", json!(67))]).unwrap_err().contains("'mtu': 67 is too small; expected at least 68")
    );
    let v6 = with(&[("podip", json!("fd00::7/64")), ("mtu", json!(1279))]).unwrap_err();
    assert!(v6.contains("at least 1280"), "{v6}");
}

#[test]
fn ipv6_is_read_like_ipv4() {
    let spec = with(&[
        ("podip", json!("fd00:1::7/64")),
        ("worker-node-ip", json!("2001:db8::9/64")),
        ("routes", json!([{"gw": "fd00:1::1"}, {"dst": "fd00:2::5/48"}])),
        ("neighbors", json!([{"ip": "fd00:1::1", "hw-addr": "0a:58:0a:f4:01:01"}])),
    ])
    .unwrap();
    let [near, default] = &*spec.routes else { panic!("{:?}", spec.routes) };
    assert_eq!((near.destination, near.scope), (prefix("fd00:2::/48"), 0));
    assert_eq!((default.destination, default.gateway), (prefix("::/0"), Some("fd00:1::1".parse().unwrap())));
}

#[test]
fn every_fault_is_reported_with_its_key_and_what_was_expected() {
    let text = with(&[
        ("podip", json!("10.244.1.7")),
        ("pod-hw-addr", json!("0a:58:0a:f4:01")),
        ("interface", json!("a-name-that-is-too-long")),
        ("worker-node-ip", json!("")),
        ("tunnel-type", json!("routing")),
        ("mtu", json!(-1)),
        ("vxlan-port", json!(65536)),
        ("vxlan-id", json!(1 << 24)),
        ("dedicated", json!("yes")),
        ("routes", json!([{"dst": "x"}, {"dst": "10.0.0.0/8", "gw": "fd00::1", "scope": 256}, 7])),
        ("neighbors", json!([{"hw-addr": 5, "dev": "a/b", "state": 65536}])),
    ])
    .unwrap_err();
    for part in [
        "'podip': '10.244.1.7': expected an address with its prefix length",
        "'pod-hw-addr': '0a:58:0a:f4:01': expected an Ethernet address",
        "'interface': 'a-name-that-is-too-long': expected an interface's name",
        "'worker-node-ip': missing; expected an address with",
        "'tunnel-type': 'routing' is not supported; expected 'vxlan'",
        "'mtu': -1: expected a number from 0",
        "'vxlan-port': 65536: expected a number from 0 to 65535",
        "'vxlan-id': 16777216: expected a number from 0 to 16777215",
        "'dedicated': expected true or false",
        "'routes[0].dst': 'x'",
        "'routes[1].gw': fd00::1 is not of the family of dst 10.0.0.0/8",
        "'routes[1].scope': 256: expected a number from 0 to 255",
        "'routes[2]': expected a JSON object",
        "'neighbors[0].ip': missing; expected an address",
        "'neighbors[0].hw-addr': not a text",
        "'neighbors[0].dev': 'a/b'",
        "'neighbors[0].state': 65536",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_eq!(text.split("; '").count(), 17, "each once: {text}");
    assert!(with(&[("tunnel-type", json!(""))]).unwrap_err().contains("'tunnel-type': missing"));
    assert!(with(&[("routes", json!({}))]).unwrap_err().contains("'routes': not a list"));
}

#[test]
fn prefixes_have_networks_and_know_what_is_in_them() {
    for (text, network, host) in [
        ("10.1.2.3/24", "10.1.2.0/24", false),
        ("10.1.2.3/32", "10.1.2.3/32", true),
        ("10.1.2.3/0", "0.0.0.0/0", false),
        ("fd00::1:2/112", "fd00::1:0/112", false),
        ("fd00::1/128", "fd00::1/128", true),
        ("fd00::1/0", "::/0", false),
    ] {
        assert_eq!((prefix(text).network(), prefix(text).is_host()), (prefix(network), host), "{text}");
        assert!(prefix(network).contains(prefix(text).address()));
    }
    assert!(!prefix("10.1.2.0/24").contains("10.1.3.1".parse().unwrap()));
    assert!(!prefix("0.0.0.0/0").contains("::".parse().unwrap()));
    for wrong in ["", "/", "10.0.0.1", "10.0.0.1/33", "fd00::/129", "10.0.0.1/+8x", "10.0.0.1/24/"] {
        assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
    }
}

#[test]
fn names_and_addresses_the_kernel_rejects_are_refused() {
    for name in ["", ".", "..", "a b", "a/b", "eth%d", "a:1", "sixteen-bytes-ab", "a\u{a0}"] {
        assert!(name.parse::<InterfaceName>().is_err(), "{name}");
    }
    assert!("fifteen-bytes-a".parse::<InterfaceName>().is_ok());
    for address in ["", "0a:58:0a:f4:01:07:01", "0a:58:0a:f4:01:7", "+a:58:0a:f4:01:07", "0a580af40107"] {
        assert!(address.parse::<HardwareAddress>().is_err(), "{address}");
    }
}

proptest::proptest! {
    #[test]
    fn no_values_make_it_panic(text in "\\PC{0,20}", number in proptest::prelude::any::<i64>()) {
        for key in ["podip", "pod-hw-addr", "interface", "worker-node-ip", "mtu", "vxlan-id", "routes"] {
            let _ = with(&[(key, json!(text))]);
            let _ = with(&[(key, json!(number))]);
            let _ = with(&[(key, json!([{"dst": text, "gw": number, "ip": text}]))]);
        }
    }
}
