//! The requests of each cloud, one try each.

use std::net::SocketAddr;
use std::time::Instant;

use base64ct::{Base64, Encoding};

use super::{Endpoints, Fault};
use crate::cloud::Cloud;
use crate::console::Console;
use crate::http::{self, BODY_LIMIT, Limits, Request};
use crate::input;

/// Paths and headers: the documentation of each cloud's metadata service.
const AZURE: &str = "/metadata/instance/compute/userData?api-version=2021-01-01&format=text";
const AWS_TOKEN: &str = "/latest/api/token";
const AWS: &str = "/latest/user-data";
const GCP: &str = "/computeMetadata/v1/instance/attributes/user-data";
/// Reached by its address: a name would need a resolver, and let it decide who answers.
const GCP_HOST: &str = "metadata.google.internal";
const ALIBABA: &str = "/latest/user-data";
const OPENSTACK: &str = "/openstack/latest/user_data";

/// How long a try may take.
#[derive(Clone, Copy)]
pub(super) struct Time {
    /// Of each request.
    pub(super) limits: Limits,
    /// Of all of them.
    pub(super) end: Instant,
}

/// The user data, decoded as the cloud encodes them, and where they came from, for messages.
pub(super) fn user_data(
    cloud: Cloud,
    endpoints: &Endpoints,
    time: Time,
    console: &mut Console,
) -> Result<(String, Vec<u8>), Fault> {
    let link_local = Service { address: endpoints.link_local, host: None, time };
    match cloud {
        Cloud::NoCloud => file(endpoints),
        Cloud::Azure => decoded(link_local.get(AZURE, &[("Metadata", "true")])?),
        Cloud::Aws => aws(&link_local, console),
        Cloud::Gcp => {
            let service = Service { host: Some(GCP_HOST), ..link_local };
            decoded(service.get(GCP, &[("Metadata-Flavor", "Google")])?)
        }
        Cloud::Alibaba => Service { address: endpoints.alibaba, ..link_local }.get(ALIBABA, &[]),
        Cloud::OpenStack => link_local.get(OPENSTACK, &[]),
    }
}

fn file(endpoints: &Endpoints) -> Result<(String, Vec<u8>), Fault> {
    let path = &endpoints.no_cloud;
    match input::read(path, BODY_LIMIT) {
        Ok(content) => Ok((path.display().to_string(), content)),
        Err(cause) => Err(Fault::File { path: path.clone(), cause }),
    }
}

/// With a session token (IMDSv2). Without one (IMDSv1) only where the service says that it has none: a fault must not weaken the
/// request.
fn aws(service: &Service, console: &mut Console) -> Result<(String, Vec<u8>), Fault> {
    let ttl = [("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")];
    let (what, answer) = service.ask("PUT", AWS_TOKEN, &ttl)?;
    match answer.status {
        200 if http::is_header_value(&answer.body) => {
            let token = String::from_utf8_lossy(&answer.body);
            service.get(AWS, &[("X-Aws-Ec2-Metadata-Token", &token)])
        }
        200 => Err(Fault::Token { what }),
        403 | 404 => {
            let status = answer.status;
            console.fault(&format!(
                "AWS: {what}: status {status}, so IMDSv2 is off; trying IMDSv1, without a token"
            ));
            service.get(AWS, &[])
        }
        status => Err(Fault::Status { what, status }),
    }
}

/// A metadata service.
#[derive(Clone, Copy)]
struct Service {
    address: SocketAddr,
    /// The name that it expects to be asked by, if that is not its address.
    host: Option<&'static str>,
    time: Time,
}

impl Service {
    /// The body of an answer with status 200.
    fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<(String, Vec<u8>), Fault> {
        let (what, answer) = self.ask("GET", path, headers)?;
        match answer.status {
            200 => Ok((what, answer.body)),
            status => Err(Fault::Status { what, status }),
        }
    }

    /// An answer, and how messages name the request.
    fn ask(
        &self,
        method: &'static str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<(String, http::Answer), Fault> {
        let address = self.address;
        let authority = if address.port() == 80 { address.ip().to_string() } else { address.to_string() };
        let what = format!("{method} http://{authority}{path}");
        let host = self.host.unwrap_or(&authority);
        let limits = self.time.limits.within(self.time.end.saturating_duration_since(Instant::now()));
        let request = Request { method, address, host, path, headers, body: b"" };
        match http::request(&request, limits) {
            Ok(answer) => Ok((what, answer)),
            Err(cause) => Err(Fault::Http { what, cause }),
        }
    }
}

/// Decodes base64, of which CR and LF are skipped.
fn decoded((what, mut body): (String, Vec<u8>)) -> Result<(String, Vec<u8>), Fault> {
    body.retain(|byte| !matches!(byte, b'\r' | b'\n'));
    let text = String::from_utf8_lossy(&body);
    match Base64::decode_vec(&text) {
        Ok(decoded) => Ok((what, decoded)),
        Err(_) if is_cut(&body) => Err(Fault::Base64Cut { what }),
        Err(_) => Err(Fault::Base64 { what }),
    }
}

/// Whether more bytes could make it base64.
fn is_cut(body: &[u8]) -> bool {
    !body.len().is_multiple_of(4)
        && body.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(body: &[u8]) -> Result<Vec<u8>, &'static str> {
        match decoded((String::new(), body.to_vec())) {
            Ok((_, decoded)) => Ok(decoded),
            Err(Fault::Base64 { .. }) => Err("wrong"),
            Err(Fault::Base64Cut { .. }) => Err("cut"),
            Err(fault) => panic!("{fault}"),
        }
    }

    #[test]
    fn base64_may_be_wrapped_but_nothing_else() {
        assert_eq!(class(b"YW\r\nJj\n"), Ok(b"abc".to_vec()));
        assert_eq!(class(b""), Ok(vec![]));
        assert_eq!(class(b"YW Jj"), Err("wrong"));
        assert_eq!(class(b"YW-_"), Err("wrong"));
        assert_eq!(class(b"#cloud-config\n"), Err("wrong"));
        assert_eq!(class(b"\xff\xff\xff\xff"), Err("wrong"));
        assert_eq!(class(b"YWI"), Err("cut"));
    }
}
