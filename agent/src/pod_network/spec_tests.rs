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
        ("routes", json!([{"dst": "x"}, {"dst": "10.0.0.0/8", "gw": "fd00::1"}, 7])),
        ("neighbors", json!([{"hw-addr": 5, "dev": "a/b"}])),
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
        "'routes[2]': expected a JSON object",
        "'neighbors[0].ip': missing; expected an address",
        "'neighbors[0].hw-addr': not a text",
        "'neighbors[0].dev': 'a/b'",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_eq!(text.split("; '").count(), 15, "each once: {text}");
    assert!(with(&[("tunnel-type", json!(""))]).unwrap_err().contains("'tunnel-type': missing"));
    assert!(with(&[("routes", json!({}))]).unwrap_err().contains("'routes': not a list"));
}

#[test]
fn a_strange_route_or_neighbour_is_left_out_alone() {
    let spec = with(&[
        (
            "routes",
            json!([
                {"dst": "10.0.0.0/8", "gw": "10.244.1.1"},
                {"dst": "x"},
                {"dst": "::/0", "gw": "10.244.1.1"},
                {"dst": "10.0.0.0/33"},
                {"gw": "fd00::1/64"},
                {"dst": "10.0.0.0/8", "dev": "a/b"},
                {"dst": 7},
                ["10.0.0.0/8"],
                null,
                {"dst": "::ffff:10.0.0.0/64"},
            ]),
        ),
        ("neighbors", json!([{"ip": "10.244.1.1"}, {"ip": ""}, {"ip": "10.0.0.1/8"}, {"ip": "10.0.0.1", "hw-addr": "x"}])),
    ])
    .unwrap();
    assert_eq!((spec.routes.len(), spec.neighbours.len()), (1, 1), "{spec:?}");
    assert_eq!(spec.remarks.len(), 12, "{:?}", spec.remarks);
    for (remark, part) in spec.remarks.iter().zip([
        "'routes[1].dst': 'x'",
        "'routes[2].gw': 10.244.1.1 is not of the family of dst ::/0",
        "'routes[3].dst'",
        "'routes[4].gw'",
        "'routes[5].dev': 'a/b'",
        "'routes[6].dst': not a text",
        "'routes[7]': expected a JSON object",
        "'routes[8]': expected a JSON object",
        "'routes[9].dst'",
        "'neighbors[1].ip': missing",
        "'neighbors[2].ip'",
        "'neighbors[3].hw-addr'",
    ]) {
        assert!(remark.contains(part) && remark.ends_with("; left out"), "{part:?} is not in {remark:?}");
    }
}

/// The only route of a spec, and the remarks.
fn route(json: Value) -> (IpRoute, Vec<String>) {
    let spec = with(&[("routes", json!([json]))]).unwrap();
    let [route] = &*spec.routes else { panic!("{spec:?}") };
    (route.clone(), spec.remarks)
}

#[test]
fn names_and_numbers_mean_the_same() {
    for (value, protocol) in [
        (json!("boot"), 3),
        (json!("kernel"), 2),
        (json!("Static"), 4),
        (json!("DHCP"), 16),
        (json!("mrouted"), 17),
        (json!("keepalived"), 18),
        (json!("babel"), 42),
        (json!("eigrp"), 192),
        (json!("80"), 80),
        (json!("0x50"), 80),
        (json!(255), 255),
        (json!("unspec"), 3),
        (json!(""), 3),
        (json!(0), 3),
        (Value::Null, 3),
    ] {
        let (route, remarks) = route(json!({"gw": "10.244.1.1", "protocol": value}));
        assert_eq!((route.protocol, remarks.len()), (protocol, 0), "{value}");
    }
    for (value, scope) in [
        (json!("link"), 253),
        (json!("Host"), 254),
        (json!("nowhere"), 255),
        (json!("SITE"), 200),
        (json!("253"), 253),
        (json!(150), 150),
        (json!("universe"), 0),
        (json!("global"), 0),
        (json!(0), 0),
    ] {
        let (route, remarks) = route(json!({"gw": "10.244.1.1", "scope": value}));
        assert_eq!((route.scope, remarks.len()), (scope, 0), "{value}");
    }
    for (value, state) in [
        (json!("permanent"), 0x80),
        (json!("NOARP"), 0x40),
        (json!("failed"), 0x20),
        (json!("probe"), 0x10),
        (json!("delay"), 8),
        (json!("stale"), 4),
        (json!("reachable"), 2),
        (json!("incomplete"), 1),
        (json!("none"), 0x80),
        (json!("128"), 0x80),
        (json!(0x82), 0x82),
    ] {
        let spec = with(&[("neighbors", json!([{"ip": "10.244.1.1", "state": value}]))]).unwrap();
        assert_eq!((spec.neighbours[0].state, spec.remarks.len()), (state, 0), "{value}");
    }
}

#[test]
fn an_unknown_name_costs_no_route() {
    for value in [
        json!("foo"),
        json!("unknown"),
        json!("256"),
        json!("+3"),
        json!(256),
        json!(-1),
        json!(1.5),
        json!(true),
    ] {
        let (route, remarks) = route(json!({"gw": "10.244.1.1", "protocol": value, "scope": value}));
        assert_eq!((route.protocol, route.scope), (PROTOCOL_BOOT, 0));
        let [protocol, scope] = &*remarks else { panic!("{remarks:?}") };
        assert_eq!(
            *protocol,
            format!("'routes[0].protocol': {value} is no routing protocol; 'boot' is taken")
        );
        assert!(scope.contains(&format!("'routes[0].scope': {value} is no scope")), "{scope}");
    }
    let spec = with(&[("neighbors", json!([{"ip": "10.244.1.1", "state": "unknown"}]))]).unwrap();
    assert_eq!((spec.neighbours[0].state, spec.remarks.len()), (STATE_PERMANENT, 1));
}

#[test]
fn a_default_route_may_be_spelt_in_many_forms() {
    for dst in [
        json!("::ffff:0.0.0.0/0"),
        json!("::ffff:0.0.0.0/96"),
        json!("::FFFF:0:0/0"),
        json!("::ffff:0000:0000/96"),
        json!("0.0.0.0/0"),
        json!("0.0.0.0"),
        json!("::ffff:0.0.0.0"),
        json!("default"),
        json!("Any"),
        json!("all"),
        json!(""),
        Value::Null,
    ] {
        for gw in ["10.244.1.1", "::ffff:10.244.1.1"] {
            let (route, remarks) = route(json!({"dst": dst, "gw": gw}));
            assert_eq!(route.destination, prefix("0.0.0.0/0"), "{dst}");
            assert_eq!((route.gateway, remarks.len()), (Some("10.244.1.1".parse().unwrap()), 0));
        }
    }
    for dst in [json!("::/0"), json!("::"), json!("default"), json!("0::0/0"), json!(""), Value::Null] {
        let (route, _) = route(json!({"dst": dst, "gw": "fd00::1"}));
        assert_eq!((route.destination, route.scope), (prefix("::/0"), 0), "{dst}");
    }
    for gw in [json!(""), json!("0.0.0.0"), json!("::"), json!("::ffff:0.0.0.0"), Value::Null] {
        let (route, _) = route(json!({"dst": "default", "gw": gw}));
        assert_eq!((route.destination, route.gateway, route.scope), (prefix("0.0.0.0/0"), None, SCOPE_LINK));
    }
}

#[test]
fn an_ipv4_address_written_as_ipv6_is_an_ipv4_address() {
    for (text, expected) in [
        ("::ffff:10.1.2.3/24", "10.1.2.3/24"),
        ("::ffff:10.1.2.3/120", "10.1.2.3/24"),
        ("::ffff:a01:203/32", "10.1.2.3/32"),
        ("::ffff:10.1.2.3/128", "10.1.2.3/32"),
        ("::10.1.2.3/120", "::a01:203/120"),
        ("fd00::1/33", "fd00::1/33"),
    ] {
        assert_eq!(prefix(text), prefix(expected), "{text}");
    }
    for length in [33, 64, 95, 129] {
        assert!(format!("::ffff:10.1.2.3/{length}").parse::<Prefix>().is_err(), "{length}");
    }
    let spec = with(&[
        ("podip", json!("::ffff:10.244.1.7/24")),
        ("worker-node-ip", json!("::ffff:192.168.1.9/112")),
        ("routes", json!([{"dst": "::ffff:10.9.0.0/16", "gw": "::ffff:10.244.1.1"}, {"dst": "10.7.0.1"}])),
        ("neighbors", json!([{"ip": "::ffff:10.244.1.1"}])),
    ])
    .unwrap();
    assert_eq!((spec.pod, spec.worker_node), (prefix("10.244.1.7/24"), "192.168.1.9".parse().unwrap()));
    let [near, far] = &*spec.routes else { panic!("{:?}", spec.routes) };
    assert_eq!((near.destination, far.destination), (prefix("10.7.0.1/32"), prefix("10.9.0.0/16")));
    assert_eq!(far.gateway, Some("10.244.1.1".parse().unwrap()));
    assert_eq!(spec.neighbours[0].address, "10.244.1.1".parse::<IpAddr>().unwrap());
}

#[test]
fn numbers_may_be_written_as_texts() {
    let spec =
        with(&[("mtu", json!("1300")), ("vxlan-port", json!("4791")), ("vxlan-id", json!(""))]).unwrap();
    assert_eq!((spec.mtu, spec.port, spec.id), (1300, 4791, 0));
    for wrong in ["big", "+1300", " 1300", "1300.5", "0x500"] {
        let text = with(&[("mtu", json!(wrong))]).unwrap_err();
        assert!(text.contains(&format!("'mtu': \"{wrong}\": expected a number from 0")), "{text}");
    }
}

#[test]
fn a_route_that_is_listed_twice_counts_once() {
    let spec = with(&[(
        "routes",
        json!([
            {"dst": "0.0.0.0/0", "gw": "10.244.1.1", "dev": "eth0", "protocol": "boot"},
            {"dst": "10.244.1.0/24", "dev": "eth0"},
            {"dst": "::ffff:0.0.0.0/0", "gw": "::ffff:10.244.1.1", "dev": "", "protocol": "static"},
            {"dst": "10.244.1.9/24", "dev": null, "protocol": "kernel"},
            {"dst": "10.244.1.0/24", "dev": "net1"},
            {"dst": "0.0.0.0/0", "gw": "10.244.1.2"},
        ]),
    )])
    .unwrap();
    let kept: Vec<_> =
        spec.routes.iter().map(|route| (route.gateway.map(|gw| gw.to_string()), route.protocol)).collect();
    let gateway = |text: &str| Some(text.to_owned());
    assert_eq!(kept, [(None, 3), (None, 3), (gateway("10.244.1.1"), 3), (gateway("10.244.1.2"), 3)]);
    assert!(spec.remarks.is_empty(), "{:?}", spec.remarks);
}

#[test]
fn every_list_and_choice_may_be_null() {
    let keys = [
        "pod-hw-addr",
        "routes",
        "neighbors",
        "mtu",
        "vxlan-port",
        "vxlan-id",
        "dedicated",
        "external-net-via-pod-vm",
    ];
    let spec = with(&keys.map(|key| (key, Value::Null))).unwrap();
    assert!(spec.routes.is_empty() && spec.neighbours.is_empty() && spec.remarks.is_empty(), "{spec:?}");
    let null = json!({"dst": null, "gw": null, "dev": null, "protocol": null, "scope": null});
    let (route, remarks) = route(null);
    assert_eq!((route.destination, route.scope, remarks.len()), (prefix("0.0.0.0/0"), SCOPE_LINK, 0));
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
    for wrong in
        ["", "/", "10.0.0.1", "10.0.0.1/33", "fd00::/129", "10.0.0.1/+8", "10.0.0.1/8x", "10.0.0.1/24/"]
    {
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
