use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use tempfile::{TempDir, tempdir};

use super::{MountPrefixes, Source, Why, make, own_umask};

/// A directory `run` for the sources, a directory `etc` that nothing may change, and a prefix.
struct Tree {
    _directory: TempDir,
    root: PathBuf,
    prefixes: MountPrefixes,
}

impl Tree {
    fn new() -> Self {
        let directory = tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        for name in ["run", "etc"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let prefixes = root.join("run").to_str().unwrap().parse().unwrap();
        Self { _directory: directory, root, prefixes }
    }

    fn make(&self, source: &str) -> Source {
        make(&self.root.join(source), &self.prefixes).unwrap()
    }

    /// Asserts that nothing was made outside of the prefix.
    fn unchanged(&self) {
        let mut names: Vec<_> =
            fs::read_dir(&self.root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["etc", "run"]);
        assert_eq!(fs::read_dir(self.root.join("etc")).unwrap().count(), 0);
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_source_is_made_below_a_prefix_whatever_the_form_of_its_path() {
    let tree = Tree::new();
    for (source, made) in
        [("run/a/b", "run/a/b"), ("run//c/./d", "run/c/d"), ("run/e/", "run/e"), ("./run/./f", "run/f")]
    {
        assert_eq!(tree.make(source), Source::Made, "{source}");
        assert!(tree.root.join(made).is_dir(), "{source}");
        assert_eq!(tree.make(source), Source::Exists, "{source}");
    }
    tree.unchanged();
}

#[test]
fn nothing_is_made_elsewhere() {
    let tree = Tree::new();
    for source in ["etc/a", "runner/a", "ru", "etc/run/a"] {
        assert_eq!(tree.make(source), Source::Left(Why::Elsewhere), "{source}");
    }
    // A file system's root is below no prefix, and exists.
    assert_eq!(make(Path::new("/"), &tree.prefixes).unwrap(), Source::Exists);
    let none: MountPrefixes = "".parse().unwrap();
    assert_eq!(make(&tree.root.join("run/a"), &none).unwrap(), Source::Left(Why::Elsewhere));
    tree.unchanged();
}

#[test]
fn no_parent_leads_out_of_a_prefix() {
    let tree = Tree::new();
    for source in ["run/../etc/a", "run/a/../../etc/a", "run/a/../b", "run/x/.."] {
        assert_eq!(tree.make(source), Source::Left(Why::Parent), "{source}");
    }
    assert_eq!(fs::read_dir(tree.root.join("run")).unwrap().count(), 0);
    tree.unchanged();
}

#[test]
fn no_link_is_followed_wherever_it_is() {
    let tree = Tree::new();
    let run = tree.root.join("run");
    symlink(tree.root.join("etc"), run.join("absolute")).unwrap();
    symlink("../etc", run.join("relative")).unwrap();
    symlink("../etc/a", run.join("dangling")).unwrap();
    symlink(".", run.join("itself")).unwrap();
    symlink("loop", run.join("loop")).unwrap();
    symlink("/proc/self/root", run.join("magic")).unwrap();
    let magic = format!("magic{}/etc/a", tree.root.display());
    for source in
        ["absolute/a", "relative/a/b", "dangling", "dangling/b", "itself/a", "loop", "loop/a", &magic]
    {
        assert_eq!(tree.make(&format!("run/{source}")), Source::Left(Why::Link), "{source}");
    }
    assert_eq!(fs::read_dir(&run).unwrap().count(), 6);
    tree.unchanged();
}

#[test]
fn a_prefix_may_be_a_link_and_may_be_missing() {
    let tree = Tree::new();
    let (var, run) = (tree.root.join("etc/var"), tree.root.join("run"));
    symlink(&run, &var).unwrap();
    let prefixes = format!("{}, {}", var.display(), run.join("late/prefix").display()).parse().unwrap();
    assert_eq!(make(&var.join("a/b"), &prefixes).unwrap(), Source::Made);
    assert!(run.join("a/b").is_dir());
    assert_eq!(make(&run.join("late/prefix/c"), &prefixes).unwrap(), Source::Made);
    assert!(run.join("late/prefix/c").is_dir());
    // Compared as written.
    assert_eq!(make(&run.join("d"), &prefixes).unwrap(), Source::Left(Why::Elsewhere));
}

#[test]
fn the_mode_does_not_depend_on_the_umask_and_no_other_directory_gets_it() {
    let tree = Tree::new();
    let private = tree.root.join("run/private");
    fs::create_dir(&private).unwrap();
    fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).unwrap();
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            own_umask().unwrap();
            tree.make("run/private/a/b")
        });
        assert_eq!(made.join().unwrap(), Source::Made);
    });
    let modes = ["private", "private/a", "private/a/b"].map(|name| mode(&tree.root.join("run").join(name)));
    assert_eq!(modes, [0o700, 0o755, 0o755]);
}

/// A container that writes to a volume replaces a directory by a link, back and forth.
#[test]
fn a_link_that_comes_in_between_leads_nowhere() {
    let tree = Tree::new();
    let (volume, etc) = (tree.root.join("run/volume"), tree.root.join("etc"));
    fs::create_dir(&volume).unwrap();
    let (place, link, spare) = (volume.join("a"), volume.join("link"), volume.join("spare"));
    fs::create_dir(&place).unwrap();
    symlink(&etc, &link).unwrap();
    // While the place is empty, a source may be made there.
    let rename = |from: &Path, to: &Path| {
        while fs::rename(from, to).is_err() {
            drop(fs::remove_dir_all(to));
        }
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                rename(&place, &spare);
                rename(&link, &place);
                rename(&place, &link);
                rename(&spare, &place);
            }
        });
        for at in 0..3000 {
            // What it finds decides whether it is made, left, or removed in between.
            let source = volume.join(format!("a/{at}/c"));
            drop(make(&source, &tree.prefixes));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    tree.unchanged();
}

#[test]
fn prefixes_are_absolute_and_without_parents() {
    let default = MountPrefixes::default();
    assert_eq!(default.to_string().parse(), Ok(default.clone()));
    assert_eq!(" /a, ,/b//c/ ".parse::<MountPrefixes>().unwrap().to_string(), "/a,/b//c/");
    for wrong in ["a", "/a/../b", "/a,b", "..", "./a"] {
        let fault = wrong.parse::<MountPrefixes>().unwrap_err();
        assert!(fault.starts_with("expected absolute paths without '..', comma separated; '"), "{fault}");
    }
}
