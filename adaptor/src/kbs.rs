//! The KBS client: publishes and deletes resources as an admin of the KBS. Only attested VMs read resources.
//!
//! In: [`KbsSettings`]. Requests go out over HTTP or HTTPS and are retried with backoff until a time limit.

mod auth;
mod cause;
mod chain;
mod error;
mod error_body;
mod names;
mod outage;
mod pace;
mod pin;
mod posts;
mod response;
mod tls;
mod verdict;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Method, redirect};
use secure_comms_protocol::limits::OUTBOUND_CONNECT;
use secure_comms_tunnel::Resolver;
use url::Url;
use zeroize::Zeroizing;

use self::auth::Admin;
pub use self::auth::TokenError;
use self::cause::{Cause, Failure};
pub use self::error::KbsError;
use self::outage::Outage;
use self::pace::{LAST_ATTEMPT, Pace, REQUEST_TIMEOUT_MAX};
use self::posts::Posts;
use self::response::KbsResponse;
pub use self::tls::config as tls_config;
use self::verdict::Verdict;

/// The largest resource that the KBS accepts, in bytes.
pub const RESOURCE_MAX: usize = 2 * 1024 * 1024;
/// The path under which Trustee serves. It is added to the URL, unless the URL ends with it.
const API: &str = "/kbs/v0";

/// The KBS, as its admin sees it.
#[derive(Clone, Debug)]
pub struct KbsSettings {
    /// The KBS's URL, http or https, with or without `/kbs/v0` at its end.
    pub url: Url,
    /// A PEM file with the CA that signed its certificate, or with that very certificate; `None`: the system's CAs.
    pub ca: Option<PathBuf>,
    /// How the adaptor identifies itself as an admin; `None`: it sends no admin token.
    pub admin: Option<AdminSettings>,
}

/// The identity of a KBS admin.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// File with the admin's Ed25519 private key, PKCS#8 PEM.
    pub key_file: PathBuf,
    /// Claim `iss` of the token.
    pub issuer: String,
    /// Claim `role` of the token.
    pub role: String,
}

/// Publishes and deletes resources of one KBS.
///
/// The async methods need a tokio runtime with I/O and time enabled. A client can be used from many tasks at a time.
#[derive(Clone, Debug)]
pub struct KbsClient {
    http: Client,
    url: String,
    admin: Option<Arc<Admin>>,
    retry_for: Duration,
    posts: Posts,
    outage: Outage,
}

impl KbsClient {
    /// Reads the keys and certificates; opens no connection. Each later call is retried for at most `retry_for`.
    ///
    /// # Errors
    /// The admin's key or the CA cannot be read.
    pub fn new(settings: &KbsSettings, retry_for: Duration) -> Result<Self, KbsError> {
        let admin = match &settings.admin {
            Some(admin) => Some(Arc::new(Admin::read(&admin.key_file, &admin.issuer, &admin.role)?)),
            None => {
                tracing::warn!(
                    "KBS at {}: no admin token is sent, because --kbs-admin-key is missing: only a KBS that lets anyone publish accepts that",
                    settings.url
                );
                None
            }
        };
        let port = settings.url.port_or_known_default().unwrap_or_default();
        let mut http = Client::builder()
            // A redirect or a proxy would send the admin token and the pod key to another host.
            .redirect(redirect::Policy::none())
            .no_proxy()
            .retry(reqwest::retry::never())
            .dns_resolver(Arc::new(names::Names::new(Resolver::default(), port)))
            // Looking the name up, and TCP to its addresses.
            .connect_timeout(OUTBOUND_CONNECT)
            .timeout(REQUEST_TIMEOUT_MAX)
            .http1_only()
            // The KBS closes idle connections after 5 s; a pooled one may die under the next request.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("secure-comms-adaptor/", env!("CARGO_PKG_VERSION")));
        http = http.tls_backend_preconfigured(tls::config(settings)?);
        let http = http.build().map_err(|error| KbsError::Setup(chain::root(&error)))?;
        let url = settings.url.as_str().trim_end_matches('/');
        let url = url.strip_suffix(API).unwrap_or(url).trim_end_matches('/').to_owned();
        Ok(Self { http, url, admin, retry_for, posts: Posts::default(), outage: Outage::default() })
    }

    /// The same client with calls that take no longer than `limit` either.
    pub(crate) fn within(&self, limit: Duration) -> Self {
        Self { retry_for: self.retry_for.min(limit), ..self.clone() }
    }

    /// The KBS's URL.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Whether a request of this client, or of one that was cloned from it, may have left something at `path`.
    pub(crate) fn may_hold(&self, path: &str) -> bool {
        self.posts.may_hold(path)
    }

    /// Creates or overwrites the resource at `path` (`<repository>/<type>/<tag>`).
    ///
    /// # Errors
    /// The resource is too large, the KBS refuses it, or every attempt failed.
    ///
    /// # Cancellation
    /// Dropping the future stops the retries. A request that was sent may still take effect; a later
    /// [`delete`](Self::delete) waits for its answer.
    pub async fn publish(&self, path: &str, bytes: &[u8]) -> Result<(), KbsError> {
        if bytes.len() > RESOURCE_MAX {
            return Err(KbsError::TooLarge { path: path.to_owned(), len: bytes.len() });
        }
        self.post(path, bytes, &mut Pace::new(self.retry_for)).await?;
        tracing::info!("KBS resource {path}: published");
        Ok(())
    }

    async fn post(&self, path: &str, bytes: &[u8], pace: &mut Pace) -> Result<(), KbsError> {
        // Wiped when the last attempt has dropped its copy of the handle.
        let body = Bytes::from_owner(Zeroizing::new(bytes.to_vec()));
        self.retry(Method::POST, path, &body, pace).await.map(|_| ())
    }

    /// Deletes the resource at `path`, or empties it where the KBS cannot delete. A missing resource is not an error.
    ///
    /// Trustee's answer to a failed `DELETE` does not say whether the resource was missing or the storage failed. So
    /// such an answer counts as success only once the resource was overwritten: then its content is gone for certain.
    ///
    /// A publication of this client that the KBS has not answered yet could be carried out after the deletion. So it is
    /// waited for, for half of the time limit; if it is answered later, the resource is deleted once more.
    ///
    /// # Errors
    /// The KBS refuses, every attempt failed, or a publication is still without an answer ([`KbsError::Unanswered`]). The
    /// resource may then still be there, or come back.
    ///
    /// # Cancellation
    /// Dropping the future stops the retries. A request that was sent may still take effect.
    pub async fn delete(&self, path: &str) -> Result<(), KbsError> {
        let pace = &mut Pace::new(self.retry_for);
        let answered = self.posts.answered(path, self.retry_for / 2).await;
        self.delete_once(path, pace).await?;
        if !answered {
            if !self.posts.answered(path, pace.left()).await {
                return Err(KbsError::Unanswered { url: self.url.clone(), path: path.to_owned() });
            }
            self.delete_once(path, pace).await?;
        }
        self.posts.deleted(path);
        Ok(())
    }

    async fn delete_once(&self, path: &str, pace: &mut Pace) -> Result<(), KbsError> {
        let nothing = Bytes::new();
        match self.retry(Method::DELETE, path, &nothing, pace).await? {
            Verdict::Missing => {
                tracing::info!("KBS resource {path}: did not exist");
                return Ok(());
            }
            Verdict::CannotDelete => self.post(path, &[], pace).await?,
            Verdict::DeleteFailed => {
                tracing::warn!(
                    "KBS resource {path}: DELETE failed; overwriting it with nothing, then deleting it again"
                );
                self.post(path, &[], pace).await?;
                match self.retry(Method::DELETE, path, &nothing, pace).await {
                    Ok(Verdict::Done | Verdict::Missing) => {
                        tracing::info!("KBS resource {path}: emptied and deleted");
                        return Ok(());
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            _ => {
                tracing::info!("KBS resource {path}: deleted");
                return Ok(());
            }
        }
        tracing::info!("KBS resource {path}: emptied, because this KBS does not delete it");
        Ok(())
    }

    /// Sends the request until an answer settles it, or the time of `pace` is over.
    async fn retry(
        &self,
        method: Method,
        path: &str,
        body: &Bytes,
        pace: &mut Pace,
    ) -> Result<Verdict, KbsError> {
        let mut reported = String::new();
        let mut earlier: Option<Cause> = None;
        loop {
            let limit = pace.next_timeout();
            let attempt = if method == Method::POST {
                self.post_attempt(path, body.clone(), limit).await
            } else {
                self.attempt(method.clone(), path, body.clone(), limit).await
            };
            let failure = match attempt {
                Ok(verdict) => {
                    self.say_it_answers();
                    return Ok(verdict);
                }
                Err(Failure::Permanent(error)) => return Err(error),
                Err(Failure::Transient(failure)) => failure,
            };
            // An attempt that had little time must not hide what an earlier one has found.
            let failure = match earlier.take() {
                Some(earlier) if failure.is_no_answer() && limit < LAST_ATTEMPT => earlier,
                _ => failure,
            };
            let pause = pace.next_pause(failure.retry_after);
            let is_new = self.outage.failed(&failure.text, pause.is_some());
            let Some(pause) = pause else {
                let (tries, seconds) = pace.spent();
                let Cause { text: last, advice, .. } = failure;
                return Err(KbsError::Unreachable { url: self.url.clone(), tries, seconds, last, advice });
            };
            // A KBS that fails for one path and not for others has many short outages.
            if is_new && failure.text != reported {
                let seconds = pause.as_secs();
                let when = if seconds == 0 { String::new() } else { format!(" in {seconds} s") };
                tracing::warn!("KBS at {}: {}{}; retrying{when}", self.url, failure.text, failure.advice);
                reported.clone_from(&failure.text);
            }
            earlier = Some(failure);
            tokio::time::sleep(pause).await;
        }
    }

    fn say_it_answers(&self) {
        if let Some(over) = self.outage.answered() {
            let (seconds, attempts) = (over.lasted.as_secs(), over.attempts);
            tracing::info!(
                "KBS at {}: answers again after {seconds} s; failed attempts: {attempts}",
                self.url
            );
        }
    }

    /// An attempt in a task of its own, which goes on after `limit` and after this future is dropped: only its answer
    /// says that the KBS will not carry it out later.
    async fn post_attempt(&self, path: &str, body: Bytes, limit: Duration) -> Result<Verdict, Failure> {
        let mut post = self.posts.begin(path);
        let (client, path) = (self.clone(), path.to_owned());
        let attempt = tokio::spawn(async move {
            let result = client.attempt(Method::POST, &path, body, REQUEST_TIMEOUT_MAX).await;
            if matches!(&result, Err(failure) if failure.not_sent()) {
                post.not_sent();
            }
            result
        });
        match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(result)) => result,
            Ok(Err(ended)) => Err(Failure::Permanent(KbsError::Setup(ended.to_string()))),
            Err(_) => Err(Failure::Transient(Cause::no_answer())),
        }
    }

    async fn attempt(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Verdict, Failure> {
        let url = format!("{}{API}/resource/{path}", self.url);
        let mut request = self.http.request(method.clone(), url).timeout(limit).body(body);
        if let Some(admin) = &self.admin {
            request = request.header(AUTHORIZATION, bearer(admin).map_err(Failure::Permanent)?);
        }
        let response = request.send().await.map_err(|error| Failure::of(&error, &self.url))?;
        let response = KbsResponse::read(response, method, self.admin.is_some()).await;
        match response.verdict() {
            Verdict::Final(advice) => {
                self.say_it_answers();
                Err(Failure::Permanent(response.refusal(path, advice)))
            }
            Verdict::Transient(advice) => Err(Failure::Transient(Cause {
                text: format!("answered {response}"),
                advice: response.advice(advice),
                retry_after: response.retry_after,
                not_sent: false,
            })),
            settled => Ok(settled),
        }
    }
}

fn bearer(admin: &Admin) -> Result<HeaderValue, KbsError> {
    let text = Zeroizing::new(format!("Bearer {}", *admin.token(SystemTime::now())));
    let mut value = HeaderValue::from_str(&text).map_err(|error| KbsError::Setup(error.to_string()))?;
    value.set_sensitive(true);
    Ok(value)
}
