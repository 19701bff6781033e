//! What a service does, right or wrong.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::service::{Cloud, correct, encoded, user_data_path};
use super::{LONGEST_WAIT, Request, Script, answer};

/// A part of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends these bytes.
    Send(Vec<u8>),
    /// Sends nothing for a while.
    Wait(Duration),
    /// Sends nothing until the client closes.
    Stall,
    /// Sends these bytes one at a time, with a pause after each.
    Drip(Vec<u8>, Duration),
    /// Resets the connection.
    Reset,
}

/// How user data are answered; the token of AWS is always right, except where the name says otherwise.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// As the real service: `ok`.
    Correct,
    /// With an error: `status-404`. Not a word of the user data.
    Status(u16),
    /// The same for AWS's token: `token-status-403`.
    TokenStatus(u16),
    /// After a while: `slow-20` (seconds).
    Slow(Duration),
    /// Never: `stall`.
    Stall,
    /// Byte by byte, one a second, so that it takes longer than any client waits: `drip`.
    Drip,
    /// What is no HTTP: `garbage`.
    Garbage,
    /// With something that base64 does not have; without base64, with something that cloud-config does not have: `wrong-text`.
    WrongText,
    /// Cut in the middle of the body: `cut`.
    Cut,
    /// 70 KB of user data, padded by a comment: `big`.
    Big,
    /// A redirect: `redirect`.
    Redirect,
    /// A gzip content encoding: `encoded`.
    Encoded,
    /// Nothing, with status 200: `empty`.
    Empty,
}

impl Behaviour {
    /// Finds one by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn parse(text: &str) -> Result<Self> {
        let status = |text: &str| text.parse().with_context(|| format!("{text:?} is no status"));
        if let Some(rest) = text.strip_prefix("token-status-") {
            return Ok(Self::TokenStatus(status(rest)?));
        }
        if let Some(rest) = text.strip_prefix("status-") {
            return Ok(Self::Status(status(rest)?));
        }
        if let Some(rest) = text.strip_prefix("slow-") {
            let seconds = rest.parse().with_context(|| format!("{rest:?} is no number of seconds"))?;
            return Ok(Self::Slow(Duration::from_secs(seconds).min(LONGEST_WAIT)));
        }
        Ok(match text {
            "ok" => Self::Correct,
            "stall" => Self::Stall,
            "drip" => Self::Drip,
            "garbage" => Self::Garbage,
            "wrong-text" => Self::WrongText,
            "cut" => Self::Cut,
            "big" => Self::Big,
            "redirect" => Self::Redirect,
            "encoded" => Self::Encoded,
            "empty" => Self::Empty,
            _ => bail!(
                "unknown behaviour {text:?}: expected ok, status-N, token-status-N, slow-SECONDS, stall, drip, garbage, \
                 wrong-text, cut, big, redirect, encoded or empty"
            ),
        })
    }

    /// The service of `cloud` that behaves so.
    #[must_use]
    pub fn script(self, cloud: Cloud, user_data: Vec<u8>) -> Script {
        Arc::new(move |request, _| self.steps(cloud, &user_data, request))
    }

    /// What follows `request`.
    #[must_use]
    pub fn steps(&self, cloud: Cloud, user_data: &[u8], request: &Request) -> Vec<Step> {
        let right = correct(cloud, user_data, request);
        let is_user_data = request.path == user_data_path(cloud) && right.starts_with(b"HTTP/1.1 200");
        let send = |bytes: Vec<u8>| vec![Step::Send(bytes)];
        match self {
            Self::TokenStatus(status) if request.method == "PUT" => send(answer(*status, &[], b"")),
            Self::Correct | Self::TokenStatus(_) => send(right),
            _ if !is_user_data => send(right),
            Self::Status(status) => send(answer(*status, &[], b"")),
            Self::Slow(time) => vec![Step::Wait(*time), Step::Send(right)],
            Self::Stall => vec![Step::Stall],
            Self::Drip => vec![Step::Drip(right, Duration::from_secs(1))],
            Self::Garbage => send(b"\x16\x03\x01\x00garbage\r\n\r\n".to_vec()),
            Self::WrongText => send(answer(200, &[], b"<html>not user data</html>")),
            Self::Cut => send(right.get(..right.len() - 10).unwrap_or_default().to_vec()),
            Self::Big => {
                let padding = format!("#{}\n", "x".repeat(70 * 1024));
                send(answer(200, &[], &encoded(cloud, &[user_data, padding.as_bytes()].concat())))
            }
            Self::Redirect => send(answer(302, &[("Location", "/other")], b"")),
            Self::Encoded => send(answer(200, &[("Content-Encoding", "gzip")], user_data)),
            Self::Empty => send(answer(200, &[], b"")),
        }
    }
}
