//! Reports to Azure that the VM is ready, as cloud-api-adaptor's `azure-ready` does: without it Azure takes the VM for failed after
//! some twenty minutes.
//!
//! Three requests to the host's "wire server", each over its own connection: which versions it speaks, which goal state the VM has, and
//! the report with the names that the goal state gives to the VM.

pub mod xml;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

pub use xml::XmlFault;

use crate::console::{Console, with_causes};
use crate::fetch::{Clock, Monotonic};
use crate::http::{self, Answer, HttpError, Limits, Request};

/// The version that is asked for if the server has it.
const VERSION: &str = "2015-04-05";
/// What the program calls itself; the server takes any name.
const AGENT: &str = "azure-ready";
/// The longest name that is taken from the goal state, in bytes. Azure's are GUIDs.
const NAME_MAX: usize = 256;

/// Where and how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `-endpoint URL`.
    pub endpoint: Endpoint,
    /// `-timeout DURATION`: of one request, its connection included.
    pub timeout: Duration,
    /// How long a report that fails is repeated.
    pub total: Duration,
    /// Between two tries.
    pub pause: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            endpoint: Endpoint::default(),
            timeout: Duration::from_secs(30),
            total: Duration::from_secs(10 * 60),
            pause: Duration::from_secs(5),
        }
    }
}

/// The wire server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    address: SocketAddr,
    /// For the header `Host`.
    host: String,
}

impl Default for Endpoint {
    fn default() -> Self {
        let address = Ipv4Addr::new(168, 63, 129, 16);
        Self { address: (address, 80).into(), host: address.to_string() }
    }
}

/// What `-endpoint` must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected http://ADDRESS or http://ADDRESS:PORT, with an IP address")]
pub struct EndpointError;

impl std::str::FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(url: &str) -> Result<Self, EndpointError> {
        let host = url.strip_prefix("http://").ok_or(EndpointError)?;
        let host = host.strip_suffix('/').unwrap_or(host);
        let with_port = if host.parse::<Ipv4Addr>().is_ok() || host.ends_with(']') {
            format!("{host}:80")
        } else {
            host.to_owned()
        };
        Ok(Self { address: with_port.parse().map_err(|_| EndpointError)?, host: host.to_owned() })
    }
}

/// Why a report failed. No text holds anything that the server sent.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// No answer.
    #[error("{request}")]
    Http {
        /// Method and URL.
        request: String,
        /// What came instead.
        #[source]
        cause: HttpError,
    },
    /// An answer that refuses.
    #[error("{request}: status {status}")]
    Status {
        /// Method and URL.
        request: String,
        /// Of the answer.
        status: u16,
    },
    /// An answer that can't be read.
    #[error("{request}: the body is malformed: {fault}")]
    Xml {
        /// Method and URL.
        request: String,
        /// What is wrong.
        fault: XmlFault,
    },
    /// An answer without what is needed, or with more than can be meant.
    #[error("{request}: the body has {fault}")]
    Content {
        /// Method and URL.
        request: String,
        /// What is wrong.
        fault: &'static str,
    },
}

impl ReadyError {
    /// Whether the next try will fare no better.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Http { cause, .. } => cause.is_permanent() || matches!(cause, HttpError::Redirect(_)),
            // 410: the goal state has changed since it was read.
            Self::Status { status, .. } => !matches!(status, 408 | 410 | 429 | 500..),
            Self::Xml { .. } | Self::Content { .. } => true,
        }
    }
}

/// Reports that the VM is ready. A fault that may pass is on the console once, and tried again from the first request on, until
/// `total` is over.
///
/// # Errors
/// The last fault, or the first that will not pass.
pub fn report(settings: &Settings, clock: &mut impl Clock, console: &mut Console) -> Result<(), ReadyError> {
    let start = clock.now();
    loop {
        let left = settings.total.saturating_sub(clock.now().saturating_sub(start));
        let error = match once(settings, left) {
            Ok(()) => {
                console.note(&format!("Azure: {} knows that this VM is ready", settings.endpoint.host));
                return Ok(());
            }
            Err(error) => error,
        };
        let left = settings.total.saturating_sub(clock.now().saturating_sub(start));
        // A try without time would hide the fault behind its own.
        if error.is_permanent() || left <= settings.pause {
            return Err(error);
        }
        console.fault(&format!("Azure: {}; trying again", with_causes(&error)));
        clock.pause(settings.pause);
    }
}

/// One try: three requests.
fn once(settings: &Settings, left: Duration) -> Result<(), ReadyError> {
    let connect = Limits::default().connect.min(settings.timeout);
    let limits = Limits { connect, answer: settings.timeout, total: settings.timeout }.within(left);
    let server = Server { endpoint: &settings.endpoint, limits };
    let version = server.version()?;
    let state = server.goal_state(&version)?;
    server.report(&version, &state)
}

struct Server<'a> {
    endpoint: &'a Endpoint,
    limits: Limits,
}

/// What a report says about the VM.
struct GoalState {
    incarnation: String,
    container: String,
    instance: String,
}

impl Server<'_> {
    fn version(&self) -> Result<String, ReadyError> {
        let path = "/?comp=versions";
        let texts = self.texts(path, &[])?;
        let listed = texts.of("Versions/Supported/Version");
        let chosen = listed.iter().find(|version| **version == VERSION).or(listed.first());
        let chosen = chosen.ok_or_else(|| self.content(path, "no version"))?.trim();
        if http::is_header_value(chosen.as_bytes()) {
            Ok(chosen.to_owned())
        } else {
            Err(self.content(path, "a version that no header may have"))
        }
    }

    fn goal_state(&self, version: &str) -> Result<GoalState, ReadyError> {
        let path = "/machine/?comp=goalstate";
        let texts = self.texts(path, &[("X-Ms-Version", version)])?;
        let one = |element, missing, many| match texts.of(element)[..] {
            [] | [""] => Err(self.content(path, missing)),
            [name] if name.len() <= NAME_MAX => Ok(name.to_owned()),
            [_] => Err(self.content(path, "a name longer than 256 bytes")),
            _ => Err(self.content(path, many)),
        };
        Ok(GoalState {
            incarnation: one("GoalState/Incarnation", "no Incarnation", "more than one Incarnation")?,
            container: one("GoalState/Container/ContainerId", "no ContainerId", "more than one ContainerId")?,
            // With two, which of them is this VM?
            instance: one(
                "GoalState/Container/RoleInstanceList/RoleInstance/InstanceId",
                "no InstanceId",
                "more than one InstanceId",
            )?,
        })
    }

    fn report(&self, version: &str, state: &GoalState) -> Result<(), ReadyError> {
        let path = "/machine?comp=health";
        let headers = [("X-Ms-Version", version), ("Content-Type", "text/xml; charset=utf-8")];
        match self.send("POST", path, &headers, health(state).as_bytes())?.status {
            200 | 201 | 202 | 204 => Ok(()),
            status => Err(ReadyError::Status { request: self.name("POST", path), status }),
        }
    }

    fn texts(&self, path: &str, headers: &[(&str, &str)]) -> Result<Texts, ReadyError> {
        let answer = self.send("GET", path, headers, b"")?;
        if !matches!(answer.status, 200 | 201) {
            return Err(ReadyError::Status { request: self.name("GET", path), status: answer.status });
        }
        xml::texts(&answer.body)
            .map(Texts)
            .map_err(|fault| ReadyError::Xml { request: self.name("GET", path), fault })
    }

    fn send(
        &self,
        method: &'static str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, ReadyError> {
        let headers = [&[("X-Ms-Agent-Name", AGENT)], headers].concat();
        let (address, host) = (self.endpoint.address, &self.endpoint.host);
        http::request(&Request { method, address, host, path, headers: &headers, body }, self.limits)
            .map_err(|cause| ReadyError::Http { request: self.name(method, path), cause })
    }

    fn name(&self, method: &str, path: &str) -> String {
        format!("{method} http://{}{path}", self.endpoint.host)
    }

    fn content(&self, path: &str, fault: &'static str) -> ReadyError {
        ReadyError::Content { request: self.name("GET", path), fault }
    }
}

/// The texts of an answer, by their path.
struct Texts(Vec<(String, String)>);

impl Texts {
    fn of(&self, path: &str) -> Vec<&str> {
        self.0.iter().filter(|(found, _)| found == path).map(|(_, text)| text.as_str()).collect()
    }
}

fn health(state: &GoalState) -> String {
    format!(
        r#"<?xml version="1.0" encoding="utf-8"?>
<Health>
  <GoalStateIncarnation>{}</GoalStateIncarnation>
  <Container>
    <ContainerId>{}</ContainerId>
    <RoleInstanceList>
      <Role>
        <InstanceId>{}</InstanceId>
        <Health>
          <State>Ready</State>
        </Health>
      </Role>
    </RoleInstanceList>
  </Container>
</Health>"#,
        xml::escape(&state.incarnation),
        xml::escape(&state.container),
        xml::escape(&state.instance)
    )
}

/// Reports from this machine; false after a fault, which is on the console then.
#[must_use]
pub fn report_this_machine(settings: &Settings) -> bool {
    let mut console = Console::of_machine("azure-ready");
    match report(settings, &mut Monotonic::default(), &mut console) {
        Ok(()) => true,
        Err(error) => {
            console.fatal(&format!("Azure: {}", with_causes(&error)));
            false
        }
    }
}

#[cfg(test)]
mod tests;
