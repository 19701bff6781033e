//! Errors as the client sees them: which status, which kind, and what to do. One table for all.

use std::io;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use secure_comms_adaptor::AdaptorError;
use secure_comms_adaptor::kbs::KbsError;
use secure_comms_adaptor::registry::PathError;
use secure_comms_adaptor::store::StoreError;
use secure_comms_adaptor::with_causes;
use secure_comms_keys::FileError;
use secure_comms_keys::text::one_line;

use super::types::{Fault, Problem};

/// Where the kinds of problems are explained.
const KINDS: &str =
    "https://github.com/confidential-containers/secure-comms/blob/main/docs/operations/API.md#";
/// Longest detail, in bytes.
const DETAIL_MAX: usize = 2000;
/// Most faults that are listed, and the longest reason of one.
const FAULTS_MAX: usize = 32;
const FAULT_MAX: usize = 300;

/// The kinds of problems: heading in docs/operations/API.md, title, and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Malformed,
    Forbidden,
    NoRoute,
    NotFound,
    Method,
    Slow,
    AlreadyStarted,
    Stopped,
    Locked,
    Owned,
    TooLarge,
    MediaType,
    Invalid,
    Internal,
    Store,
    Listen,
    KbsRefused,
    StartFailed,
    KbsDown,
    PodEnding,
    NoOrphan,
    ServiceEnding,
    Busy,
    Deadline,
    StoreFull,
}

impl Kind {
    fn row(self) -> (&'static str, &'static str, StatusCode) {
        match self {
            Self::Malformed => ("malformed-request", "The request is malformed", StatusCode::BAD_REQUEST),
            Self::Forbidden => ("forbidden", "The user may not use the API", StatusCode::FORBIDDEN),
            Self::NoRoute => ("no-route", "There is nothing at this path", StatusCode::NOT_FOUND),
            Self::NotFound => ("not-found", "The pod is not known", StatusCode::NOT_FOUND),
            Self::Method => {
                ("method-not-allowed", "The path has no such method", StatusCode::METHOD_NOT_ALLOWED)
            }
            Self::Slow => ("slow-request", "The request took too long", StatusCode::REQUEST_TIMEOUT),
            Self::AlreadyStarted => ("already-started", "The pod is already started", StatusCode::CONFLICT),
            Self::Stopped => ("stopped", "The pod was stopped", StatusCode::CONFLICT),
            Self::Locked => ("locked", "Another adaptor drives the pod", StatusCode::CONFLICT),
            Self::Owned => ("owned-by-caa", "The pod is cloud-api-adaptor's", StatusCode::CONFLICT),
            Self::TooLarge => ("too-large", "The body is too large", StatusCode::PAYLOAD_TOO_LARGE),
            Self::MediaType => ("media-type", "The body is not JSON", StatusCode::UNSUPPORTED_MEDIA_TYPE),
            Self::Invalid => ("invalid-request", "The request is invalid", StatusCode::UNPROCESSABLE_ENTITY),
            Self::Internal => ("internal", "Internal error", StatusCode::INTERNAL_SERVER_ERROR),
            Self::Store => ("store", "The key store failed", StatusCode::INTERNAL_SERVER_ERROR),
            Self::Listen => {
                ("listen", "An endpoint of the pod cannot listen", StatusCode::INTERNAL_SERVER_ERROR)
            }
            Self::KbsRefused => ("kbs-refused", "The KBS refused", StatusCode::BAD_GATEWAY),
            Self::StartFailed => ("start-failed", "The pod did not come up", StatusCode::BAD_GATEWAY),
            Self::KbsDown => ("kbs-down", "The KBS does not answer", StatusCode::SERVICE_UNAVAILABLE),
            Self::PodEnding => ("pod-ending", "The pod is being ended", StatusCode::CONFLICT),
            Self::NoOrphan => ("no-orphan", "The pod is no orphan", StatusCode::NOT_FOUND),
            Self::ServiceEnding => ("service-ending", "The service ends", StatusCode::SERVICE_UNAVAILABLE),
            Self::Busy => ("busy", "Too many readers", StatusCode::SERVICE_UNAVAILABLE),
            Self::Deadline => ("deadline", "The deadline passed", StatusCode::GATEWAY_TIMEOUT),
            Self::StoreFull => ("store-full", "The key store is full", StatusCode::INSUFFICIENT_STORAGE),
        }
    }

    /// Seconds after which the same request may succeed.
    fn retry_after(self) -> Option<u64> {
        match self {
            Self::KbsDown => Some(10),
            Self::ServiceEnding | Self::Busy | Self::PodEnding => Some(5),
            _ => None,
        }
    }

    /// The problem with this detail. Control characters in it are escaped.
    pub(super) fn problem(self, detail: impl AsRef<str>) -> Box<Problem> {
        let (heading, title, status) = self.row();
        Box::new(Problem {
            kind: format!("{KINDS}{heading}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: one_line(detail.as_ref(), DETAIL_MAX),
            instance: None,
            retry_after: self.retry_after(),
            advice: None,
            faults: Vec::new(),
        })
    }
}

impl Problem {
    /// The last word of its kind's URI, as `not-found`.
    pub fn word(&self) -> &str {
        self.kind.rsplit_once('#').map_or(&*self.kind, |(_, word)| word)
    }

    pub(super) fn invalid(faults: Vec<Fault>) -> Box<Self> {
        let count = faults.len();
        let detail = faults.first().map(|first| match count {
            1 => format!("{}: {}", first.field, first.reason),
            _ => format!("{}: {}; and {} more", first.field, first.reason, count - 1),
        });
        let mut problem = Kind::Invalid.problem(detail.unwrap_or_default());
        problem.faults = faults.into_iter().take(FAULTS_MAX).map(Fault::escaped).collect();
        problem
    }

    fn advised(mut self: Box<Self>, advice: &str) -> Box<Self> {
        self.advice = Some(advice.to_owned());
        self
    }

    fn at(mut self: Box<Self>, path: &str) -> Box<Self> {
        self.instance = Some(one_line(path, DETAIL_MAX));
        self
    }
}

impl Fault {
    pub(super) fn new(field: &str, reason: impl ToString) -> Self {
        Self { field: field.to_owned(), reason: reason.to_string() }
    }

    fn escaped(self) -> Self {
        Self { field: one_line(&self.field, FAULT_MAX), reason: one_line(&self.reason, FAULT_MAX) }
    }
}

impl Problem {
    /// The response, but for its body: see [`finished`].
    fn response(&self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl IntoResponse for Box<Problem> {
    fn into_response(self) -> Response {
        let mut response = self.response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Writes the body of a problem, with the path of its request.
pub(super) fn finished(mut response: Response, path: &str) -> Response {
    if let Some(problem) = response.extensions_mut().remove::<Box<Problem>>() {
        // A struct of texts and numbers is always JSON.
        let body = serde_json::to_vec(&problem.at(path)).unwrap_or_default();
        // That of the empty body before.
        response.headers_mut().remove(CONTENT_LENGTH);
        *response.body_mut() = Body::from(body);
    }
    response
}

impl From<AdaptorError> for Box<Problem> {
    fn from(error: AdaptorError) -> Self {
        let detail = match &error {
            // Their texts name flags of the command line.
            AdaptorError::PrepareDeadline { pod, seconds, waiting_for } => {
                format!("prepare pod {pod}: not done within {seconds} s, waiting for {waiting_for}")
            }
            AdaptorError::Deadline { pod, seconds, last_seen } => {
                format!("start pod {pod}: not up within {seconds} s; last seen: {last_seen}")
            }
            error => with_causes(error),
        };
        let problem = kind(&error).problem(detail);
        match error {
            AdaptorError::PrepareDeadline { .. } => problem.advised("allow more time: deadlineSeconds"),
            AdaptorError::Deadline { .. } => problem.advised(
                "check that the VM runs and its agent can be reached, or allow more time: deadlineSeconds",
            ),
            AdaptorError::AlreadyStarted(_) => problem.advised(
                "nothing is to be done if it is the start that is wanted; else delete the pod first",
            ),
            _ => problem,
        }
    }
}

fn kind(error: &AdaptorError) -> Kind {
    match error {
        AdaptorError::Store(error) => store_kind(error),
        AdaptorError::Kbs(error) => kbs_kind(error),
        AdaptorError::NotDeleted { cause, .. } => kbs_kind(cause),
        AdaptorError::Path(PathError::TooLong { .. }) => Kind::Invalid,
        AdaptorError::Bind(_) | AdaptorError::Path(_) => Kind::Listen,
        AdaptorError::Key(_) | AdaptorError::NoKey(_) => Kind::Store,
        AdaptorError::Stopped(_) => Kind::Stopped,
        AdaptorError::Ending { .. } => Kind::PodEnding,
        AdaptorError::TaskEnded(_) => Kind::Internal,
        AdaptorError::PrepareDeadline { .. } | AdaptorError::Deadline { .. } => Kind::Deadline,
        AdaptorError::NotPrepared(_) => Kind::NotFound,
        AdaptorError::AlreadyStarted(_) => Kind::AlreadyStarted,
        AdaptorError::NoAddress(_) => Kind::Invalid,
        AdaptorError::StartFailed { .. }
        | AdaptorError::UnexpectedAgent { .. }
        | AdaptorError::NotOpened { .. } => Kind::StartFailed,
    }
}

fn store_kind(error: &StoreError) -> Kind {
    match error {
        StoreError::Locked { .. } => Kind::Locked,
        StoreError::UnknownPod(_) => Kind::NotFound,
        StoreError::LongLabels { .. } => Kind::Invalid,
        StoreError::CutOff => Kind::ServiceEnding,
        StoreError::File(FileError::Io { source, .. }) if is_full(source) => Kind::StoreFull,
        _ => Kind::Store,
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn kbs_kind(error: &KbsError) -> Kind {
    match error {
        KbsError::Unreachable { .. } | KbsError::Unanswered { .. } => Kind::KbsDown,
        _ => Kind::KbsRefused,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn status(error: AdaptorError) -> (u16, String) {
        let problem = Box::<Problem>::from(error);
        (problem.status, problem.word().to_owned())
    }

    #[test]
    fn each_error_has_its_status() {
        let pod = || "p1".parse().unwrap();
        let full = FileError::io("writing", Path::new("/x"))(io::ErrorKind::StorageFull.into());
        let broken = FileError::io("writing", Path::new("/x"))(io::ErrorKind::ReadOnlyFilesystem.into());
        let last_seen = "a\nb".to_owned();
        let url = "http://kbs".to_owned();
        let down = KbsError::Unreachable { url, tries: 2, seconds: 60, last: "x".into(), advice: "".into() };
        for (error, expected) in [
            (AdaptorError::NotPrepared(pod()), (404, "not-found")),
            (AdaptorError::AlreadyStarted(pod()), (409, "already-started")),
            (AdaptorError::Stopped(pod()), (409, "stopped")),
            (AdaptorError::Store(StoreError::Locked { pod: pod(), pid: None }), (409, "locked")),
            (AdaptorError::NoAddress(pod()), (422, "invalid-request")),
            (AdaptorError::Kbs(down), (503, "kbs-down")),
            (AdaptorError::Kbs(KbsError::Setup("x".into())), (502, "kbs-refused")),
            (AdaptorError::Deadline { pod: pod(), seconds: 1, last_seen }, (504, "deadline")),
            (AdaptorError::Store(full.into()), (507, "store-full")),
            (AdaptorError::Store(broken.into()), (500, "store")),
        ] {
            let (status, word) = status(error);
            assert_eq!((status, &*word), expected);
        }
    }

    #[test]
    fn a_detail_is_one_line_and_names_no_flag() {
        let last_seen = "a\nb".to_owned();
        let error = AdaptorError::Deadline { pod: "p1".parse().unwrap(), seconds: 1, last_seen };
        let problem = Box::<Problem>::from(error);
        assert!(problem.detail.ends_with("last seen: a\\nb"), "{}", problem.detail);
        assert!(problem.advice.unwrap().ends_with("deadlineSeconds"));
    }

    #[test]
    fn every_kind_is_documented() {
        let page = include_str!("../../../docs/operations/API.md");
        for kind in ALL {
            let (heading, _, status) = kind.row();
            assert!(page.contains(&format!("\n### {heading}\n")), "{heading}");
            let table = format!("| {} | [{heading}](#{heading}) |", status.as_u16());
            assert!(page.contains(&table), "{table}");
        }
    }

    const ALL: [Kind; 25] = [
        Kind::Malformed,
        Kind::Forbidden,
        Kind::NoRoute,
        Kind::NotFound,
        Kind::Method,
        Kind::Slow,
        Kind::AlreadyStarted,
        Kind::Stopped,
        Kind::Locked,
        Kind::Owned,
        Kind::TooLarge,
        Kind::MediaType,
        Kind::Invalid,
        Kind::Internal,
        Kind::Store,
        Kind::Listen,
        Kind::KbsRefused,
        Kind::StartFailed,
        Kind::KbsDown,
        Kind::PodEnding,
        Kind::NoOrphan,
        Kind::ServiceEnding,
        Kind::Busy,
        Kind::Deadline,
        Kind::StoreFull,
    ];
}
