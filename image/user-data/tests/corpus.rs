//! Replays the fuzzing corpus of this crate: the seeds and the inputs that the fuzzer found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/src/user_data.rs"]
mod user_data_target;

#[test]
fn the_corpus_of_user_data_holds() {
    corpus::replay("user_data", user_data_target::exercise);
}
