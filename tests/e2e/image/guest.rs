use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

use super::{refuses, run, script, succeeds, text};

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// What the compiler makes of a few lines; once for all tests.
struct Programs {
    _directory: TempDir,
    /// A static program that ends with 0.
    works: Vec<u8>,
    /// A static program that is ended by a signal.
    crashes: Vec<u8>,
    /// A static program that never ends.
    waits: Vec<u8>,
    /// `libx.so.1`, and a program that needs it.
    library: Vec<u8>,
    needs_library: Vec<u8>,
    /// The same with `$ORIGIN/../../lib/x` as its RUNPATH.
    looks_in_origin: Vec<u8>,
    /// A program that another loader must start.
    other_loader: Vec<u8>,
    /// A program with a symbol of a C library that does not exist yet.
    next_glibc: Vec<u8>,
}

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        let compile = |name: &str, source: &str, flags: &[&str]| {
            let (c, out) = (at("source.c"), at(name));
            fs::write(&c, source).unwrap();
            succeeds("gcc", &[&["-o", text(&out), text(&c)], flags].concat());
            fs::read(out).unwrap()
        };
        let library =
            compile("libx.so.1", "int x(void) { return 0; }", &["-shared", "-fPIC", "-Wl,-soname,libx.so.1"]);
        let uses = "int x(void); int main(void) { return x(); }";
        let libx = at("libx.so.1");
        let mut next_glibc =
            compile("next", "#include <stdio.h>\nint main(void) { return puts(\"\"); }", &[]);
        // The version's name in the string table: the digits are replaced.
        let name = b"GLIBC_2.34\0";
        let place =
            next_glibc.windows(name.len()).position(|found| found == name).expect("a symbol of glibc 2.34");
        next_glibc[place..place + name.len()].copy_from_slice(b"GLIBC_2.99\0");
        Programs {
            works: compile("works", "int main(void) { return 0; }", &["-static"]),
            crashes: compile("crashes", "int main(void) { __builtin_trap(); }", &["-static"]),
            waits: compile("waits", "int pause(void); int main(void) { return pause(); }", &["-static"]),
            needs_library: compile("needs", uses, &[text(&libx)]),
            looks_in_origin: compile("origin", uses, &[text(&libx), "-Wl,-rpath,$ORIGIN/../../lib/x"]),
            other_loader: compile(
                "loader",
                "int main(void) { return 0; }",
                &["-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"],
            ),
            library,
            next_glibc,
            _directory: directory,
        }
    })
}

/// A tree with its manifest.
struct Tree {
    directory: TempDir,
    manifest: String,
}

impl Tree {
    fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
            manifest: "# comments and blank lines are allowed\n\n".into(),
        }
    }

    /// One that the image takes: a static program, one with a library, and a bundle.
    fn good() -> Self {
        let (mut tree, programs) = (Self::new(), programs());
        tree.add("usr/local/bin/kata-agent", &programs.works);
        tree.add("usr/local/bin/attestation-agent", &programs.needs_library);
        tree.add(&format!("{LIBRARIES}/libx.so.1.2"), &programs.library);
        tree.link(&format!("{LIBRARIES}/libx.so.1"), "libx.so.1.2");
        tree.add("pause_bundle/rootfs/pause", &programs.waits);
        tree.add("pause_bundle/config.json", b"{}");
        fs::create_dir_all(tree.at("pause_bundle/rootfs/proc")).unwrap();
        tree.line("pause 3.10 directory pause_bundle/rootfs/proc");
        tree
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn line(&mut self, line: &str) {
        self.manifest += &format!("{line}\n");
    }

    fn put(&self, path: &str, content: &[u8]) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), content).unwrap();
    }

    fn add(&mut self, path: &str, content: &[u8]) {
        self.put(path, content);
        let sum = succeeds("sha256sum", &[text(&self.at(path))]);
        self.line(&format!("guest 1.2.3 {} {path}", &sum[..64]));
    }

    fn link(&mut self, path: &str, target: &str) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        symlink(target, self.at(path)).unwrap();
        self.line(&format!("guest 1.2.3 symlink:{target} {path}"));
    }

    fn written(&self) -> &Path {
        fs::write(self.at("manifest"), &self.manifest).unwrap();
        self.directory.path()
    }

    fn accepted(&self) -> String {
        succeeds(script("build"), &["--guest", text(self.written()), "--check-only"])
    }

    fn refused(&self, said: &str) {
        let error = refuses(script("build"), &["--guest", text(self.written()), "--check-only"]);
        assert!(error.contains(said), "expected '{said}' in:\n{error}");
    }
}

#[test]
fn a_guest_with_a_true_manifest_is_printed() {
    let tree = Tree::good();
    let table = tree.accepted();
    assert_eq!(table.lines().count(), 8, "{table}");
    let program = table.lines().find(|line| line.ends_with("/usr/local/bin/kata-agent")).unwrap();
    let words: Vec<&str> = program.split_whitespace().collect();
    assert_eq!((words[0], words[1]), ("guest", "1.2.3"));
    assert_eq!(words[2], programs().works.len().to_string());
    assert!(tree.manifest.contains(words[3]), "{program}");
}

#[test]
fn a_program_finds_its_library_by_its_own_path() {
    let mut tree = Tree::new();
    tree.add("usr/local/bin/tool", &programs().looks_in_origin);
    tree.add("usr/lib/x/libx.so.1", &programs().library);
    tree.accepted();
    let mut tree = Tree::new();
    tree.add("usr/local/bin/tool", &programs().looks_in_origin);
    tree.add("usr/lib/y/libx.so.1", &programs().library);
    tree.refused("needs libx.so.1, which is at usr/lib/y/libx.so.1, where the loader does not look");
}

#[test]
fn the_stage_depends_on_the_content_alone() {
    let listing = |mode: u32| {
        let (tree, stage) = (Tree::good(), TempDir::new().unwrap());
        for path in ["usr/local/bin/kata-agent", "pause_bundle/config.json"] {
            fs::set_permissions(tree.at(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        let root = stage.path().join("root");
        let list = stage.path().join("list");
        let arguments = ["--stage", text(&root), "--list", text(&list), text(tree.written())];
        assert_eq!(succeeds(script("check-guest"), &arguments), "");
        let mut files = succeeds("find", &[text(&root), "-mindepth", "1", "-printf", "%m %P %l\n"]);
        files += &fs::read_to_string(list).unwrap();
        let mut lines: Vec<String> = files.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let staged = listing(0o4777);
    assert_eq!(staged, listing(0o600));
    for line in [
        "755 usr/local/bin/kata-agent ",
        "644 pause_bundle/config.json ",
        "777 usr/lib/x86_64-linux-gnu/libx.so.1 libx.so.1.2",
    ] {
        assert!(staged.iter().any(|found| found == line), "{line}: {staged:#?}");
    }
}

#[test]
fn a_file_that_is_not_as_named_is_refused() {
    let tree = Tree::good();
    tree.put("usr/local/bin/kata-agent", b"another");
    tree.refused("usr/local/bin/kata-agent: has another digest than the manifest says");
    let tree = Tree::good();
    fs::remove_file(tree.at("pause_bundle/config.json")).unwrap();
    tree.refused("pause_bundle/config.json: missing, but the manifest names it");
    let tree = Tree::good();
    tree.put("usr/local/bin/another", b"x");
    tree.refused("usr/local/bin/another: not in the manifest");
    let tree = Tree::good();
    tree.put("usr/local/bin/with blank", b"x");
    tree.put("usr/with\nnewline", b"x");
    tree.refused("usr/local/bin/with\\ blank: not in the manifest");
    tree.refused("$'usr/with\\nnewline': not in the manifest");
    let tree = Tree::good();
    fs::create_dir(tree.at("opt")).unwrap();
    tree.refused("opt: a directory that no line of the manifest names");
    let tree = Tree::good();
    fs::remove_dir(tree.at("pause_bundle/rootfs/proc")).unwrap();
    tree.refused("pause_bundle/rootfs/proc: is no directory, or missing");
    let tree = Tree::good();
    succeeds("mkfifo", &[text(&tree.at("usr/fifo"))]);
    tree.refused("usr/fifo: not in the manifest");
}

#[test]
fn a_link_as_long_as_a_digest_is_a_link() {
    let mut tree = Tree::good();
    let target = format!("../../{}pause_bundle/config.json", "./".repeat(13));
    assert_eq!("symlink:".len() + target.len(), 64);
    // A file with this content would be refused there: it is no program.
    tree.link("usr/bin/config", &target);
    assert!(tree.accepted().contains(&target));
}

#[test]
fn a_link_that_is_not_as_named_is_refused() {
    for (target, said) in [
        ("/etc/passwd", "out: leads out of the tree"),
        ("../etc", "out: leads out of the tree"),
        ("usr/../../etc", "out: leads out of the tree"),
        ("usr/nothing", "out: leads to usr/nothing, which has no line"),
    ] {
        let mut tree = Tree::good();
        tree.link("out", target);
        tree.refused(said);
    }
    // Over a link in the tree, too.
    let mut tree = Tree::good();
    tree.link("usr/up", "..");
    tree.link("out", "usr/up/../etc");
    tree.refused("out: leads out of the tree");

    let tree = Tree::good();
    symlink("/etc/passwd", tree.at("unnamed")).unwrap();
    tree.refused("unnamed: not in the manifest");
    let tree = Tree::good();
    let link = tree.at(&format!("{LIBRARIES}/libx.so.1"));
    fs::remove_file(&link).unwrap();
    symlink("./libx.so.1.2", &link).unwrap();
    tree.refused("libx.so.1: leads to another target than the manifest says");
    let mut tree = Tree::good();
    fs::rename(tree.at("pause_bundle"), tree.at("elsewhere")).unwrap();
    symlink("elsewhere", tree.at("pause_bundle")).unwrap();
    tree.line("guest 1.2.3 symlink:elsewhere pause_bundle");
    tree.refused("pause_bundle/config.json: pause_bundle is a symbolic link");
    let tree = Tree::good();
    let program = tree.at("usr/local/bin/kata-agent");
    fs::rename(&program, tree.at("moved")).unwrap();
    symlink("../../../moved", program).unwrap();
    tree.refused("usr/local/bin/kata-agent: is a symbolic link: its line must say symlink:TARGET");
}

#[test]
fn a_program_that_can_not_run_is_refused() {
    let programs = programs();
    let mut other_machine = programs.works.clone();
    // e_machine: 183 is AArch64. ELF's class: 1 is 32 bits.
    other_machine[18] = 183;
    let mut small = programs.works.clone();
    small[4] = 1;
    for (content, said) in [
        (programs.crashes.as_slice(), "does not run: status 132"),
        (&other_machine, "is for another machine, or broken"),
        (&small, "is for another machine, or broken"),
        (&programs.works[..30], "is for another machine, or broken"),
        (
            &programs.needs_library,
            "needs libx.so.1, which neither the image nor the tree has: add usr/lib/x86_64-linux-gnu/libx.so.1",
        ),
        (
            &programs.other_loader,
            "needs the interpreter /lib/ld-musl-x86_64.so.1, which neither the image nor the tree has",
        ),
        (&programs.next_glibc, "needs glibc 2.99, and the image has "),
        (b"#!/bin/sh\n", "is a script: the image runs ELF programs only"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no program"),
        (b"", "is no program"),
    ] {
        let mut tree = Tree::new();
        tree.add("usr/local/bin/kata-agent", content);
        tree.refused(&format!("usr/local/bin/kata-agent: {said}"));
    }
}

#[test]
fn a_manifest_that_is_not_well_formed_is_refused() {
    let digest = "0".repeat(64);
    for (line, said) in [
        ("guest 1.2.3 DIGEST", "line 1: expected NAME VERSION SHA256 PATH"),
        ("guest 1.2.3 DIGEST usr/a b", "line 1: expected NAME VERSION SHA256 PATH"),
        ("-guest 1.2.3 DIGEST usr/a", "line 1: name: "),
        ("guest 1$2 DIGEST usr/a", "line 1: version: "),
        ("guest 1.2.3 0DIGEST usr/a", "line 1: SHA256: "),
        ("guest 1.2.3 DIGEST /usr/a", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr/../a", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr//a", "line 1: path: "),
        ("guest 1.2.3 DIGEST ./a", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr/", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr/a\r", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr/$(id)", "line 1: path: "),
        ("guest 1.2.3 DIGEST usr/a\nguest 1.2.3 DIGEST usr/a", "line 2: usr/a has a line already"),
        ("guest 1.2.3 DIGEST var/a", "line 1: var/a is not part of the root in a VM that runs"),
        ("guest 1.2.3 DIGEST bin/a", "line 1: bin/a is a link in the image: write usr/bin/a"),
        ("guest 1.2.3 DIGEST manifest", "line 1: manifest is the manifest's own name"),
        ("guest 1.2.3 DIGEST usr/local/bin/azure-ready", "azure-ready: belongs to the image itself"),
        // A link of the image, to what is not on this machine.
        (
            "guest 1.2.3 DIGEST etc/kata-opa/default-policy.rego",
            "default-policy.rego: belongs to the image itself",
        ),
        (
            "guest 1.2.3 DIGEST usr/lib/systemd/system/kata-agent.service",
            "kata-agent.service: belongs to the image itself",
        ),
        ("", "manifest: names no file"),
    ] {
        let mut tree = Tree::new();
        tree.manifest = line.replace("DIGEST", &digest);
        tree.refused(said);
    }
    let tree = Tree::new();
    let error = refuses(script("build"), &["--guest", text(tree.directory.path()), "--check-only"]);
    assert!(error.contains("manifest: no such file"), "{error}");
    let error = refuses(script("build"), &["--guest", text(&tree.at("missing")), "--check-only"]);
    assert!(error.contains("missing: no such directory"), "{error}");
    // The check of a guest needs one.
    assert_eq!(run(script("build"), &["--check-only"]).status.code(), Some(2));
}
