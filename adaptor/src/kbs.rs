//! The KBS client: publishes and deletes resources as an admin of the KBS. Only attested VMs read resources.
//!
//! In: [`KbsSettings`]. Requests go out over HTTP or HTTPS and are retried with backoff until a time limit.

mod auth;
mod error_body;
mod names;
mod response;
mod tls;

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Method, redirect};
use secure_comms_protocol::limits::{OUTBOUND_CONNECT, RETRY_MIN};
use secure_comms_tunnel::{Backoff, Resolver};
use tokio::time::{Instant, sleep};
use url::Url;
use zeroize::Zeroizing;

use self::auth::Admin;
pub use self::auth::TokenError;
use self::response::KbsResponse;

/// The largest resource that the KBS accepts, in bytes.
pub const RESOURCE_MAX: usize = 2 * 1024 * 1024;
/// Timeout of the first attempt, response included. It doubles with each attempt, up to [`REQUEST_TIMEOUT_MAX`].
const REQUEST_TIMEOUT_MIN: Duration = Duration::from_secs(5);
/// The longest timeout of an attempt, response included.
const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(30);

/// Error of publishing or deleting a resource. Its text names the flag to check.
#[derive(Debug, thiserror::Error)]
pub enum KbsError {
    /// The admin's key is unusable.
    #[error("KBS client")]
    Token(#[from] TokenError),
    /// The CA file is unusable.
    #[error("KBS client: the CA {} (--kbs-ca): {cause}; name a PEM file with the CA's certificate", .path.display())]
    Ca {
        /// Path of the file.
        path: PathBuf,
        /// The fault of the file.
        cause: String,
    },
    /// The HTTP client could not be set up.
    #[error("KBS client: set up HTTP: {0}")]
    Setup(String),
    /// The resource is larger than the KBS accepts.
    #[error("KBS resource {path}: {len} bytes; at most {RESOURCE_MAX} can be published")]
    TooLarge {
        /// Path of the resource.
        path: String,
        /// Size of the resource, in bytes.
        len: usize,
    },
    /// The KBS refused the request.
    #[error("KBS resource {path}: {method} refused with {response}{advice}")]
    Refused {
        /// Path of the resource.
        path: String,
        /// Method of the request.
        method: Method,
        /// Status and error of the response, escaped.
        response: String,
        /// What to do; empty if there is no advice.
        advice: &'static str,
    },
    /// The KBS's TLS certificate is not trusted.
    #[error(
        "KBS at {url}: its TLS certificate is refused: {cause}; give the CA that signed it with --kbs-ca, or correct --kbs-url"
    )]
    Certificate {
        /// URL of the KBS.
        url: String,
        /// Fault of the certificate.
        cause: String,
    },
    /// Every attempt failed until the time limit.
    #[error(
        "KBS at {url}: gave up after {tries} tries in {seconds} s: {last}; check that it runs, --kbs-url, and the network"
    )]
    Unreachable {
        /// URL of the KBS.
        url: String,
        /// Number of attempts.
        tries: u32,
        /// Time since the first attempt, in seconds.
        seconds: u64,
        /// Error of the last attempt.
        last: String,
    },
}

/// The KBS, as its admin sees it.
#[derive(Clone, Debug)]
pub struct KbsSettings {
    /// The KBS's URL, http or https, without `/kbs/v0`.
    pub url: Url,
    /// A PEM file with the CA that signed its certificate; `None`: the system's CAs.
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
#[derive(Debug)]
pub struct KbsClient {
    http: Client,
    url: String,
    admin: Option<Admin>,
    retry_for: Duration,
}

/// Why an attempt failed.
enum Failed {
    /// A retry may succeed.
    Transient(String),
    Permanent(KbsError),
}

impl KbsClient {
    /// Reads the keys and certificates; opens no connection. Each later call is retried for at most `retry_for`.
    ///
    /// # Errors
    /// The admin's key or the CA cannot be read.
    pub fn new(settings: &KbsSettings, retry_for: Duration) -> Result<Self, KbsError> {
        let admin = match &settings.admin {
            Some(admin) => Some(Admin::read(&admin.key_file, &admin.issuer, &admin.role)?),
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
        let http = http.build().map_err(|error| KbsError::Setup(cause_of(&error)))?;
        let url = settings.url.as_str().trim_end_matches('/').to_owned();
        Ok(Self { http, url, admin, retry_for })
    }

    /// Creates or overwrites the resource at `path` (`<repository>/<type>/<tag>`).
    ///
    /// # Errors
    /// The resource is too large, the KBS refuses it, or every attempt failed.
    ///
    /// # Cancellation
    /// Dropping the future stops the retries. A request that was sent may still take effect.
    pub async fn publish(&self, path: &str, bytes: &[u8]) -> Result<(), KbsError> {
        if bytes.len() > RESOURCE_MAX {
            return Err(KbsError::TooLarge { path: path.to_owned(), len: bytes.len() });
        }
        // Wiped when the last attempt has dropped its copy of the handle.
        let body = Bytes::from_owner(Zeroizing::new(bytes.to_vec()));
        let response = self.retry(Method::POST, path, &body).await?;
        if !response.is_success() {
            return Err(response.refusal(path, Method::POST));
        }
        tracing::info!("KBS resource {path}: published");
        Ok(())
    }

    /// Deletes the resource at `path`, or empties it where the KBS cannot delete. A missing resource is not an error.
    ///
    /// # Errors
    /// The KBS refuses, or every attempt failed.
    ///
    /// # Cancellation
    /// Dropping the future stops the retries. A request that was sent may still take effect.
    pub async fn delete(&self, path: &str) -> Result<(), KbsError> {
        let response = self.retry(Method::DELETE, path, &Bytes::new()).await?;
        if response.is_success() {
            tracing::info!("KBS resource {path}: deleted");
            return Ok(());
        }
        if response.is_missing_resource() {
            tracing::info!("KBS resource {path}: did not exist");
            return Ok(());
        }
        // Trustee before v0.20 cannot delete.
        if response.is_method_not_allowed() {
            return self.publish(path, &[]).await;
        }
        Err(response.refusal(path, Method::DELETE))
    }

    /// Sends the request until there is a response that settles it, for at most `retry_for`.
    async fn retry(&self, method: Method, path: &str, body: &Bytes) -> Result<KbsResponse, KbsError> {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        // Short at first: an attempt that gets no response must not delay the next one. A slow KBS gets more each time.
        let mut request_timeout = REQUEST_TIMEOUT_MIN;
        let mut tries = 0;
        let mut reported = String::new();
        loop {
            tries += 1;
            // An attempt must not outlast the time limit either.
            let left = self.retry_for.saturating_sub(start.elapsed()).clamp(RETRY_MIN, request_timeout);
            request_timeout = (request_timeout * 2).min(REQUEST_TIMEOUT_MAX);
            let last = match self.attempt(method.clone(), path, body.clone(), left).await {
                Ok(response) => return Ok(response),
                Err(Failed::Permanent(error)) => return Err(error),
                Err(Failed::Transient(cause)) => cause,
            };
            let pause = backoff.next_pause();
            if start.elapsed() + pause >= self.retry_for {
                let seconds = start.elapsed().as_secs();
                return Err(KbsError::Unreachable { url: self.url.clone(), tries, seconds, last });
            }
            if last != reported {
                tracing::warn!("KBS at {}: {last}; retrying", self.url);
                reported = last;
            }
            sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<KbsResponse, Failed> {
        let url = format!("{}/kbs/v0/resource/{path}", self.url);
        let mut request = self.http.request(method, url).timeout(limit).body(body);
        if let Some(admin) = &self.admin {
            request = request.header(AUTHORIZATION, bearer(admin).map_err(Failed::Permanent)?);
        }
        let response = request.send().await.map_err(|error| match tls::refused_certificate(&error) {
            Some(cause) => Failed::Permanent(KbsError::Certificate { url: self.url.clone(), cause }),
            None if error.is_builder() => Failed::Permanent(KbsError::Setup(cause_of(&error))),
            None => Failed::Transient(cause_of(&error)),
        })?;
        let response = KbsResponse::read(response).await;
        // 408 counts as transient: the KBS waited too long for the request.
        if response.is_transient() {
            Err(Failed::Transient(format!("answered {response}")))
        } else {
            Ok(response)
        }
    }
}

fn bearer(admin: &Admin) -> Result<HeaderValue, KbsError> {
    let text = Zeroizing::new(format!("Bearer {}", *admin.token(SystemTime::now())));
    let mut value = HeaderValue::from_str(&text).map_err(|error| KbsError::Setup(error.to_string()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The causes of the error in one line, without its own text, which repeats the URL.
fn cause_of(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    if causes.is_empty() { "the request failed".to_owned() } else { causes.join(": ") }
}
