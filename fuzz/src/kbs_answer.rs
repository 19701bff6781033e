//! Properties of the error text for any answer in place of the KBS's.

use crate::error_body::ErrorBody;
use secure_comms_keys::text::one_line;
use serde_json::Value;

/// Bytes shown of each of the two texts, and the most that an escape and the note of a cut add.
const SHOWN_MAX: usize = 200;
const CUT_MAX: usize = 60;

pub(crate) fn exercise(body: &[u8]) {
    let page = ErrorBody::read(body, true);
    assert!(page.is_page());
    check_shown(&page.to_string());
    let said = ErrorBody::read(body, false);
    let shown = said.to_string();
    check_shown(&shown);
    assert!(!said.variant().contains('/'));
    assert!(!said.names_https_port() || said.detail().contains("server") || said.detail().contains("port"));
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(object) = value.as_object() else { return };
    let (kind, detail) = (object.get("type"), object.get("detail"));
    if [kind, detail].iter().flatten().all(|value| value.is_string()) {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        // An answer with a key given twice is not parsed, but shown unchanged.
        if shown == format!(" {}", one_line(String::from_utf8_lossy(body).trim(), SHOWN_MAX)) {
            return;
        }
        assert_eq!(text(kind).rsplit('/').next(), Some(said.variant()));
        assert_eq!(text(detail), said.detail());
        assert_eq!(shown.is_empty(), said.variant().is_empty() && said.detail().is_empty());
    }
}

fn check_shown(shown: &str) {
    assert!(!shown.chars().any(char::is_control), "it forges a line: {shown:?}");
    assert!(shown.len() <= 2 * (1 + SHOWN_MAX + CUT_MAX), "{} bytes", shown.len());
}
