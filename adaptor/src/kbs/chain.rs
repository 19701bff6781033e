//! The errors below an error of the HTTP client.

use std::error::Error;
use std::io;

use secure_comms_keys::text::one_line;

/// The longest text of a cause, in bytes.
const CAUSE_MAX: usize = 300;

/// The error and its sources, those that I/O errors wrap included.
pub(super) fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let next = |error: &&'a (dyn Error + 'static)| -> Option<&'a (dyn Error + 'static)> {
        let error: &'a (dyn Error + 'static) = *error;
        // `source` of an I/O error skips the error that it wraps.
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(held) => Some(held),
            None => error.source(),
        }
    };
    std::iter::successors(Some(error), next)
}

/// The cause at the root, in one line. The layers above it only repeat the URL, or say "client error".
pub(super) fn root(error: &reqwest::Error) -> String {
    let cause = chain(error).last().map(ToString::to_string).unwrap_or_default();
    one_line(&cause, CAUSE_MAX)
}
