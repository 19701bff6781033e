//! Replays the corpora of this crate's fuzz targets: their seeds, and what they found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

#[path = "../../fuzz/src/config.rs"]
mod config;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/edit.rs"]
mod edit;
#[path = "../../fuzz/src/flags.rs"]
mod flags;
#[path = "../../fuzz/src/frames.rs"]
mod frames;
#[path = "../../fuzz/src/guest.rs"]
mod guest;
#[path = "../../fuzz/src/init_data.rs"]
mod init_data;
#[path = "../../fuzz/src/pod_network.rs"]
mod pod_network;

#[test]
fn the_corpus_of_flags_holds() {
    corpus::replay("flags", flags::exercise);
}

#[test]
fn the_corpus_of_config_holds() {
    corpus::replay("config", config::exercise);
}

#[test]
fn the_corpus_of_init_data_holds() {
    corpus::replay("init_data", init_data::exercise);
}

#[test]
fn the_corpus_of_pod_network_holds() {
    corpus::replay("pod_network", pod_network::exercise);
}

#[test]
fn the_corpus_of_guest_holds() {
    corpus::replay("guest", guest::exercise);
}

#[test]
fn the_corpus_of_edit_holds() {
    corpus::replay("edit", edit::exercise);
}

#[test]
fn the_corpus_of_frames_holds_however_it_is_split() {
    corpus::replay("frames", |data| {
        frames::exercise(data);
        for step in 1..=64 {
            frames::exercise(&[&[step], data.get(1..).unwrap_or_default()].concat());
        }
    });
}
