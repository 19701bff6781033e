//! Properties of the tag parser for any text of an operator or of the user data.

use secure_comms_protocol::tag::{self, InboundTag, OutboundTag, Tag};
use secure_comms_protocol::{PhaseName, PodId, TunnelName};
use std::fmt::Debug;

const PHASES: [PhaseName; 2] = [PhaseName::Attestation, PhaseName::Kubernetes];

pub(crate) fn exercise(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    list::<InboundTag>(text, "BOTH_PHASES:KBS:8080");
    list::<OutboundTag>(text, "KUBERNETES_PHASE:KATAAGENT:/run/kata-containers/agent.sock");
    names(text);
}

fn list<T: Tag + Clone + Debug + PartialEq>(text: &str, built_in: &str) {
    let read = tag::parse_list::<T>(text);
    if let Some((first, rest)) = text.split_once(',') {
        assert_eq!(tag::parse_lists([first, rest]), read, "two lists are as good as one");
    }
    let alone: Vec<&str> = text.split(',').map(str::trim).filter(|tag| !tag.is_empty()).collect();
    let tags = match read {
        Ok(tags) => tags,
        Err(errors) => {
            assert!((1..=alone.len()).contains(&errors.iter().count()), "{errors}");
            assert!(!errors.to_string().chars().any(char::is_control), "it forges a line: {errors}");
            return;
        }
    };
    let each: Vec<T> = alone.iter().map(|tag| T::parse(tag).expect("good in a list is good alone")).collect();
    assert_eq!(each, tags);
    let shown: Vec<String> = tags.iter().map(ToString::to_string).collect();
    assert_eq!(tag::parse_list::<T>(&shown.join(", ")).as_ref(), Ok(&tags), "shown as {shown:?}");
    unique(&tags);
    let built_in = T::parse(built_in).expect("it is ours");
    let all = tag::with_built_in(tags.clone(), built_in.clone());
    unique(&all);
    assert_eq!(all.get(..tags.len()), Some(&tags[..]), "the operator's own come first, as they were");
    for phase in PHASES.into_iter().filter(|phase| built_in.phases().includes(*phase)) {
        assert!(all.iter().any(|tag| tag.name() == built_in.name() && tag.phases().includes(phase)));
    }
}

/// In a phase, a name leads to one tunnel.
fn unique<T: Tag + Debug>(tags: &[T]) {
    for phase in PHASES {
        let mut names: Vec<String> = tags
            .iter()
            .filter(|tag| tag.phases().includes(phase))
            .map(|tag| tag.name().as_str().to_ascii_lowercase())
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "{tags:?}");
    }
}

fn names(text: &str) {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let is_name = (1..=64).contains(&text.len()) && text.chars().all(allowed);
    match text.parse::<TunnelName>() {
        Ok(name) => assert!(is_name && name.to_string() == text),
        Err(error) => assert!(!is_name && !error.to_string().chars().any(char::is_control)),
    }
    let is_id = (1..=128).contains(&text.len())
        && text.chars().all(allowed)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric());
    match text.parse::<PodId>() {
        Ok(id) => assert!(is_id && id.to_string() == text),
        Err(error) => assert!(!is_id && !error.to_string().chars().any(char::is_control)),
    }
}
