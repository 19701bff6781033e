//! The names that CAA makes of pods' names.

/// Longest name of an instance.
const LONGEST: usize = 63;
const PREFIX: &str = "podvm-";
/// Digits of the sandbox id in a name.
const DIGITS: usize = 8;

/// The pod's name in the annotation `io.kubernetes.cri.sandbox-name`: that of CRI-O, `k8s_<pod>_<ns>_<uid>_0`, is cut.
#[must_use]
pub fn pod(annotation: &str) -> String {
    match annotation.split('_').collect::<Vec<_>>()[..] {
        ["k8s", pod, _, _, _] => pod.to_owned(),
        _ => annotation.to_owned(),
    }
}

/// The name of the pod's server: that of its instance.
#[must_use]
pub fn server(pod: &str, sandbox: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let digits: String = sandbox.chars().take(DIGITS).collect();
    let room = LONGEST - PREFIX.len() - 1 - DIGITS;
    let pod: String = pod.chars().map(allowed).take(room).collect();
    format!("{PREFIX}{pod}-{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_lower_case_and_without_dots() {
        assert_eq!(server("Web.v2_x", "0123456789abcdef"), "podvm-web-v2-x-01234567");
        let long = server(&"n".repeat(253), "0123456789abcdef");
        assert_eq!(long.len(), LONGEST);
        assert!(long.ends_with("n-01234567"), "{long}");
    }

    #[test]
    fn the_pods_name_is_cut_from_that_of_cri_o() {
        assert_eq!(pod("k8s_web_default_8b0c_0"), "web");
        assert_eq!(pod("web"), "web");
    }
}
