//! Errors of the KBS client.

use std::path::PathBuf;

use reqwest::Method;

use super::{RESOURCE_MAX, TokenError};

/// Error of publishing or deleting a resource. Its text names the flag to check.
#[derive(Debug, thiserror::Error)]
pub enum KbsError {
    /// The admin's key is unusable.
    #[error("KBS client")]
    Token(#[from] TokenError),
    /// The CA file is unusable.
    #[error("KBS client: the CA {} (--kbs-ca): {cause}", .path.display())]
    Ca {
        /// Path of the file.
        path: PathBuf,
        /// The fault of the file, and what to do.
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
        advice: String,
    },
    /// The KBS's TLS certificate is not trusted.
    #[error("KBS at {url}: its TLS certificate is refused: {cause}")]
    Certificate {
        /// URL of the KBS.
        url: String,
        /// Fault of the certificate, and what to do.
        cause: String,
    },
    /// A publication has no answer, so that the KBS may still carry it out.
    #[error(
        "KBS at {url}: it has not answered an earlier request to publish {path}, and may still carry it out; check that it runs, and its load"
    )]
    Unanswered {
        /// URL of the KBS.
        url: String,
        /// Path of the resource.
        path: String,
    },
    /// Every attempt failed until the time limit.
    #[error("KBS at {url}: gave up after {tries} {} in {seconds} s: {last}{advice}", noun(.tries))]
    Unreachable {
        /// URL of the KBS.
        url: String,
        /// Number of attempts.
        tries: u32,
        /// Time since the first attempt, in seconds, rounded.
        seconds: u64,
        /// Error of the last attempt.
        last: String,
        /// What to do.
        advice: String,
    },
}

fn noun(tries: &u32) -> &'static str {
    if *tries == 1 { "try" } else { "tries" }
}
