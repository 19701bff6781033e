//! Lower rooms never import higher ones, and no two import each other: between crates, and between the modules of each.
//!
//! Reads the sources as text: every path that begins with `crate`, `super` or a module's name counts as an import of the
//! module it leads to. Tests are left out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::slice;

/// The rooms of the agent: each may import those that come after it.
const AGENT: [&str; 11] = [
    "run",
    "server",
    "phases",
    "agent",
    "peers",
    "access",
    "connection",
    "config",
    "kata",
    "pod_network",
    "os",
];

/// Our crates, each with those of ours that it may depend on.
const CRATES: [(&str, &[&str]); 12] = [
    ("protocol", &[]),
    ("keys", &["protocol"]),
    ("tunnel", &["protocol"]),
    ("ssh", &["tunnel", "protocol"]),
    ("agent", &["ssh", "tunnel", "keys", "protocol"]),
    ("adaptor", &["ssh", "tunnel", "keys", "protocol"]),
    ("node", &["adaptor", "ssh", "tunnel", "keys", "protocol"]),
    ("image/device-mapper", &[]),
    ("image/init", &[]),
    ("image/measurements", &[]),
    ("image/user-data", &[]),
    ("image/volumes", &["protocol"]),
];

/// The crates in which a folder's own file counts as a module of the folder: no file in it imports from it. In the others a
/// folder and its own file may share their work.
const STRICT: [&str; 1] = ["agent"];

/// The modules of a crate: the text of each by its path. The crate's root has the empty path.
type Sources = BTreeMap<Vec<String>, String>;
/// Which modules of a folder import which.
type Imports = BTreeMap<String, BTreeSet<String>>;
/// What a folder's own file stands for in [`Imports`].
const FOLDER: &str = "(its own file)";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read_sources(crate_dir: &Path) -> Sources {
    let root = crate_dir.join("src");
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                let name = entry.strip_prefix(&root).unwrap().with_extension("");
                files.push((name.to_str().unwrap().to_owned(), fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    let programs = |name: &str| name == "main" || name.starts_with("bin/");
    sources(files.iter().filter(|(name, _)| !programs(name)).map(|(name, text)| (&**name, &**text)))
}

/// Modules by the names of their files, without extension.
fn sources<'a>(files: impl Iterator<Item = (&'a str, &'a str)>) -> Sources {
    let mut sources = Sources::new();
    let mut tests = BTreeSet::new();
    for (name, text) in files.filter(|(name, _)| !name.ends_with("_tests")) {
        let mut path: Vec<String> = name.split('/').map(str::to_owned).collect();
        if path.last().is_some_and(|last| last == "mod" || last == "lib") {
            path.pop();
        }
        let (text, test_modules) = without_tests(&without_comments(text));
        tests.extend(test_modules.into_iter().map(|module| [&*path, &[module]].concat()));
        sources.insert(path, text);
    }
    sources.retain(|path, _| !tests.iter().any(|test| path.starts_with(test)));
    sources
}

/// Blanks comments, strings and characters out.
fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            raw.find("\"#").map_or(rest.len(), |end| end + 5)
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && (rest.starts_with("'\\") || rest.chars().nth(2) == Some('\'')) {
            quoted(rest, '\'')
        } else {
            0
        };
        if skipped == 0 {
            out.push(c);
        }
        rest = &rest[skipped.max(c.len_utf8())..];
    }
    out
}

/// The length of a text that `rest` begins with, quotes included.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Cuts `#[cfg(test)]` modules out, and names those that are in other files.
fn without_tests(text: &str) -> (String, Vec<String>) {
    let (mut out, mut modules) = (String::new(), Vec::new());
    let mut rest = text;
    while let Some(at) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..at]);
        rest = &rest[at + "#[cfg(test)]".len()..];
        let end = rest.find([';', '{']).map_or(rest.len(), |end| end + 1);
        let item = &rest[..end];
        rest = &rest[end..];
        if let Some(name) = item.trim_end_matches([';', '{', ' ']).split_whitespace().last() {
            modules.push(name.to_owned());
        }
        let mut depth = usize::from(item.ends_with('{'));
        while depth > 0 {
            let Some(brace) = rest.find(['{', '}']) else { break };
            if rest[brace..].starts_with('{') {
                depth += 1
            } else {
                depth -= 1
            }
            rest = &rest[brace + 1..];
        }
    }
    out.push_str(rest);
    (out, modules)
}

/// A part of a path in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Colons,
    Other(char),
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(c) = rest.chars().next() {
        let word = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let (token, length) = match rest.strip_prefix("::") {
            Some(_) => (Token::Colons, 2),
            None if word > 0 => (Token::Word(&rest[..word]), word),
            None => (Token::Other(c), c.len_utf8()),
        };
        tokens.push(token);
        rest = rest[length..].trim_start();
    }
    tokens
}

/// The paths in a text: `a::b`, and `a::{b, c::d}` as `a::b` and `a::c::d`.
fn paths(tokens: &[Token<'_>]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let begins = matches!(tokens[at], Token::Word(_)) && (at == 0 || tokens[at - 1] != Token::Colons);
        at = if begins { path(tokens, at, Vec::new(), &mut found) } else { at + 1 };
    }
    found.retain(|path| path.len() > 1);
    found
}

/// Reads a path or a group of paths at `at`; returns the place after it.
fn path(
    tokens: &[Token<'_>],
    mut at: usize,
    mut path_so_far: Vec<String>,
    found: &mut Vec<Vec<String>>,
) -> usize {
    loop {
        match tokens.get(at) {
            Some(Token::Word(word)) => path_so_far.push((*word).to_owned()),
            Some(Token::Other('{')) if !path_so_far.is_empty() => {
                at += 1;
                while at < tokens.len() && tokens[at] != Token::Other('}') {
                    // A comma, or what follows `as`.
                    let begins = matches!(tokens[at - 1], Token::Other('{' | ','));
                    let after = if begins { path(tokens, at, path_so_far.clone(), found) } else { at };
                    // Not every token belongs to a path: `*`.
                    at = after.max(at + 1);
                }
                return at + 1;
            }
            _ => break,
        }
        at += 1;
        if tokens.get(at) != Some(&Token::Colons) {
            break;
        }
        at += 1;
    }
    found.push(path_so_far);
    at
}

/// What the `use` lines of a module give names to.
fn names(text: &str) -> BTreeMap<String, Vec<String>> {
    let tokens = tokens(text);
    let mut names = BTreeMap::new();
    for at in 0..tokens.len() {
        if tokens[at] == Token::Word("use") {
            let mut found = Vec::new();
            path(&tokens, at + 1, Vec::new(), &mut found);
            names.extend(found.into_iter().filter_map(|path| Some((path.last()?.clone(), path))));
        }
    }
    names
}

/// The module that a path in `module` leads to; none if it leads out of the crate.
fn resolve(sources: &Sources, module: &[String], path: &[String], depth: usize) -> Option<Vec<String>> {
    let (mut at, mut rest) = match &*path[0] {
        "crate" => (Vec::new(), &path[1..]),
        "self" => (module.to_vec(), &path[1..]),
        "super" => (module[..module.len().checked_sub(1)?].to_vec(), &path[1..]),
        first if sources.contains_key(&[module, &[first.to_owned()]].concat()) => (module.to_vec(), path),
        _ => return None,
    };
    while let Some((next, after)) = rest.split_first() {
        let deeper = [&*at, slice::from_ref(next)].concat();
        if next == "super" {
            at.pop()?;
        } else if sources.contains_key(&deeper) {
            at = deeper;
        } else {
            // A name that the module has from another.
            let alias = names(&sources[&at]).remove(next).filter(|_| depth > 0);
            let followed = alias.and_then(|alias| resolve(sources, &at, &alias, depth - 1));
            return Some(followed.unwrap_or(at));
        }
        rest = after;
    }
    Some(at)
}

/// Which modules of `folder` import which. The root of a crate is its map: it is left out.
fn imports(sources: &Sources, folder: &[String], strict: bool) -> Imports {
    let mut imports = Imports::new();
    let child = |module: &[String]| module.get(folder.len()).map_or(FOLDER.to_owned(), Clone::clone);
    for (module, text) in sources.iter().filter(|(module, _)| module.starts_with(folder)) {
        let from = child(module);
        imports.entry(from.clone()).or_default();
        for path in paths(&tokens(text)) {
            let to = resolve(sources, module, &path, 8).filter(|to| to.starts_with(folder));
            let Some(to) = to.map(|to| child(&to)).filter(|to| *to != from) else { continue };
            imports.entry(from.clone()).or_default().insert(to);
        }
    }
    if folder.is_empty() || !strict {
        imports.remove(FOLDER);
        imports.values_mut().for_each(|to| {
            to.remove(FOLDER);
        });
    }
    imports
}

/// The modules from which there is a way back to themselves, with it.
fn circles(imports: &Imports) -> Vec<String> {
    let mut circles = Vec::new();
    for begin in imports.keys() {
        let mut ways = vec![vec![begin.clone()]];
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop() {
            for to in imports.get(way.last().unwrap()).into_iter().flatten() {
                if to == begin {
                    circles.push([&*way, slice::from_ref(to)].concat().join(" -> "));
                } else if seen.insert(to.clone()) {
                    ways.push([&*way, slice::from_ref(to)].concat());
                }
            }
        }
    }
    circles
}

/// The circles of a crate, at its top and in each of its folders.
fn circles_of(sources: &Sources, strict: bool) -> Vec<String> {
    let mut folders: BTreeSet<&[String]> =
        sources.keys().filter_map(|path| path.split_last()).map(|(_, up)| up).collect();
    folders.insert(&[]);
    let circles = folders.into_iter().flat_map(|folder| {
        let circles = circles(&imports(sources, folder, strict));
        circles.into_iter().map(move |circle| format!("{}: {circle}", folder.join("::")))
    });
    circles.collect()
}

/// Imports that do not go down in `order`, and modules that it lacks.
fn upward(imports: &Imports, order: &[&str]) -> Vec<String> {
    let place = |module: &String| order.iter().position(|known| known == module);
    let mut faults = Vec::new();
    for (from, all) in imports {
        if place(from).is_none() {
            faults.push(format!("{from} has no place in the order"));
        }
        faults.extend(all.iter().filter(|to| place(to) <= place(from)).map(|to| format!("{from} -> {to}")));
    }
    faults
}

/// Our crates among the dependencies of a manifest, tests' left out.
fn dependencies(manifest: &str) -> Vec<String> {
    let sections = manifest.split("\n[").filter(|section| section.starts_with("dependencies]"));
    let lines = sections.flat_map(str::lines);
    let names = lines.filter_map(|line| line.split(['.', ' ', '=']).next()?.strip_prefix("secure-comms-"));
    names.map(str::to_owned).collect()
}

/// The members of the workspace that are products.
fn products() -> Vec<String> {
    let manifest = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    let members = members.split(',').map(|member| member.trim().trim_matches('"').to_owned());
    members.filter(|member| !member.is_empty() && !member.starts_with("tests")).collect()
}

#[test]
fn agent_rooms_import_only_lower_rooms() {
    let sources = read_sources(&workspace().join("agent"));
    assert_eq!(upward(&imports(&sources, &[], true), &AGENT), Vec::<String>::new());
}

#[test]
fn no_modules_import_each_other() {
    let mut found = Vec::new();
    for product in products() {
        let sources = read_sources(&workspace().join(&product));
        assert!(sources.len() > 1, "{product}: no sources");
        found.extend(
            circles_of(&sources, STRICT.contains(&&*product))
                .into_iter()
                .map(|circle| format!("{product}/{circle}")),
        );
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn crates_depend_only_on_lower_crates() {
    for product in products() {
        let known = CRATES.iter().find(|(name, _)| *name == product);
        let (_, allowed) = known.unwrap_or_else(|| panic!("{product} has no place among the crates"));
        let manifest = fs::read_to_string(workspace().join(&product).join("Cargo.toml")).unwrap();
        let others: Vec<_> =
            dependencies(&manifest).into_iter().filter(|name| !allowed.contains(&&**name)).collect();
        assert_eq!(others, Vec::<String>::new(), "{product}");
    }
}

#[test]
fn checker_sees_upward_imports_and_circles() {
    let sources = |files: &[(&str, &str)]| sources(files.iter().copied());
    let order = ["high", "low"];
    let good = sources(&[
        ("lib", "pub mod high; mod low; pub use low::Word;"),
        (
            "high",
            "use std::io; use crate::low::{self, Word}; // crate::low\n#[cfg(test)]\nmod tests { use crate::high; }",
        ),
        ("low", "const TEXT: &str = \"crate::high::run()\"; #[cfg(test)] mod trick;"),
        ("low/trick", "use crate::high;"),
        ("low_tests", "use crate::high;"),
    ]);
    assert_eq!(
        (upward(&imports(&good, &[], true), &order), circles_of(&good, true)),
        (Vec::new(), Vec::new())
    );
    for (low, what) in [
        ("use crate::high::run;", "a use"),
        ("use crate::{\n    high::{run},\n};", "a group"),
        ("fn f() { crate::high::run() }", "a path"),
        ("use super::high;", "a relative path"),
        ("use crate::Run;", "a name of the root"),
    ] {
        let bad = sources(&[
            ("lib", "mod high; mod low; pub use high::Run;"),
            ("high", "use crate::low::Word;"),
            ("low", low),
        ]);
        assert_eq!(upward(&imports(&bad, &[], true), &order), ["low -> high"], "{what}");
        assert_eq!(circles_of(&bad, true).len(), 2, "{what}");
    }
    let nested = sources(&[
        ("lib", "mod room;"),
        ("room", "mod a; mod b;"),
        ("room/a", "use super::b::B;"),
        ("room/b", "use crate::room::a::A;"),
    ]);
    assert_eq!(circles_of(&nested, false), ["room: a -> b -> a", "room: b -> a -> b"]);
    let own_file =
        sources(&[("lib", "mod room;"), ("room", "mod a; use a::A; struct B;"), ("room/a", "use super::B;")]);
    assert_eq!((circles_of(&own_file, true).len(), circles_of(&own_file, false).len()), (2, 0));
}

#[test]
fn checker_sees_dependencies() {
    let manifest = "[package]\nname = \"x\"\n\n[dependencies]\nsecure-comms-tunnel.workspace = true\nserde = \"1\"\n\
                    secure-comms-ssh = { path = \"../ssh\" }\n\n[dev-dependencies]\nsecure-comms-tests = \"1\"\n";
    assert_eq!(dependencies(manifest), ["tunnel", "ssh"]);
}
