//! The requests the KBS answers, and how it refuses.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use hyper::{Method, Request, StatusCode};
use ring::rand::{SecureRandom, SystemRandom};
use secure_comms_resource_policy::{allows, request};
use secure_comms_simulators::http::{Reply, reply};
use serde_json::{Value, json};

use super::admin::now;
use super::{Fault, LoggedRequest, Session, Shared, lock};

/// The largest resource Trustee takes.
const BODY_LIMIT: usize = 2 * 1024 * 1024;
/// Bytes of a body that is too large that are still read, so that its sender gets the 413 and not a reset.
const DRAIN_LIMIT: usize = 8 * BODY_LIMIT;
const RESOURCE: &str = "/kbs/v0/resource/";
const SESSION_COOKIE: &str = "kbs-session-id";

/// A refusal: the variant of Trustee's error type, and the detail.
struct Refusal(&'static str, String);

impl Shared {
    /// Answers one request; an error closes the connection instead.
    pub(super) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Reply> {
        let logged = LoggedRequest {
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            at: Instant::now(),
        };
        self.log.send_modify(|log| log.push(logged));
        match self.fault() {
            Fault::None | Fault::ReadOnly => {}
            Fault::LatePost(pause)
                if request.method() == Method::POST && request.uri().path().starts_with(RESOURCE) =>
            {
                return self.route_late(request, pause).await;
            }
            Fault::LatePost(_) => {}
            Fault::Refuse => return Err(anyhow!("refused on purpose")),
            Fault::Silent => std::future::pending().await,
            Fault::Slow(pause) => tokio::time::sleep(pause).await,
            Fault::Status(code) => return Ok(reply(StatusCode::from_u16(code)?, "")),
            Fault::Garbage(bytes) => {
                if request.method() == Method::GET && request.uri().path().starts_with(RESOURCE) {
                    return Ok(reply(StatusCode::OK, bytes));
                }
            }
        }
        self.route(request).await.map(|answer| answer.unwrap_or_else(|refusal| refusal.reply()))
    }

    /// In a task of its own: it goes on if the connection ends.
    async fn route_late(self: Arc<Self>, request: Request<Incoming>, pause: Duration) -> Result<Reply> {
        let (head, body) = request.into_parts();
        let body = read_body(body).await?.unwrap_or_default();
        self.late.send_modify(|late| *late += 1);
        let stored = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let path = head.uri.path().strip_prefix(RESOURCE).unwrap_or_default();
            let answer = self.resource(&head.method, path, &head.headers, body);
            self.late.send_modify(|late| *late -= 1);
            answer.unwrap_or_else(Refusal::reply)
        });
        Ok(stored.await?)
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Result<Reply, Refusal>> {
        let (head, body) = request.into_parts();
        let Some(body) = read_body(body).await? else {
            return Ok(Ok(reply(StatusCode::PAYLOAD_TOO_LARGE, "A payload reached size limit.")));
        };
        // Only the origin form (RFC 9112 3.2.1) is routed; the real one knows no other target either.
        if head.uri.authority().is_some() {
            return Ok(Ok(reply(StatusCode::NOT_FOUND, "")));
        }
        let path = head.uri.path();
        Ok(match (&head.method, path) {
            (&Method::GET, "/healthz") if !self.options.old => Ok(reply(StatusCode::OK, "")),
            (&Method::POST, "/kbs/v0/auth") => self.auth(),
            (&Method::POST, "/kbs/v0/attest") => self.attest(&head.headers, &body),
            (method, _) => match path.strip_prefix(RESOURCE) {
                Some(resource) => self.resource(method, resource, &head.headers, body),
                None => Ok(reply(StatusCode::NOT_FOUND, "")),
            },
        })
    }

    fn auth(&self) -> Result<Reply, Refusal> {
        let (id, nonce) = (random()?, random()?);
        let mut answer = reply(StatusCode::OK, json!({"nonce": nonce, "extra-params": ""}).to_string());
        let cookie = HeaderValue::try_from(format!("{SESSION_COOKIE}={id}; Path=/kbs/v0"));
        answer.headers_mut().insert(SET_COOKIE, cookie.map_err(|e| attestation(e.to_string()))?);
        lock(&self.sessions).insert(id, Session { nonce, token: None });
        Ok(answer)
    }

    fn attest(&self, headers: &HeaderMap, body: &[u8]) -> Result<Reply, Refusal> {
        let id = session_cookie(headers).ok_or_else(|| attestation("no session cookie"))?;
        let body: Value = serde_json::from_slice(body).map_err(|e| attestation(format!("the body: {e}")))?;
        let field = |name: &str| body.get(name).and_then(Value::as_str);
        let token = random()?;
        let mut sessions = lock(&self.sessions);
        let session = sessions.get_mut(id).ok_or_else(|| attestation("no such session"))?;
        if field("nonce") != Some(session.nonce.as_str()) {
            return Err(attestation("the nonce is not this session's"));
        }
        if field("evidence") != Some(self.options.evidence.as_str()) {
            return Err(attestation("the evidence is not what was expected"));
        }
        session.token = Some(token.clone());
        self.attestations.fetch_add(1, Ordering::Relaxed);
        Ok(reply(StatusCode::OK, json!({ "token": token }).to_string()))
    }

    fn resource(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Reply, Refusal> {
        if !is_resource_path(path) {
            return Err(plugin());
        }
        let mut resources = match *method {
            Method::GET => {
                self.check_attested(headers)?;
                if lock(&self.denied).contains(path) || !self.policy_allows(path) {
                    return Err(Refusal("PolicyDeny", "access denied by policy".to_owned()));
                }
                let found = lock(&self.resources).get(path).cloned();
                return found.map(|bytes| reply(StatusCode::OK, bytes)).ok_or_else(plugin);
            }
            Method::POST => {
                self.check_admin(headers)?;
                lock(&self.resources)
            }
            Method::DELETE if !self.options.old => {
                self.check_admin(headers)?;
                lock(&self.resources)
            }
            _ => return Ok(reply(StatusCode::METHOD_NOT_ALLOWED, "")),
        };
        if self.fault() == Fault::ReadOnly {
            return Err(plugin());
        }
        if *method == Method::POST {
            resources.insert(path.to_owned(), body);
        } else {
            // Trustee's key-value storage makes no difference between a resource that it had and one that it had not.
            resources.remove(path);
        }
        Ok(reply(StatusCode::OK, ""))
    }

    /// Without a policy everything is allowed. One that can't be evaluated allows nothing.
    fn policy_allows(&self, path: &str) -> bool {
        let policy = lock(&self.policy);
        policy.as_ref().is_none_or(|(policy, claims)| allows(policy, &request(path), claims).unwrap_or(false))
    }

    fn check_admin(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let refuse = |detail: String| Refusal("AdminAuthInitialization", detail);
        let token = bearer(headers).ok_or_else(|| refuse("no bearer token".to_owned()))?;
        let now = now().map_err(|error| refuse(error.to_string()))?;
        let now = now.saturating_add_signed(self.ahead.load(Ordering::Relaxed));
        self.admin.verify(token, now).map_err(|error| refuse(error.to_string()))
    }

    fn check_attested(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let sessions = lock(&self.sessions);
        let by_cookie = session_cookie(headers)
            .and_then(|id| sessions.get(id))
            .is_some_and(|session| session.token.is_some());
        let by_token = bearer(headers)
            .is_some_and(|token| sessions.values().any(|session| session.token.as_deref() == Some(token)));
        if by_cookie || by_token {
            return Ok(());
        }
        Err(Refusal("TokenVerifierError", "neither an attested session nor an attestation token".to_owned()))
    }
}

impl Refusal {
    /// Nearly every error of Trustee is a 401 of this shape, without a content type.
    fn reply(self) -> Reply {
        let Self(variant, detail) = self;
        let kind = format!("https://github.com/confidential-containers/kbs/errors/{variant}");
        reply(StatusCode::UNAUTHORIZED, json!({"type": kind, "detail": detail}).to_string())
    }
}

fn attestation(detail: impl Into<String>) -> Refusal {
    Refusal("AttestationError", detail.into())
}

/// What a plugin's error becomes, whatever it is: Trustee logs the cause, and answers without it.
fn plugin() -> Refusal {
    Refusal("PluginInternalError", "Plugin internal error".to_owned())
}

/// The body, or none if it is too large.
async fn read_body(body: Incoming) -> Result<Option<Bytes>> {
    match Limited::new(body, DRAIN_LIMIT).collect().await {
        Ok(body) => Ok(Some(body.to_bytes()).filter(|body| body.len() <= BODY_LIMIT)),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Ok(None),
        Err(error) => Err(anyhow!("reading the body: {error}")),
    }
}

/// Whether `path` is three segments of `[A-Za-z0-9_-]+[A-Za-z0-9_.-]*`.
pub(super) fn is_resource_path(path: &str) -> bool {
    let segment = |segment: &str| {
        !segment.is_empty()
            && !segment.starts_with('.')
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    path.split('/').count() == 3 && path.split('/').all(segment)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

fn session_cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get(COOKIE)?.to_str().ok()?;
    cookies.split(';').find_map(|cookie| cookie.trim().strip_prefix(SESSION_COOKIE)?.strip_prefix('='))
}

/// 128 random bits in hex.
fn random() -> Result<String, Refusal> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| attestation("no randomness"))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::is_resource_path;

    #[test]
    fn a_resource_path_has_three_segments_of_plain_characters() {
        for good in ["default/pp-1/privateKey", "a/b/c", "_/-/a.b"] {
            assert!(is_resource_path(good), "{good}");
        }
        for bad in ["", "a/b", "a/b/c/d", "a//c", "a/.b/c", "a/b/c d", "a/b/%2e", "/a/b/c", "a/b/"] {
            assert!(!is_resource_path(bad), "{bad}");
        }
    }
}
