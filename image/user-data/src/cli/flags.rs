//! Flags as Go's programs take them: `-name value`, `-name=value`, with one dash or two.

/// Flags that are read one after the other.
pub(super) struct Flags<I> {
    args: I,
    /// The last one, as given.
    given: String,
    /// Its value, if it came with `=`.
    attached: Option<String>,
}

impl<I: Iterator<Item = String>> Flags<I> {
    pub(super) fn new(args: I) -> Self {
        Self { args, given: String::new(), attached: None }
    }

    /// The name of the next flag, without dashes.
    pub(super) fn next(&mut self) -> Result<Option<String>, String> {
        let Some(given) = self.args.next() else { return Ok(None) };
        self.given = given;
        let Some(flag) = self.given.strip_prefix('-') else {
            return Err(format!("unexpected argument \"{}\"", self.given.escape_debug()));
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let name = name.to_owned();
        self.attached = value;
        Ok(Some(name))
    }

    /// The value of the last flag.
    pub(super) fn value<T>(&mut self, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<T, String> {
        let value = self.attached.take().or_else(|| self.args.next());
        let value = value.ok_or_else(|| self.fault("a value is missing"))?;
        parse(&value).map_err(|fault| self.fault(&fault))
    }

    /// True, for a flag without a value.
    pub(super) fn switch(&mut self) -> Result<bool, String> {
        if self.attached.is_some() { Err(self.fault("takes no value")) } else { Ok(true) }
    }

    /// The error for the last flag, if it is not known.
    pub(super) fn unknown(&self) -> String {
        format!("unknown flag \"{}\"", self.given.escape_debug())
    }

    fn fault(&self, fault: &str) -> String {
        format!("{}: {fault}", self.given)
    }
}
