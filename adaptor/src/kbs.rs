//! The KBS as its admin: publishes a resource, deletes one. Reading is for attested VMs alone.

mod auth;
mod error_body;
mod response;
mod tls;

use std::error::Error as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Method, redirect};
use secure_comms_protocol::limits::{RETRY_MAX, RETRY_MIN, TCP_CONNECT};
use tokio::time::{Instant, sleep};
use url::Url;
use zeroize::Zeroizing;

use self::auth::Admin;
pub use self::auth::TokenError;
use self::response::Answer;

/// The largest resource the KBS takes, in bytes.
pub const RESOURCE_MAX: usize = 2 * 1024 * 1024;
/// How long the first request may take, its answer included; each further one twice as long, up to [`REQUEST`].
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// How long any request may take, its answer included.
const REQUEST: Duration = Duration::from_secs(30);

/// Why a resource was not published or deleted.
#[derive(Debug, thiserror::Error)]
pub enum KbsError {
    /// The admin's key is of no use.
    #[error("KBS client")]
    Token(#[from] TokenError),
    /// The CA file is of no use.
    #[error("KBS client: the CA {} (--kbs-ca): {cause}; name a PEM file with the CA's certificate", .path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The HTTP client could not be made.
    #[error("KBS client: set up HTTP: {0}")]
    Setup(String),
    /// The resource is larger than the KBS takes.
    #[error("KBS resource {path}: {len} bytes; at most {RESOURCE_MAX} can be published")]
    TooLarge {
        /// The resource.
        path: String,
        /// Its size, in bytes.
        len: usize,
    },
    /// The KBS said no.
    #[error("KBS resource {path}: {method} refused with {answer}{advice}")]
    Refused {
        /// The resource.
        path: String,
        /// What was asked for.
        method: Method,
        /// Status and error, escaped.
        answer: String,
        /// What to do about it, or nothing.
        advice: &'static str,
    },
    /// The KBS's certificate does not stand.
    #[error(
        "KBS at {url}: its TLS certificate is refused: {cause}; give the CA that signed it with --kbs-ca, or correct --kbs-url"
    )]
    Certificate {
        /// The KBS.
        url: String,
        /// Why.
        cause: String,
    },
    /// The KBS was not reached, or failed, until the deadline.
    #[error(
        "KBS at {url}: gave up after {tries} tries in {seconds} s: {last}; check that it runs, --kbs-url, and the network"
    )]
    Unreachable {
        /// The KBS.
        url: String,
        /// How often it was tried.
        tries: u32,
        /// How long it was tried, in seconds.
        seconds: u64,
        /// What was last seen.
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

/// Speaks to the KBS.
#[derive(Debug)]
pub struct KbsClient {
    http: Client,
    url: String,
    admin: Option<Admin>,
    retry_for: Duration,
}

/// How one try ended, if not in an answer that settles it.
enum Failed {
    /// The same again may succeed.
    Passing(String),
    Final(KbsError),
}

impl KbsClient {
    /// Reads keys and certificates; connects to nothing yet. Each call tries again for `retry_for`.
    ///
    /// # Errors
    /// The admin's key or the CA cannot be read.
    pub fn new(settings: &KbsSettings, retry_for: Duration) -> Result<Self, KbsError> {
        let admin = match &settings.admin {
            Some(admin) => Some(Admin::read(&admin.key_file, &admin.issuer, &admin.role)?),
            None => {
                tracing::warn!(
                    "KBS at {}: no --kbs-admin-key, so no admin token is sent: only a KBS that lets anyone publish takes that",
                    settings.url
                );
                None
            }
        };
        let mut http = Client::builder()
            // A redirect or a proxy would carry the admin's token and the pod's key to someone else.
            .redirect(redirect::Policy::none())
            .no_proxy()
            .retry(reqwest::retry::never())
            .connect_timeout(TCP_CONNECT)
            .timeout(REQUEST)
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
    /// It is too large, the KBS refuses, or was not reached in time.
    pub async fn publish(&self, path: &str, bytes: &[u8]) -> Result<(), KbsError> {
        if bytes.len() > RESOURCE_MAX {
            return Err(KbsError::TooLarge { path: path.to_owned(), len: bytes.len() });
        }
        // Wiped once the last of the tries has let go of it.
        let body = Bytes::from_owner(Zeroizing::new(bytes.to_vec()));
        let answer = self.until_answered(Method::POST, path, &body).await?;
        if !answer.is_success() {
            return Err(answer.refusal(path, Method::POST));
        }
        tracing::info!("KBS resource {path}: published");
        Ok(())
    }

    /// Deletes the resource at `path`, or empties it where the KBS cannot delete. It may be gone already.
    ///
    /// # Errors
    /// The KBS refuses, or was not reached in time.
    pub async fn delete(&self, path: &str) -> Result<(), KbsError> {
        let answer = self.until_answered(Method::DELETE, path, &Bytes::new()).await?;
        if answer.is_success() {
            tracing::info!("KBS resource {path}: deleted");
            return Ok(());
        }
        if answer.is_missing_resource() {
            tracing::info!("KBS resource {path}: was gone already");
            return Ok(());
        }
        // Trustee before v0.20 cannot delete.
        if answer.is_method_not_allowed() {
            return self.publish(path, &[]).await;
        }
        Err(answer.refusal(path, Method::DELETE))
    }

    async fn until_answered(&self, method: Method, path: &str, body: &Bytes) -> Result<Answer, KbsError> {
        let start = Instant::now();
        let mut pause = RETRY_MIN;
        // One that the KBS has swallowed must not hold up the next for long; a KBS that is slow gets its time yet.
        let mut patience = FIRST_REQUEST;
        let mut tries = 0;
        let mut reported = String::new();
        loop {
            tries += 1;
            // A try must not outlive the deadline either.
            let left = self.retry_for.saturating_sub(start.elapsed()).clamp(RETRY_MIN, patience);
            patience = (patience * 2).min(REQUEST);
            let last = match self.once(method.clone(), path, body.clone(), left).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Final(error)) => return Err(error),
                Err(Failed::Passing(cause)) => cause,
            };
            let wait = jittered(pause);
            if start.elapsed() + wait >= self.retry_for {
                let seconds = start.elapsed().as_secs();
                return Err(KbsError::Unreachable { url: self.url.clone(), tries, seconds, last });
            }
            if last != reported {
                tracing::warn!("KBS at {}: {last}; trying on", self.url);
                reported = last;
            }
            sleep(wait).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn once(&self, method: Method, path: &str, body: Bytes, limit: Duration) -> Result<Answer, Failed> {
        let url = format!("{}/kbs/v0/resource/{path}", self.url);
        let mut request = self.http.request(method, url).timeout(limit).body(body);
        if let Some(admin) = &self.admin {
            request = request.header(AUTHORIZATION, bearer(admin).map_err(Failed::Final)?);
        }
        let response = request.send().await.map_err(|error| match tls::refused_certificate(&error) {
            Some(cause) => Failed::Final(KbsError::Certificate { url: self.url.clone(), cause }),
            None if error.is_builder() => Failed::Final(KbsError::Setup(cause_of(&error))),
            None => Failed::Passing(cause_of(&error)),
        })?;
        let answer = Answer::read(response).await;
        // 408: the KBS has waited too long for our request; as good as no connection.
        if answer.is_passing() { Err(Failed::Passing(format!("answered {answer}"))) } else { Ok(answer) }
    }
}

fn bearer(admin: &Admin) -> Result<HeaderValue, KbsError> {
    let text = Zeroizing::new(format!("Bearer {}", *admin.token(SystemTime::now())));
    let mut value = HeaderValue::from_str(&text).map_err(|error| KbsError::Setup(error.to_string()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Between half of `pause` and all of it, so that many adaptors do not come back at once.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..=1.0))
}

/// The chain of causes in one line. The error's own text would repeat the URL.
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
