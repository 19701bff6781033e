//! Names of tunnels and ids of pods.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::hash::{BuildHasher, RandomState};

use proptest::prelude::*;
use secure_comms_protocol::resource::{pod_keys, separate};
use secure_comms_protocol::{InitDataDigest, PodId, TunnelName};

#[test]
fn a_pod_id_is_a_kbs_path_segment_and_a_file_name() {
    let hex = "0123456789abcdef".repeat(4);
    for good in ["a", "0", "A.b_c-d", "a..", &hex, &"x".repeat(128)] {
        let pod: PodId = good.parse().unwrap();
        assert_eq!((pod.as_str(), pod.to_string().as_str()), (good, good));
        assert_eq!(pod_keys(&pod, None), format!("default/pp-{good}/keys"));
        assert_eq!(separate::pod_private_key(&pod), format!("default/pp-{good}/privateKey"));
        let digest: InitDataDigest = "0aF".repeat(32).parse().unwrap();
        let of_digest = pod_keys(&pod, Some(&digest));
        assert_eq!(of_digest, format!("default/pp-{good}/{}0", "0af".repeat(21)));
    }
}

#[test]
fn a_bad_pod_id_is_an_error_with_the_expected_form() {
    for bad in ["", ".", "..", ".tmp", "-a", "_a", "a/b", "a b", "a\n", "\u{e4}", "a\0", &"x".repeat(129)] {
        let expected = format!(
            "pod id '{}': expected 1 to 128 characters out of A-Z a-z 0-9 . _ -, the first a letter or digit \
             (the runtime's sandbox id)",
            bad.escape_default()
        );
        assert_eq!(bad.parse::<PodId>().unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_bad_tunnel_name_is_an_error_with_the_expected_form() {
    for bad in ["", "a b", "a:b", "a/b", "\u{212a}BS", "a\r", &"x".repeat(65)] {
        let expected = format!(
            "tunnel name '{}': expected 1 to 64 characters out of A-Z a-z 0-9 . _ -",
            bad.escape_default()
        );
        assert_eq!(bad.parse::<TunnelName>().unwrap_err().to_string(), expected);
    }
    let shown = "x".repeat(1 << 20).parse::<TunnelName>().unwrap_err().to_string();
    assert!(shown.len() < 300, "a hostile name fills the log: {} bytes", shown.len());
}

#[test]
fn a_tunnel_name_keeps_its_case_and_compares_without_it() {
    let name: TunnelName = "KataAgent".parse().unwrap();
    assert_eq!(name.as_str(), "KataAgent");
    assert_eq!(name, TunnelName::kata_agent());
    assert_ne!(name, TunnelName::kbs());
}

proptest! {
    #[test]
    fn equal_tunnel_names_have_equal_hashes(text in "[A-Za-z0-9._-]{1,64}", flips in any::<u64>()) {
        let other: String = text
            .char_indices()
            .map(|(i, c)| {
                if flips >> i & 1 == 0 { c }
                else if c.is_ascii_uppercase() { c.to_ascii_lowercase() }
                else { c.to_ascii_uppercase() }
            })
            .collect();
        let (a, b): (TunnelName, TunnelName) = (text.parse().unwrap(), other.parse().unwrap());
        let state = RandomState::new();
        prop_assert_eq!(&a, &b);
        prop_assert_eq!(state.hash_one(&a), state.hash_one(&b));
        prop_assert_eq!(a.as_str(), text);
    }

    #[test]
    fn tunnel_names_are_equal_exactly_if_their_lower_case_is(a in "[A-Ba-b.]{1,3}", b in "[A-Ba-b.]{1,3}") {
        let equal = a.parse::<TunnelName>().unwrap() == b.parse::<TunnelName>().unwrap();
        prop_assert_eq!(equal, a.to_lowercase() == b.to_lowercase());
    }

    #[test]
    fn no_text_makes_a_name_panic_or_its_error_forge_a_line(text in any::<String>()) {
        for error in [
            text.parse::<PodId>().err().map(|e| e.to_string()),
            text.parse::<TunnelName>().err().map(|e| e.to_string()),
        ].into_iter().flatten() {
            prop_assert!(!error.chars().any(char::is_control));
        }
    }

    #[test]
    fn a_pod_id_never_leaves_its_directory_or_its_kbs_path(text in any::<String>()) {
        if let Ok(pod) = text.parse::<PodId>() {
            prop_assert!(!pod.as_str().contains('/') && !pod.as_str().starts_with('.'));
            for path in [pod_keys(&pod, None), separate::pod_private_key(&pod)] {
                prop_assert_eq!(path.split('/').count(), 3);
            }
        }
    }
}
