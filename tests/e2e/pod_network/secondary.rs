//! `external-net-via-pod-vm`: the VM's second interface in the pod's namespace, and back with all that it had.

use std::time::Duration;

use secure_comms_tests::harness::pod_site::{PodSite, V4};
use secure_comms_tests::harness::process::Signal;
use secure_comms_tests::harness::scene::PATIENCE;
use secure_comms_tests::harness::test_namespace::TestNamespace;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{end, traffic, with};

fn external() -> Value {
    with(&V4, &[("external-net-via-pod-vm", json!(true))])
}

/// A VM with a second interface, `ens4`, and what is behind it.
fn with_second() -> (PodSite, TestNamespace) {
    let site = PodSite::new(&V4).unwrap();
    let outside = TestNamespace::new("outside").unwrap();
    site.vm.veth("ens4", &outside, "cable").unwrap();
    (site, outside)
}

/// The interfaces of the pod's IPv4 default routes.
fn default_interfaces(site: &PodSite) -> Vec<String> {
    let routes = site.pod.show(["-4", "route", "show", "default"]).unwrap();
    routes.as_array().unwrap().iter().map(|route| route["dev"].as_str().unwrap().to_owned()).collect()
}

/// Turns IPv6 off in the pod.
async fn without_ipv6(site: &PodSite) {
    for which in ["all", "default"] {
        let setting = format!("net.ipv6.conf.{which}.disable_ipv6=1");
        assert!(site.pod.command("sysctl").args(["-qw", &setting]).status().await.unwrap().success());
    }
}

/// The state of VM and pod, with the routes of the table of `ens4`.
fn state(site: &PodSite) -> (Value, Value) {
    // It exists once it has had a route.
    let table = site.vm.show(["route", "show", "table", "100"]).unwrap_or_default();
    (json!(site.state().unwrap()), table)
}

/// Gives `ens4` addresses and routes of both families, also of another table, as clouds do.
fn configure(site: &PodSite) {
    for address in ["10.77.0.2/24", "10.78.0.2/24", "fd77::2/64"] {
        site.vm.address("ens4", address).unwrap();
    }
    let routes = [
        "add default via 10.77.0.1 dev ens4 metric 300",
        "add 203.0.113.0/24 via 10.77.0.1 dev ens4 proto dhcp mtu 1400",
        "add default via 10.77.0.1 dev ens4 table 100",
        "add fd78::/64 via fd77::1 dev ens4",
    ];
    for route in routes {
        site.vm.ip(["route"].into_iter().chain(route.split(' '))).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_ipv6_costs_the_vm_no_address() {
    let (site, _outside) = with_second();
    configure(&site);
    without_ipv6(&site).await;
    let before = state(&site);
    let agent = site.up(&external()).await.unwrap();
    let line = agent.wait_for_text("'ens4' is the pod's, but not with all", PATIENCE).await.unwrap();
    assert!(line.contains("adding address fd77::2/64 to 'ens4': Permission denied"), "{line}");
    assert!(line.contains("IPv6 is off there"), "{line}");
    // What was restored before the second attempt counts.
    assert!(!line.contains("File exists") && !line.contains("10.7"), "{line}");
    assert_eq!(default_interfaces(&site), ["ens4"]);
    end(agent).await;
    assert_eq!(state(&site), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_fails_is_undone_as_a_whole() {
    let (site, _outside) = with_second();
    site.vm.address("ens4", "fd77::2/64").unwrap();
    site.vm.ip(["route", "add", "fd78::/64", "via", "fd77::1", "dev", "ens4"]).unwrap();
    without_ipv6(&site).await;
    let before = state(&site);
    let agent = site.up(&external()).await.unwrap();
    // More than once: nothing is lost from one attempt to the next.
    for _ in 0..2 {
        agent.wait_for_text("'ens4' is the VM's again", PATIENCE).await.unwrap();
    }
    agent
        .wait_for_text("second interface to the pod: moving 'ens4': adding address fd77::2/64", PATIENCE)
        .await
        .unwrap();
    assert_eq!(default_interfaces(&site), ["eth0"]);
    end(agent).await;
    assert_eq!(state(&site), before);

    // A name that is taken.
    site.pod.ip(["link", "add", "ens4", "type", "veth", "peer", "name", "peer"]).unwrap();
    let before = state(&site);
    let agent = site.up(&external()).await.unwrap();
    agent.wait_for_text("moving 'ens4' to the other namespace: File exists", PATIENCE).await.unwrap();
    end(agent).await;
    assert_eq!(state(&site), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_at_any_moment_costs_no_address() {
    let (site, _outside) = with_second();
    configure(&site);
    let before = state(&site);
    for step in 0..12 {
        let mut agent = site.up(&external()).await.unwrap();
        sleep(Duration::from_millis(step * 2)).await;
        agent.signal(Signal::SIGTERM).unwrap();
        assert!(agent.wait_exit(PATIENCE).await.unwrap().success(), "{}", agent.log());
        assert_eq!(state(&site), before, "after {} ms: {}", step * 2, agent.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_not_usable_yet_moves_along() {
    let (site, _outside) = with_second();
    configure(&site);
    // Duplicate address detection takes a minute.
    let slow = ["-qw", "net.ipv6.conf.ens4.dad_transmits=60"];
    assert!(site.vm.command("sysctl").args(slow).status().await.unwrap().success());
    site.vm.ip(["address", "add", "fd77::9/64", "dev", "ens4"]).unwrap();
    let before = state(&site);
    let agent = site.up(&external()).await.unwrap();
    agent.wait_for_text("'ens4' is the pod's, with its addresses and routes", PATIENCE).await.unwrap();
    let addresses = site.pod.show(["address", "show", "dev", "ens4"]).unwrap().to_string();
    assert!(addresses.contains("fd77::9"), "{addresses}");
    end(agent).await;
    assert_eq!(state(&site), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_route_that_follows_its_address_is_used() {
    let (site, _outside) = with_second();
    let agent = site.up(&external()).await.unwrap();
    site.vm.address("ens4", "10.77.0.2/24").unwrap();
    // Not at the same moment: the agent sees an address without a route. Its wait for the route ends after 5 s.
    sleep(Duration::from_millis(50)).await;
    site.vm.ip(["route", "add", "default", "via", "10.77.0.1", "dev", "ens4", "metric", "300"]).unwrap();
    agent.wait_for_text("'ens4' is the pod's, with its addresses and routes", PATIENCE).await.unwrap();
    assert_eq!(default_interfaces(&site), ["ens4"]);
    assert!(!agent.log().contains("no default route"), "{}", agent.log());
    end(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_interface_moves_to_the_pod_and_back() {
    let site = PodSite::new(&V4).unwrap();
    let outside = TestNamespace::new("outside").unwrap();
    outside.ip(["address", "add", "198.51.100.1/32", "dev", "lo"]).unwrap();
    let spec = with(&V4, &[("external-net-via-pod-vm", json!(true))]);
    let agent = site.up(&spec).await.unwrap();
    // It appears late, as a second interface does.
    site.vm.veth("ens4", &outside, "cable").unwrap();
    outside.address("cable", "10.77.0.1/24").unwrap();
    site.vm.address("ens4", "10.77.0.2/24").unwrap();
    let given = "'ens4' is the pod's, with its addresses and routes";
    agent.wait_for_text(given, PATIENCE).await.unwrap();
    let line = agent.wait_for_text("'ens4' has no default route", PATIENCE).await.unwrap();
    assert!(
        line.contains("the pod's default route stays on the tunnel; give 'ens4' a default route"),
        "{line}"
    );
    assert_eq!(default_interfaces(&site), ["eth0"]);
    end(agent).await;

    site.vm.address("ens4", "fd77::2/64").unwrap();
    site.vm.ip(["route", "add", "default", "via", "10.77.0.1", "dev", "ens4", "metric", "300"]).unwrap();
    site.vm
        .ip(["route", "add", "203.0.113.0/24", "via", "10.77.0.1", "dev", "ens4", "proto", "dhcp"])
        .unwrap();
    let before = site.state().unwrap();
    let mut agent = site.up(&spec).await.unwrap();
    agent.wait_for_text(given, PATIENCE).await.unwrap();
    let given_state = site.state().unwrap();
    for _ in 0..2 {
        let defaults: Vec<_> =
            site.pod.routes().unwrap().into_iter().filter(|route| route["dst"] == "default").collect();
        assert_eq!(defaults.len(), 1, "{defaults:?}");
        assert_eq!((&defaults[0]["dev"], &defaults[0]["metric"]), (&json!("ens4"), &json!(300)));
        assert!(site.vm.show(["link", "show", "dev", "ens4"]).is_err());
        site.pod.ping("198.51.100.1").await.unwrap();
        site.pod.exchange(&outside, "198.51.100.1").await.unwrap();
        traffic(&site, &V4).await;
        agent.kill9().await.unwrap();
        agent = site.up(&spec).await.unwrap();
        agent.wait_for_text(given, PATIENCE).await.unwrap();
        assert_eq!(site.state().unwrap(), given_state);
    }
    end(agent).await;
    assert_eq!(site.state().unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_borrowed_default_route_is_not_kept() {
    let site = PodSite::new(&V4).unwrap();
    // Both are in one network, through a switch at the worker node.
    site.vm.veth("ens4", &site.node, "cable2").unwrap();
    site.vm.address("ens4", "10.9.0.5/24").unwrap();
    site.node.ip(["route", "add", "10.9.0.5/32", "dev", "cable2"]).unwrap();
    site.node.ip(["address", "add", "198.51.100.1/32", "dev", "lo"]).unwrap();
    let before = site.state().unwrap();
    let spec = with(&V4, &[("external-net-via-pod-vm", json!(true))]);
    let agent = site.up(&spec).await.unwrap();
    agent.wait_for_text("'ens4' is the pod's", PATIENCE).await.unwrap();
    let routes = site.pod.routes().unwrap();
    let default: Vec<_> = routes.iter().filter(|route| route["dst"] == "default").collect();
    assert_eq!(default.len(), 1, "{routes:?}");
    assert_eq!((&default[0]["dev"], &default[0]["gateway"]), (&json!("ens4"), &json!("10.9.0.2")));
    site.pod.exchange(&site.node, "198.51.100.1").await.unwrap();
    end(agent).await;
    assert_eq!(site.state().unwrap(), before);
}
