//! The pods' network namespaces on the node, as CAA leaves them before it dials a VM: the pod's address, and a VXLAN link to the
//! VM. In CAA's strict variant they are all that tells whose VM an address is.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use async_trait::async_trait;
use serde_json::Value;

use crate::harness::cloud::TestCloud;
use crate::harness::test_namespace::TestNamespace;
use crate::simulators::caa::{Cloud, Instance};

/// First of the VXLAN network identifiers.
const FIRST_VNI: usize = 555_000;

/// A cloud, and the namespaces of the pods whose VMs are in it.
#[derive(Debug)]
pub struct PodNetworks {
    cloud: Arc<TestCloud>,
    node: Arc<TestNamespace>,
    made: Mutex<HashMap<String, TestNamespace>>,
}

impl PodNetworks {
    /// For the VMs of this cloud, on this node.
    #[must_use]
    pub fn new(cloud: Arc<TestCloud>, node: Arc<TestNamespace>) -> Self {
        Self { cloud, node, made: Mutex::default() }
    }

    fn make(&self, id: &str, pod_ip: &str, vm: IpAddr) -> Result<()> {
        let pod = TestNamespace::new("pod")?;
        pod.ip(["link", "add", "eth0", "type", "veth", "peer", "name", "peer"])?;
        pod.address("eth0", pod_ip)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (vni, remote) = ((FIRST_VNI + made.len()).to_string(), vm.to_string());
        // Made in the node's namespace, where its datagrams go out.
        self.node.ip([
            "link",
            "add",
            "moves",
            "type",
            "vxlan",
            "id",
            &vni,
            "remote",
            &remote,
            "dstport",
            "4789",
            "nolearning",
        ])?;
        self.node.ip(["link", "set", "moves", "netns", pod.name()])?;
        pod.ip(["link", "set", "moves", "name", "vxlan1"])?;
        made.insert(id.to_owned(), pod);
        Ok(())
    }
}

#[async_trait]
impl Cloud for PodNetworks {
    async fn create(&self, instance: Instance) -> Result<IpAddr> {
        let id = instance.id.clone();
        let pod_ip = instance.apf_json.pointer("/pod-network/podip").and_then(Value::as_str);
        let pod_ip = pod_ip.context("apf.json has no podip")?.to_owned();
        let vm = self.cloud.create(instance).await?;
        self.make(&id, &pod_ip, vm)?;
        Ok(vm)
    }

    async fn delete(&self, id: &str) -> Result<()> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        self.cloud.delete(id).await
    }
}
