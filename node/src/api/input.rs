//! What comes in: bounded, and checked as a whole.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use secure_comms_adaptor::address::Address;
use secure_comms_protocol::{InitDataDigest, PodId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use super::problem::Kind;
use super::types::{ADDRESSES_MAX, DEADLINE_MAX, Fault, PodSpec, Problem, StartOrder};
use crate::init_data::PodName;

/// The largest body, in bytes.
pub(super) const BODY_MAX: usize = 64 * 1024;
/// Time for a body.
const BODY_TIME: Duration = Duration::from_secs(10);

/// The id in a path.
#[derive(Debug)]
pub(super) struct Id(pub(super) PodId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Box<Problem>;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Box<Problem>> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = text.map_err(|error| Kind::Malformed.problem(error.body_text()))?;
        text.parse().map(Self).map_err(|error| Problem::invalid(vec![Fault::new("id", error)]))
    }
}

/// The query of a path.
#[derive(Debug)]
pub(super) struct Fields<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Fields<T> {
    type Rejection = Box<Problem>;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Box<Problem>> {
        let fields = Query::<T>::try_from_uri(&parts.uri);
        let invalid = |reason| Problem::invalid(vec![Fault::new("query", reason)]);
        fields.map(|Query(fields)| Self(fields)).map_err(|error| invalid(error.body_text()))
    }
}

/// A JSON body.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

/// The body of a request.
pub(super) trait Content: DeserializeOwned {
    /// Pointers (RFC 6901) to the values that are objects if they are there: serde takes a list for one as well.
    const OBJECTS: &'static [&'static str];
}

impl Content for PodSpec {
    const OBJECTS: &'static [&'static str] = &["", "/podRef"];
}

impl Content for StartOrder {
    const OBJECTS: &'static [&'static str] = &[""];
}

impl<S: Send + Sync, T: Content> FromRequest<S> for Json<T> {
    type Rejection = Box<Problem>;

    async fn from_request(request: Request, _: &S) -> Result<Self, Box<Problem>> {
        let (parts, body) = request.into_parts();
        let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let media = header(CONTENT_TYPE).and_then(|value| value.split(';').next()).map(str::trim);
        if !media.is_some_and(|media| media.eq_ignore_ascii_case("application/json")) {
            return Err(Kind::MediaType.problem("send the body as Content-Type: application/json"));
        }
        let announced = header(CONTENT_LENGTH).and_then(|length| length.parse::<usize>().ok());
        if announced.is_some_and(|length| length > BODY_MAX) {
            return Err(too_large());
        }
        parse(&read(body).await?).map(Self)
    }
}

async fn read(body: Body) -> Result<bytes::Bytes, Box<Problem>> {
    // A body that was cut off has no reader of this answer either.
    let read = timeout(BODY_TIME, to_bytes(body, BODY_MAX)).await;
    read.map_err(|_| Kind::Slow.problem(format!("the body did not arrive within {} s", BODY_TIME.as_secs())))?
        .map_err(|_| too_large())
}

fn too_large() -> Box<Problem> {
    Kind::TooLarge.problem(format!("the body is larger than {BODY_MAX} bytes"))
}

fn parse<T: Content>(body: &[u8]) -> Result<T, Box<Problem>> {
    let refused = |error: serde_json::Error| {
        if error.is_data() {
            Problem::invalid(vec![Fault::new("body", error)])
        } else {
            Kind::Malformed.problem(format!("the body is not JSON: {error}"))
        }
    };
    let value: Value = serde_json::from_slice(body).map_err(refused)?;
    let lists = T::OBJECTS.iter().filter(|at| value.pointer(at).is_some_and(Value::is_array));
    let lists: Vec<_> =
        lists.map(|at| Fault::new(&format!("body{at}"), "expected an object, got a list")).collect();
    if !lists.is_empty() {
        return Err(Problem::invalid(lists));
    }
    serde_json::from_slice(body).map_err(refused)
}

/// The query of `PUT /v1/pods/{id}`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PrepareQuery {
    /// Time until the keys must be published, in seconds.
    pub(super) deadline_seconds: Option<u32>,
}

/// The query of requests that end a pod.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EndQuery {
    /// Whether the pod is ended although cloud-api-adaptor owns it.
    #[serde(default)]
    pub(super) force: bool,
}

/// The query of `GET /v1/events`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    /// The pod whose events are wanted; all pods by default.
    pub(super) pod: Option<String>,
}

impl EventsQuery {
    pub(super) fn pod(&self) -> Result<Option<PodId>, Box<Problem>> {
        let pod = self.pod.as_deref().map(str::parse).transpose();
        pod.map_err(|error: secure_comms_protocol::PodIdError| {
            Problem::invalid(vec![Fault::new("pod", error)])
        })
    }
}

/// A [`PodSpec`] that is valid.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    pub(super) name: Option<PodName>,
    pub(super) init_data: Option<InitDataDigest>,
    pub(super) deadline: Duration,
}

/// Time until the keys must be published, and until a pod must be up, where the client names none, in seconds.
const PREPARE_DEADLINE: u32 = 60;
const START_DEADLINE: u32 = 600;

impl Spec {
    pub(super) fn new(spec: &PodSpec, query: &PrepareQuery) -> Result<Self, Box<Problem>> {
        let mut faults = Vec::new();
        let name = spec.pod_ref.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name));
        let name = name.and_then(|name| {
            let expected = "expected 1 to 253 characters out of a-z 0-9 . - in the namespace and in the name";
            name.parse().map_err(|_| faults.push(Fault::new("podRef", expected))).ok()
        });
        let init_data = spec.init_data_digest.as_deref().and_then(|digest| {
            digest.parse().map_err(|error| faults.push(Fault::new("initDataDigest", error))).ok()
        });
        let deadline = deadline(query.deadline_seconds, PREPARE_DEADLINE, &mut faults);
        if faults.is_empty() { Ok(Self { name, init_data, deadline }) } else { Err(Problem::invalid(faults)) }
    }
}

/// A [`StartOrder`] that is valid.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub(super) addresses: Vec<Address>,
    pub(super) deadline: Duration,
    pub(super) wait: bool,
}

impl Start {
    pub(super) fn new(order: &StartOrder) -> Result<Self, Box<Problem>> {
        let mut faults = Vec::new();
        let count = order.addresses.len();
        if count == 0 || count > ADDRESSES_MAX {
            faults.push(Fault::new(
                "addresses",
                format!("expected 1 to {ADDRESSES_MAX} addresses, got {count}"),
            ));
        }
        let mut addresses = Vec::new();
        for (index, text) in order.addresses.iter().take(ADDRESSES_MAX).enumerate() {
            match text.parse() {
                Ok(address) => addresses.push(address),
                Err(error) => faults.push(Fault::new(&format!("addresses[{index}]"), error)),
            }
        }
        let deadline = deadline(order.deadline_seconds, START_DEADLINE, &mut faults);
        let start = Self { addresses, deadline, wait: order.wait };
        if faults.is_empty() { Ok(start) } else { Err(Problem::invalid(faults)) }
    }
}

fn deadline(seconds: Option<u32>, default: u32, faults: &mut Vec<Fault>) -> Duration {
    let seconds = seconds.unwrap_or(default);
    if !(1..=DEADLINE_MAX).contains(&seconds) {
        let reason = format!("expected 1 to {DEADLINE_MAX} seconds, got {seconds}");
        faults.push(Fault::new("deadlineSeconds", reason));
    }
    Duration::from_secs(seconds.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_are_reported_together() {
        let order = StartOrder {
            addresses: vec!["10.0.0.7".into(), "a b".into(), "vm:0".into()],
            deadline_seconds: Some(0),
            wait: false,
        };
        let problem = Start::new(&order).unwrap_err();
        let fields: Vec<_> = problem.faults.iter().map(|fault| &*fault.field).collect();
        assert_eq!(fields, ["addresses[1]", "addresses[2]", "deadlineSeconds"]);
        assert!(problem.detail.ends_with("; and 2 more"), "{}", problem.detail);
        let json = br#"{"podRef": {"namespace": "A", "name": "b"}, "initDataDigest": "0"}"#;
        let query = PrepareQuery { deadline_seconds: Some(90_000) };
        let problem = Spec::new(&parse(json).unwrap(), &query).unwrap_err();
        assert_eq!(problem.faults.len(), 3);
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let problem = parse::<PodSpec>(br#"{"addresses": []}"#).unwrap_err();
        assert_eq!((problem.status, &*problem.faults[0].field), (422, "body"));
        assert!(problem.faults[0].reason.contains("unknown field `addresses`"));
        assert_eq!(parse::<PodSpec>(b"{").unwrap_err().status, 400);
        for list in [&b"[]"[..], br#"{"podRef": ["default", "web-1"]}"#] {
            assert_eq!(parse::<PodSpec>(list).unwrap_err().status, 422);
        }
    }
}
