//! Finds what this process created and did not remove.

use std::process::Command;

use anyhow::{Context, Result};

use super::resources::Resources;

/// Namespaces, mounts, directories, processes and files of this process.
#[derive(Clone, Debug)]
pub struct Leftovers {
    namespaces: Vec<String>,
    mounts: Vec<String>,
    children: Vec<String>,
    own: Resources,
}

/// Files that the runtime or an idle pool thread may have opened since.
const SLACK: usize = 8;

impl Leftovers {
    /// Lists them.
    ///
    /// # Errors
    /// If `ip` or /proc can't be read.
    pub fn now() -> Result<Self> {
        let listed = Command::new("ip").args(["netns", "list"]).output().context("ip netns list")?;
        let ours = format!("-{:x}x", std::process::id());
        let words = |text: &str, wanted: &str| {
            text.lines().filter(|line| line.contains(wanted)).map(str::to_owned).collect::<Vec<_>>()
        };
        let mut children = Vec::new();
        for task in std::fs::read_dir("/proc/self/task")? {
            // A thread may end while it is read.
            let of_task = std::fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            children.extend(of_task.split_whitespace().map(str::to_owned));
        }
        Ok(Self {
            namespaces: words(&String::from_utf8_lossy(&listed.stdout), &ours),
            mounts: words(&std::fs::read_to_string("/proc/self/mounts")?, &super::pod_scene::prefix()),
            children,
            own: Resources::of(i32::try_from(std::process::id())?)?,
        })
    }

    /// What exists now and did not exist at `before`.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let new = |what: &str, now: &[String], then: &[String]| {
            let new = now.iter().filter(|one| !then.contains(one));
            new.map(|one| format!("the {what} {one}")).collect::<Vec<_>>()
        };
        let mut left = new("network namespace", &self.namespaces, &before.namespaces);
        left.extend(new("mount", &self.mounts, &before.mounts));
        left.extend(new("process", &self.children, &before.children));
        if self.own.files > before.own.files + SLACK {
            left.push(format!("open files: {}, before {}", self.own.files, before.own.files));
        }
        if self.own.threads > before.own.threads + SLACK as u64 {
            left.push(format!("threads: {}, before {}", self.own.threads, before.own.threads));
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::disk::Disk;
    use crate::harness::test_namespace::TestNamespace;

    #[test]
    fn leftover_namespaces_mounts_processes_and_files_are_reported() {
        let before = Leftovers::now().unwrap();
        let directory =
            tempfile::Builder::new().prefix(&super::super::pod_scene::prefix()).tempdir().unwrap();
        let _disk = Disk::mount(directory.path().join("disk")).unwrap();
        let _netns = TestNamespace::new("left").unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        // More than the other tests of this process close in the meantime.
        let files: Vec<_> = (0..400).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let left = Leftovers::now().unwrap().beyond(&before);
        child.kill().unwrap();
        child.wait().unwrap();
        for what in ["network namespace", "mount", "process", "open files"] {
            assert!(
                left.iter().any(|left| left.contains(what)),
                "{what} is not in {left:?}, {}",
                files.len()
            );
        }
    }
}
