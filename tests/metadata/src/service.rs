//! The services as they are when all is well: what each requires of a request, by its cloud's documentation.

use std::str::FromStr;

use anyhow::bail;
use base64ct::{Base64, Encoding};

use super::{Request, answer};

/// A cloud with a metadata service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloud {
    /// Microsoft Azure.
    Azure,
    /// Amazon EC2; `v2_only` where sessions are required.
    Aws {
        /// Whether a request without a token is refused.
        v2_only: bool,
    },
    /// Google Compute Engine.
    Gcp,
    /// Alibaba Cloud.
    Alibaba,
    /// OpenStack.
    OpenStack,
}

impl FromStr for Cloud {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "azure" => Self::Azure,
            "aws" => Self::Aws { v2_only: false },
            "aws-imdsv2-only" => Self::Aws { v2_only: true },
            "gcp" => Self::Gcp,
            "alibaba" => Self::Alibaba,
            "openstack" => Self::OpenStack,
            _ => bail!(
                "unknown cloud {text:?}: expected azure, aws, aws-imdsv2-only, gcp, alibaba or openstack"
            ),
        })
    }
}

/// The token of the simulated AWS. Always the same, because each connection may be served by another process.
pub const TOKEN: &str = "AQAEAHNpbXVsYXRlZA==";
const TOKEN_PATH: &str = "/latest/api/token";

/// Where the cloud has user data.
#[must_use]
pub const fn user_data_path(cloud: Cloud) -> &'static str {
    match cloud {
        Cloud::Azure => "/metadata/instance/compute/userData?api-version=2021-01-01&format=text",
        Cloud::Aws { .. } | Cloud::Alibaba => "/latest/user-data",
        Cloud::Gcp => "/computeMetadata/v1/instance/attributes/user-data",
        Cloud::OpenStack => "/openstack/latest/user_data",
    }
}

/// The answer to `request`, if the user data are this.
#[must_use]
pub fn correct(cloud: Cloud, user_data: &[u8], request: &Request) -> Vec<u8> {
    if cloud == Cloud::Azure
        && let Some(answer) = wire_server(request)
    {
        return answer;
    }
    match refusal(cloud, request) {
        Some(status) => answer(status, &[], b""),
        None if request.path == TOKEN_PATH => answer(200, &[], TOKEN.as_bytes()),
        None => answer(200, flavor(cloud), &encoded(cloud, user_data)),
    }
}

const WIRE_VERSION: &str = "2015-04-05";

/// What Azure's wire server answers, at an address of its own; `None` for a request to the metadata service.
fn wire_server(request: &Request) -> Option<Vec<u8>> {
    let answers = |body: &str| answer(200, &[("Content-Type", "text/xml; charset=utf-8")], body.as_bytes());
    let has_version = request.header("x-ms-version") == Some(WIRE_VERSION);
    let answer = match (&*request.method, &*request.path) {
        ("GET", "/?comp=versions") => answers(&format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?><Versions><Preferred><Version>{WIRE_VERSION}</Version></Preferred>\
             <Supported><Version>{WIRE_VERSION}</Version></Supported></Versions>"
        )),
        ("GET", "/machine/?comp=goalstate") if has_version => answers(
            "<GoalState><Incarnation>1</Incarnation><Container><ContainerId>container-1</ContainerId><RoleInstanceList>\
             <RoleInstance><InstanceId>instance-1</InstanceId></RoleInstance></RoleInstanceList></Container></GoalState>",
        ),
        ("POST", "/machine?comp=health") => {
            let body = String::from_utf8_lossy(&request.body);
            let said = ["<State>Ready</State>", "<ContainerId>container-1<", "<InstanceId>instance-1<"];
            answer(
                if has_version && said.iter().all(|part| body.contains(part)) { 200 } else { 400 },
                &[],
                b"",
            )
        }
        (_, path) if path.starts_with("/machine") => answer(400, &[], b""),
        _ => return None,
    };
    Some(answer)
}

/// The body that brings these user data.
pub(super) fn encoded(cloud: Cloud, user_data: &[u8]) -> Vec<u8> {
    match cloud {
        Cloud::Azure | Cloud::Gcp => Base64::encode_string(user_data).into_bytes(),
        Cloud::Aws { .. } | Cloud::Alibaba | Cloud::OpenStack => user_data.to_vec(),
    }
}

const fn flavor(cloud: Cloud) -> &'static [(&'static str, &'static str)] {
    match cloud {
        Cloud::Gcp => &[("Metadata-Flavor", "Google")],
        _ => &[],
    }
}

/// The status by which the service refuses; `None` for a request that it serves.
fn refusal(cloud: Cloud, request: &Request) -> Option<u16> {
    let is_token = matches!(cloud, Cloud::Aws { .. }) && request.path == TOKEN_PATH;
    if request.method != if is_token { "PUT" } else { "GET" } {
        return Some(405);
    }
    // Of a proxy, which no service but Alibaba's and OpenStack's admits.
    let forwarded = request.header("x-forwarded-for").is_some();
    match cloud {
        Cloud::Azure if forwarded || request.header("metadata") != Some("true") => Some(400),
        Cloud::Gcp if forwarded || request.header("metadata-flavor") != Some("Google") => Some(403),
        Cloud::Aws { .. } if is_token && forwarded => Some(403),
        Cloud::Aws { .. } if is_token => {
            let seconds =
                request.header("x-aws-ec2-metadata-token-ttl-seconds").and_then(|text| text.parse().ok());
            if seconds.is_some_and(|seconds| (1..=21600).contains(&seconds)) { None } else { Some(400) }
        }
        _ if request.path != user_data_path(cloud) => Some(404),
        Cloud::Aws { v2_only } => match request.header("x-aws-ec2-metadata-token") {
            Some(TOKEN) => None,
            None if !v2_only => None,
            _ => Some(401),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(cloud: Cloud, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let request = Request { method: method.into(), path: path.into(), headers, body: vec![] };
        let answer = String::from_utf8(correct(cloud, b"abc", &request)).unwrap();
        answer["HTTP/1.1 ".len()..][..3].to_owned()
    }

    #[test]
    fn each_service_refuses_what_the_real_one_refuses() {
        let (v1, v2) = (Cloud::Aws { v2_only: false }, Cloud::Aws { v2_only: true });
        let token = [("x-aws-ec2-metadata-token", TOKEN)];
        let ttl = |seconds| [("x-aws-ec2-metadata-token-ttl-seconds", seconds)];
        assert_eq!(status(v2, "GET", "/latest/user-data", &token), "200");
        assert_eq!(status(v2, "GET", "/latest/user-data", &[]), "401");
        assert_eq!(status(v1, "GET", "/latest/user-data", &[]), "200");
        assert_eq!(status(v1, "GET", "/latest/user-data", &[("x-aws-ec2-metadata-token", "old")]), "401");
        assert_eq!(status(v2, "PUT", TOKEN_PATH, &ttl("60")), "200");
        assert_eq!(status(v2, "PUT", TOKEN_PATH, &ttl("0")), "400");
        assert_eq!(status(v2, "GET", TOKEN_PATH, &ttl("60")), "405");
        let azure = user_data_path(Cloud::Azure);
        assert_eq!(status(Cloud::Azure, "GET", azure, &[("metadata", "true")]), "200");
        assert_eq!(status(Cloud::Azure, "GET", azure, &[]), "400");
        assert_eq!(status(Cloud::Azure, "GET", "/", &[("metadata", "true")]), "404");
        assert_eq!(
            status(Cloud::Gcp, "GET", user_data_path(Cloud::Gcp), &[("metadata-flavor", "Google")]),
            "200"
        );
        assert_eq!(status(Cloud::Gcp, "GET", user_data_path(Cloud::Gcp), &[]), "403");
        assert_eq!(status(Cloud::Alibaba, "GET", "/latest/user-data", &[]), "200");
        assert_eq!(status(Cloud::OpenStack, "GET", "/openstack/latest/user_data", &[]), "200");
    }
}
