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

    fn make(&self, id: &str, network: &Value, vm: IpAddr) -> Result<()> {
        let pod_ip = network.get("podip").and_then(Value::as_str).context("apf.json has no podip")?;
        let vni = network.get("vxlan-id").and_then(Value::as_u64).context("apf.json has no vxlan-id")?;
        let (vni, remote) = (vni.to_string(), vm.to_string());
        let pod = TestNamespace::new("pod")?;
        pod.ip(["link", "add", "eth0", "type", "veth", "peer", "name", "peer"])?;
        pod.address("eth0", pod_ip)?;
        // One at a time: the link has a name of the node's for a moment.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
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
        let network = instance.apf_json.get("pod-network").context("apf.json has no pod-network")?.clone();
        let vm = self.cloud.create(instance).await?;
        self.make(&id, &network, vm)?;
        Ok(vm)
    }

    async fn delete(&self, id: &str) -> Result<()> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        self.cloud.delete(id).await
    }
}
