//! What each answer of the KBS means: which ends the request, which is worth a retry, and the advice for each.

use reqwest::{Method, StatusCode};

use super::error_body::ErrorBody;

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The KBS did it.
    Done,
    /// `DELETE`: there is no such resource.
    Missing,
    /// `DELETE`: the KBS does not know the method (Trustee before v0.20).
    CannotDelete,
    /// `DELETE`: the plugin failed. It may be that there is no such resource, or that the KBS cannot use its storage.
    DeleteFailed,
    /// A retry may succeed.
    Transient(Advice),
    /// A retry does not help.
    Final(Advice),
}

/// What to do about an answer; the text is in [`Advice::text`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// None fits.
    Nothing,
    Storage,
    Busy,
    Log,
    Gateway,
    Redirect,
    NotTrustee,
    PlainHttp,
    TooLarge,
    Policy,
    Admin,
    NoAdmin,
}

/// What Trustee names its refusals of an admin token: before v0.20, to v0.21, and after it
/// (`kbs/src/error.rs` of confidential-containers/trustee).
const ADMIN_ERRORS: [&str; 3] = ["AdminAuth", "AdminAuthInitialization", "AdminAuthAccess"];

/// Texts in which a KBS says that it has no such resource, in lower case. Read in confidential-containers/trustee:
///
/// | KBS and storage | `DELETE` of what is missing | `DELETE` that the storage refuses | source |
/// | --- | --- | --- | --- |
/// | before v0.20 | 405 | 405 | `api_server.rs`: no route |
/// | v0.20 on: key-value storage, Vault | 200 | 401 `PluginInternalError`, detail `Plugin internal error` | `resource/kv_storage.rs`: the `None` of `delete` is dropped; `vault_kv.rs`; `error.rs`: the detail lacks the cause |
/// | v0.20 on: AWS, GCP (read only) | as refused | the same | `resource/aws_kms.rs`, `gcp_sm.rs`: `bail!` |
/// | forks with `delete` in `local_fs.rs` | 401, detail with or without `Resource not found: ...` | 401 | `resource/local_fs.rs` |
/// | main after v0.21 (`PluginError::NotFound`) | 200; else `resource not found: ...`, 404 or 401 | 401 | `resource/kv_storage.rs` |
///
/// So the stock detail says nothing, and only a text of this table may count as missing.
const MISSING_TEXTS: [&str; 4] =
    ["resource not found", "secret not found", "key not found", "no such file or directory"];

/// The one table of answers: status, Trustee's name of the error, and the method decide.
pub(super) fn verdict(method: &Method, status: StatusCode, error: &ErrorBody) -> Verdict {
    let deletes = *method == Method::DELETE;
    let variant = error.variant();
    match status.as_u16() {
        200..=299 if error.is_page() => Verdict::Final(Advice::NotTrustee),
        200..=299 => Verdict::Done,
        300..=399 => Verdict::Final(Advice::Redirect),
        // The proxy's "plain HTTP was sent to a TLS port", which nginx, Apache and Go word differently.
        400 if error.names_https_port() => Verdict::Final(Advice::PlainHttp),
        401 | 404 if deletes && is_missing(error) => Verdict::Missing,
        401 if variant == "PluginInternalError" && deletes => Verdict::DeleteFailed,
        401 if variant == "PluginInternalError" => Verdict::Transient(Advice::Storage),
        401 | 403 if variant == "PolicyDeny" => Verdict::Final(Advice::Policy),
        401 | 403 if variant.is_empty() || ADMIN_ERRORS.contains(&variant) => Verdict::Final(Advice::Admin),
        404 | 410 => Verdict::Final(Advice::NotTrustee),
        405 if deletes => Verdict::CannotDelete,
        408 | 425 => Verdict::Transient(Advice::Log),
        413 => Verdict::Final(Advice::TooLarge),
        429 => Verdict::Transient(Advice::Busy),
        501 | 505 | 511 => Verdict::Final(Advice::NotTrustee),
        502..=504 => Verdict::Transient(Advice::Gateway),
        507 => Verdict::Transient(Advice::Storage),
        500..=599 => Verdict::Transient(Advice::Log),
        _ => Verdict::Final(Advice::Nothing),
    }
}

fn is_missing(error: &ErrorBody) -> bool {
    // Another server's page is no proof that the key is gone, nor is `PluginNotFound`, whose text is
    // "Plugin resource not found".
    let named = matches!(error.variant(), "PluginInternalError" | "NotFound" | "ResourceNotFound");
    let detail = error.detail().to_lowercase();
    named && MISSING_TEXTS.iter().any(|text| detail.contains(text))
}

impl Advice {
    /// The text, without a separator. [`Advice::Admin`] has its own, which depends on more.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Nothing | Self::Admin => "",
            Self::Storage => {
                "the KBS cannot use its storage: read the KBS's log, and check that its disk is neither full nor read-only"
            }
            Self::Busy => "the KBS, or a proxy in front of it, limits the rate of requests: raise the limit",
            Self::Log => "read the KBS's log",
            Self::Gateway => "a proxy answers in place of the KBS: check that the KBS runs",
            Self::Redirect => "redirects are not followed: give its final address with --kbs-url",
            Self::NotTrustee => "check that --kbs-url is a Trustee KBS",
            Self::PlainHttp => "it speaks TLS at this port: write https:// in --kbs-url",
            Self::TooLarge => "the resource is larger than the KBS, or a proxy in front of it, accepts",
            Self::Policy => "the KBS's policy forbids it: check its policy for admins",
            Self::NoAdmin => "the KBS wants an admin token and none was sent: give --kbs-admin-key",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &Method, status: u16, body: &str) -> Verdict {
        let error = ErrorBody::read(body.as_bytes(), body.starts_with("<html"));
        verdict(method, StatusCode::from_u16(status).unwrap(), &error)
    }

    fn trustee(variant: &str, detail: &str) -> String {
        format!(
            r#"{{"type":"https://github.com/confidential-containers/kbs/errors/{variant}","detail":"{detail}"}}"#
        )
    }

    #[test]
    fn every_status_is_final_or_worth_a_retry() {
        let transient = |status| matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 506..=510 | 512..=599);
        for status in 200..=599 {
            for (method, body) in [(Method::POST, ""), (Method::DELETE, ""), (Method::POST, "<html>x</html>")]
            {
                let verdict = of(&method, status, body);
                let (retried, done) = (matches!(verdict, Verdict::Transient(_)), verdict == Verdict::Done);
                assert_eq!(retried, transient(status), "{status} {method} {body:?}: {verdict:?}");
                assert_eq!(done, status < 300 && body.is_empty(), "{status} {method} {body:?}: {verdict:?}");
                assert_eq!(verdict == Verdict::CannotDelete, status == 405 && method == Method::DELETE);
                assert_ne!(verdict, Verdict::Missing, "{status} {method}");
            }
        }
    }

    #[test]
    fn only_a_text_that_says_so_means_missing() {
        let missing = [
            "resource not found: default/pp-1/privateKey",
            "Resource not found: default/pp-1/privateKey",
            "Plugin internal error: Secret not found at path 'x'",
            "delete resource from local fs: No such file or directory (os error 2)",
        ];
        for detail in missing {
            let body = trustee("PluginInternalError", detail);
            assert_eq!(of(&Method::DELETE, 401, &body), Verdict::Missing, "{detail}");
            assert_eq!(of(&Method::POST, 401, &body), Verdict::Transient(Advice::Storage), "{detail}");
        }
        let faults = [
            "",
            "Plugin internal error",
            "failed to delete key `default/pp-1/privateKey`: Read-only file system (os error 30)",
            "No space left on device (os error 28)",
            "Permission denied (os error 13)",
            "error communicating with database: connection refused",
            "host not found",
        ];
        for detail in faults {
            let verdict = of(&Method::DELETE, 401, &trustee("PluginInternalError", detail));
            assert_eq!(verdict, Verdict::DeleteFailed, "{detail}");
        }
        assert_eq!(of(&Method::DELETE, 404, &trustee("NotFound", "resource not found: x")), Verdict::Missing);
        // Of these, none is Trustee's word about the resource.
        for (status, body) in [
            (404, "404 page: resource not found".to_owned()),
            (401, "resource not found".to_owned()),
            (404, trustee("PluginNotFound", "Plugin resource not found")),
            (403, trustee("PolicyDeny", "resource not found")),
            (404, "<html>resource not found</html>".to_owned()),
        ] {
            assert!(matches!(of(&Method::DELETE, status, &body), Verdict::Final(_)), "{status} {body}");
        }
    }

    #[test]
    fn each_refusal_gets_the_advice_that_fits() {
        let cases = [
            (401, trustee("AdminAuthInitialization", "x"), Advice::Admin),
            (401, trustee("AdminAuth", "x"), Advice::Admin),
            (403, trustee("AdminAuthAccess", "x"), Advice::Admin),
            (401, String::new(), Advice::Admin),
            (401, trustee("TokenNotFound", "x"), Advice::Nothing),
            (403, trustee("PolicyDeny", "x"), Advice::Policy),
            (401, trustee("PolicyDeny", "x"), Advice::Policy),
            (302, String::new(), Advice::Redirect),
            (413, String::new(), Advice::TooLarge),
            (404, trustee("PluginNotFound", "Plugin resource not found"), Advice::NotTrustee),
            (400, "The plain HTTP request was sent to HTTPS port".to_owned(), Advice::PlainHttp),
            (400, "Client sent an HTTP request to an HTTPS server.".to_owned(), Advice::PlainHttp),
            (400, "bad".to_owned(), Advice::Nothing),
        ];
        for (status, body, advice) in cases {
            assert_eq!(of(&Method::POST, status, &body), Verdict::Final(advice), "{status} {body}");
        }
        assert_eq!(of(&Method::POST, 429, ""), Verdict::Transient(Advice::Busy));
        assert_eq!(of(&Method::POST, 502, "<html>"), Verdict::Transient(Advice::Gateway));
    }
}
