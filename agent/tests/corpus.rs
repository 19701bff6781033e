//! What the fuzz target of the interceptor starts from, and what it has found, through the same function.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../fuzz/src/exercise.rs"]
mod exercise;

#[test]
fn the_corpus_of_the_fuzz_target_holds() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/frames");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        eprintln!("{}", path.display());
        let data = std::fs::read(path).unwrap();
        exercise::exercise(&data);
        // And however it is split.
        for step in 1..=64 {
            exercise::exercise(&[&[step], data.get(1..).unwrap_or_default()].concat());
        }
        seen += 1;
    }
    assert!(seen > 0, "{directory} is empty");
}
