//! Failures that end a boot.

use std::fmt;

/// Failure of a step, printed as one line: the step and the cause.
#[derive(Debug)]
pub struct Failure {
    doing: String,
    why: String,
}

impl Failure {
    /// Makes a failure of the step `doing` (in the form "reading /proc/cmdline") with the cause `why`: an error or a
    /// text.
    pub fn new(doing: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { doing: doing.into(), why: why.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Texts from a disk or a command line must not break the line.
        let one_line = |text: &str| text.replace(|c: char| c.is_control(), " ");
        write!(f, "{}: {}", one_line(&self.doing), one_line(&self.why))
    }
}

impl std::error::Error for Failure {}

/// Adds the failed step to an error.
pub trait Context<T> {
    /// Turns the error into a [`Failure`] of this step.
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
