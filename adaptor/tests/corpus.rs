//! Replays the seeds and findings of this crate's fuzz targets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/kbs_answer.rs"]
mod kbs_answer;
#[path = "../../fuzz/src/kbs_filter.rs"]
mod kbs_filter;
// The path under which kbs_answer.rs finds it.
#[path = "../src/kbs/error_body.rs"]
mod error_body;

#[test]
fn the_corpus_of_kbs_answer_holds() {
    corpus::replay("kbs_answer", kbs_answer::exercise);
}

#[test]
fn the_corpus_of_kbs_filter_holds() {
    corpus::replay("kbs_filter", |data| {
        kbs_filter::exercise(data, secure_comms_adaptor::kbs_filter::filtered);
    });
}
