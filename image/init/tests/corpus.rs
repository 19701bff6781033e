//! Replays the fuzzing corpora of this crate: the seeds and the inputs that the fuzzers found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/src/disk.rs"]
mod disk;

#[test]
fn the_corpus_of_disk_holds() {
    corpus::replay("disk", disk::exercise);
}
