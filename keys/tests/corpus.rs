//! What the fuzz targets of this crate start from, and what they have found, through the same functions.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/keys.rs"]
mod keys;

#[test]
fn the_corpus_of_keys_holds() {
    corpus::replay("keys", keys::exercise);
}
