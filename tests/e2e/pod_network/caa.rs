//! Each apf.json that the cloud-api-adaptor wrote for a pod of another network plugin, and the routes of that pod on its
//! worker node (`tests/e2e/data/caa`): the agent gives the pod in the VM the same ones.

use secure_comms_tests::harness::pod_site::{PodSite, is_up};
use secure_comms_tests::harness::process::Child;
use serde_json::{Value, json};

use crate::{end, left_out, pod_routes, tunnel};

/// A route of the worker node's pod as the VM's has it; none if apf.json has no place for it: it lists unicast routes of the
/// protocols kernel, boot, static and dhcp. `net1`, a second network, stays on the worker node.
fn carried(line: &str) -> Option<String> {
    let strange = ["unreachable", "blackhole", "proto 80", "dev net1"];
    if strange.iter().any(|part| line.contains(part)) {
        return None;
    }
    let words: Vec<_> = line.split_whitespace().collect();
    let mut kept = Vec::new();
    let mut rest = words.into_iter();
    while let Some(word) = rest.next() {
        // It carries no source address, metric or MTU of a route.
        if ["src", "metric", "mtu"].contains(&word) {
            rest.next().unwrap();
        } else {
            kept.push(word);
        }
    }
    Some(kept.join(" "))
}

async fn comes_up(json: &str, routes: &str, mtu: u32, left: &[&str]) {
    let site = PodSite::bare().unwrap();
    site.vm.address("ens3", "10.99.0.2/24").unwrap();
    site.vm.ip(["route", "add", "default", "via", "10.99.0.1", "dev", "ens3"]).unwrap();
    site.node.address("cable", "10.99.0.1/24").unwrap();
    let before = site.state().unwrap();
    let command = site.agent_command(&Value::Null).await.unwrap();
    std::fs::write(site.path("apf.json"), json).unwrap();
    let agent = Child::spawn("agent", command).unwrap();
    is_up(&agent).await.unwrap();

    let mut expected: Vec<_> = routes.lines().filter_map(carried).collect();
    expected.sort();
    assert!(expected.len() > 1, "{routes}");
    assert_eq!(pod_routes(&site, "-4"), expected);

    let json: Value = serde_json::from_str(json).unwrap();
    let spec = &json["pod-network"];
    let link = tunnel(&site);
    assert_eq!((&link["mtu"], &link["address"]), (&json!(mtu), &spec["pod-hw-addr"]), "{link}");
    let info = &link["linkinfo"]["info_data"];
    assert_eq!((&info["id"], &info["port"]), (&spec["vxlan-id"], &spec["vxlan-port"]), "{link}");
    let addresses = site.pod.show(["-4", "address", "show", "dev", "eth0"]).unwrap();
    let address = &addresses[0]["addr_info"][0];
    let address = format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"]);
    assert_eq!(json!(address), spec["podip"]);
    let neighbours = site.pod.show(["neigh", "show", "nud", "permanent"]).unwrap();
    let neighbours: Vec<_> =
        neighbours.as_array().unwrap().iter().map(|entry| (&entry["dst"], &entry["lladdr"])).collect();
    let listed: Vec<_> = spec["neighbors"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|entry| (&entry["ip"], &entry["hw-addr"]))
        .collect();
    assert_eq!(neighbours, listed);

    end_and_compare(agent, left).await;
    assert_eq!(site.state().unwrap(), before);
}

async fn end_and_compare(agent: Child, left: &[&str]) {
    for part in left {
        agent.wait_for_text(part, secure_comms_tests::harness::scene::PATIENCE).await.unwrap();
    }
    let lines = left_out(&agent);
    assert_eq!(lines.len(), left.len(), "{lines:#?}");
    end(agent).await;
}

macro_rules! comes_up {
    ($($name:ident: $file:literal, $mtu:literal, $left:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            let json = include_str!(concat!("../data/caa/", $file, ".json"));
            comes_up(json, include_str!(concat!("../data/caa/", $file, ".routes")), $mtu, &$left).await;
        }
    )*};
}

comes_up! {
    aws_vpc: "aws-vpc", 1450, [];
    calico: "calico", 1450, [];
    cilium: "cilium", 1450, [];
    dual_stack: "dual-stack", 1450, [];
    flannel: "flannel", 1450, [];
    multus: "multus", 1450, ["route 192.0.2.0/24 is left out", "route 198.51.100.0/24 by 192.0.2.1 is left out"];
    odd_routes: "odd-routes", 1450, [];
    ovn_kubernetes: "ovn-kubernetes", 1400, [];
    ptp_gke: "ptp-gke", 1450, [];
}
