//! Replays the corpus of a fuzz target, and what fuzzing has found, in ordinary tests.

use std::path::Path;

/// Calls `exercise` with each input of the target's corpus.
pub(crate) fn replay(target: &str, exercise: impl Fn(&[u8])) {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpora = ours.ancestors().map(|above| above.join("fuzz/corpus")).find(|corpora| corpora.is_dir());
    let directory = corpora.expect("fuzz/corpus stands at the top level").join(target);
    let mut seen = 0;
    for entry in std::fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        // The last input that a failed test prints is the one that failed.
        eprintln!("{}", path.display());
        exercise(&std::fs::read(path).unwrap());
        seen += 1;
    }
    assert!(seen > 0, "{} is empty", directory.display());
}
