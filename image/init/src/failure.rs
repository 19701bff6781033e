//! Why a boot ends.

use std::fmt;

/// One line: what was being done, and why it failed.
#[derive(Debug)]
pub struct Failure {
    doing: String,
    why: String,
}

impl Failure {
    /// `doing` in the form "reading /proc/cmdline"; `why` may be an error or a text.
    pub fn new(doing: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { doing: doing.into(), why: why.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What comes from a disk or a command line must not break the line.
        let one_line = |text: &str| text.replace(|c: char| c.is_control(), " ");
        write!(f, "{}: {}", one_line(&self.doing), one_line(&self.why))
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// The error becomes a [`Failure`] with this description.
    fn context<D: Into<String>>(self, doing: impl FnOnce() -> D) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context<D: Into<String>>(self, doing: impl FnOnce() -> D) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(doing(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::Failure;

    #[test]
    fn a_failure_is_one_line() {
        assert_eq!(Failure::new("reading a\nb", "no\r\x1b[2Jway").to_string(), "reading a b: no  [2Jway");
    }
}
