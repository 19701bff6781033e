//! What an operator copies: blocks of a document, settings of a manifest, keys of a unit.

/// The line before a block that a test runs.
const MARK: &str = "<!-- run -->";

/// The shell blocks that are marked, in their order.
///
/// # Errors
/// If a mark is not followed by a shell block that ends.
pub(crate) fn marked_blocks(document: &str) -> anyhow::Result<Vec<String>> {
    let mut lines = document.lines();
    let mut blocks = Vec::new();
    while lines.by_ref().any(|line| line == MARK) {
        let number = blocks.len() + 1;
        anyhow::ensure!(lines.next() == Some("```sh"), "mark {number} has no shell block");
        let mut block = String::new();
        loop {
            match lines.next() {
                Some("```") => break,
                Some(line) => block.extend([line, "\n"]),
                None => anyhow::bail!("block {number} does not end"),
            }
        }
        blocks.push(block);
    }
    Ok(blocks)
}

/// The text of a key that is a literal block of a YAML document.
pub(crate) fn literal(yaml: &str, key: &str) -> Option<String> {
    let mut lines = yaml.lines();
    let head = lines.by_ref().find(|line| line.trim_start() == format!("{key}: |"))?;
    let indent = " ".repeat(head.len() - head.trim_start().len() + 2);
    let block = lines.map_while(|line| if line.is_empty() { Some("") } else { line.strip_prefix(&indent) });
    let text: String = block.flat_map(|line| [line, "\n"]).collect();
    (!text.is_empty()).then_some(text)
}

/// The values of a key in a section of a unit.
pub(crate) fn values<'a>(unit: &'a str, section: &str, key: &str) -> Vec<&'a str> {
    let section = format!("[{section}]");
    let lines = unit.lines().skip_while(move |line| *line != section).skip(1);
    let pairs = lines.take_while(|line| !line.starts_with('[')).filter_map(|line| line.split_once('='));
    pairs.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

#[test]
fn only_marked_blocks_are_run() {
    let text = "a\n```sh\nno\n```\n<!-- run -->\n```sh\none\ntwo\n```\n<!-- run -->\n```sh\nthree\n```\n";
    assert_eq!(marked_blocks(text).unwrap(), ["one\ntwo\n", "three\n"]);
    assert!(marked_blocks("nothing").unwrap().is_empty());
    for broken in ["<!-- run -->\n", "<!-- run -->\n```text\n```\n", "<!-- run -->\n```sh\nx\n"] {
        assert!(marked_blocks(broken).is_err(), "{broken}");
    }
}

#[test]
fn settings_are_found_in_manifest_and_unit() {
    let yaml = "data:\n  a.toml: |\n    x = 1\n\n    y = 2\n  z: |\n    3\n---\nz: 1\n";
    assert_eq!(literal(yaml, "a.toml").unwrap(), "x = 1\n\ny = 2\n");
    assert_eq!(literal(yaml, "b.toml"), None);
    let unit = "[Unit]\nA=0\n[Service]\nA=1\n#A=2\nA=3=4\n[Install]\nA=5\n";
    assert_eq!(values(unit, "Service", "A"), ["1", "3=4"]);
    assert!(values(unit, "Socket", "A").is_empty());
}
