//! Certificates and files as cloud-api-adaptor makes them.

#[path = "../../../fuzz/src/corpus.rs"]
pub(crate) mod corpus;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};

/// The certificates of a cloud-api-adaptor, which are made when it starts.
pub(crate) struct Caa {
    ca: CertifiedIssuer<'static, KeyPair>,
    /// The client's certificate, self-signed and without a name.
    pub(crate) client: String,
}

impl Caa {
    pub(crate) fn new() -> Self {
        let mut ca = CertificateParams::default();
        ca.distinguished_name = organization("agent-protocol-forwarder");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
        let mut client = CertificateParams::default();
        client.distinguished_name = organization("cloud-api-adaptor");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let client = client.self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
        Self { ca, client }
    }

    /// A server certificate for these names.
    pub(crate) fn certificate(&self, names: &[&str], key: &KeyPair) -> String {
        let mut server =
            CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        server.distinguished_name = organization("agent-protocol-forwarder");
        server.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or("none"));
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.signed_by(key, &self.ca).unwrap().pem()
    }

    /// The object in `apf.json` of a pod.
    pub(crate) fn apf(&self, server_name: &str, key: &KeyPair) -> Value {
        json!({
            "pod-network": {
                "podip": "10.244.3.5/24", "pod-hw-addr": "0a:58:0a:f4:00:05", "interface": "eth0",
                "worker-node-ip": "10.99.0.1/24", "tunnel-type": "vxlan",
                "routes": [{"dst": "::ffff:0.0.0.0/0", "gw": "10.244.3.1", "dev": "eth0", "protocol": "boot"}],
                "neighbors": null, "mtu": 1500, "index": 6, "vxlan-port": 4789, "vxlan-id": 555_006,
                "dedicated": false, "external-net-via-pod-vm": false,
            },
            "pod-namespace": "shop",
            "pod-name": "web-0",
            "tls-server-key": key.serialize_pem(),
            "tls-server-cert": self.certificate(&[server_name], key),
            "tls-client-ca": self.client,
        })
    }

    /// The text of `apf.json` of a pod.
    pub(crate) fn text(&self, server_name: &str) -> String {
        self.apf(server_name, &KeyPair::generate().unwrap()).to_string()
    }
}

fn organization(name: &str) -> rcgen::DistinguishedName {
    let mut names = rcgen::DistinguishedName::new();
    names.push(DnType::OrganizationName, name);
    names
}
