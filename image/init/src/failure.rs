//! Failures that end a boot.

use std::{fmt, io};

use nix::errno::Errno;

/// Failure of a step, printed as one line: the step and the cause.
#[derive(Debug)]
pub struct Failure {
    doing: String,
    why: String,
}

impl Failure {
    /// Makes a failure of the step `doing` (in the form "reading /proc/cmdline") with the cause `why`: an error or a
    /// text.
    pub fn new(doing: impl Into<String>, why: impl Cause) -> Self {
        Self { doing: doing.into(), why: why.text() }
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

/// The cause of a failure. Not every `Display`: that of nix's `Errno` is made of its Debug text, of which nothing is left in
/// the program that ships (docs/decisions/0033).
pub trait Cause {
    /// The cause as text.
    fn text(self) -> String;
}

impl Cause for Errno {
    fn text(self) -> String {
        io::Error::from(self).to_string()
    }
}

/// Makes causes of types whose `Display` is their text.
macro_rules! causes {
    ($($cause:ty),+) => {
        $(impl $crate::failure::Cause for $cause {
            fn text(self) -> String {
                self.to_string()
            }
        })+
    };
}
pub(crate) use causes;
causes!(io::Error, fmt::Arguments<'_>, String, &str);

/// Adds the failed step to an error.
pub trait Context<T> {
    /// Turns the error into a [`Failure`] of this step.
    fn context<D: Into<String>>(self, doing: impl FnOnce() -> D) -> Result<T, Failure>;
}

impl<T, E: Cause> Context<T> for Result<T, E> {
    fn context<D: Into<String>>(self, doing: impl FnOnce() -> D) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(doing(), error))
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::Failure;

    #[test]
    fn a_failure_is_one_line() {
        assert_eq!(Failure::new("reading a\nb", "no\r\x1b[2Jway").to_string(), "reading a b: no  [2Jway");
    }

    #[test]
    fn the_text_of_an_errno_is_not_its_debug_text() {
        let failure = Failure::new("opening the disk", Errno::ENODEV);
        assert_eq!(failure.to_string(), "opening the disk: No such device (os error 19)");
    }
}
