//! Replays the corpora of this crate's fuzz targets: their seeds, and what they found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/session.rs"]
mod session;

#[test]
fn the_corpus_of_session_holds() {
    corpus::replay("session", session::exercise);
}
