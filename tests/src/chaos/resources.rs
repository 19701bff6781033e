//! Resources of a process: files, threads, memory.

use std::fmt;

use anyhow::{Context, Result};

/// Resources that a process holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Open file descriptors.
    pub files: usize,
    /// Threads.
    pub threads: u64,
    /// Resident memory in KiB.
    pub rss_kib: u64,
}

impl Resources {
    /// Reads them from /proc.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn of(pid: i32) -> Result<Self> {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).context("its files")?.count();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("its status")?;
        let number = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = value.map(|value| value.trim().trim_end_matches(" kB"));
            value.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in its status"))
        };
        Ok(Self { files, threads: number("Threads")?, rss_kib: number("VmRSS")? })
    }

    /// Describes what exceeds `most`, if anything.
    #[must_use]
    pub fn over(&self, most: &Self) -> Option<String> {
        let within = self.files <= most.files && self.threads <= most.threads && self.rss_kib <= most.rss_kib;
        (!within).then(|| format!("{self}; at most {most}"))
    }

    /// The larger value of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            files: self.files.max(other.files),
            threads: self.threads.max(other.threads),
            rss_kib: self.rss_kib.max(other.rss_kib),
        }
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} files, {} threads, {:.1} MiB", self.files, self.threads, self.rss_kib as f64 / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_file_that_stays_open_shows() {
        // A process of its own: other tests open and close files in this one. It opens two when it is written a line.
        let script = "echo; read line; exec 3</dev/null 4</dev/null; echo; read line";
        let mut shell = Command::new("sh");
        let mut shell =
            shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(shell.id()).unwrap();
        let (mut to, mut from) = (shell.stdin.take().unwrap(), BufReader::new(shell.stdout.take().unwrap()));
        let looks = ["", "\n"].map(|line| {
            to.write_all(line.as_bytes()).unwrap();
            from.read_line(&mut String::new()).unwrap();
            Resources::of(pid).unwrap()
        });
        drop(to);
        assert!(shell.wait().is_ok());
        let [before, after] = looks;
        assert_eq!(after.files, before.files + 2, "{before} then {after}");
        let most = Resources { files: 1, threads: 1000, rss_kib: u64::MAX };
        assert!(after.over(&most).unwrap().contains("at most 1 files"));
        assert_eq!(after.over(&after), None);
    }
}
