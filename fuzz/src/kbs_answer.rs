//! Properties of the error text for any answer in place of the KBS's.

use crate::error_body::ErrorBody;
use serde_json::Value;

/// Characters shown of each of the two texts, and the longest escape of one (`\u{10ffff}`).
const SHOWN_MAX: usize = 200;
const ESCAPED_MAX: usize = 10;

pub(crate) fn exercise(body: &[u8]) {
    let said = ErrorBody::read(body);
    let shown = said.to_string();
    assert!(!shown.chars().any(char::is_control), "it forges a line: {shown:?}");
    assert!(shown.chars().count() <= 2 * (1 + SHOWN_MAX * ESCAPED_MAX));
    assert!(!said.variant().contains('/'));
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(object) = value.as_object() else { return };
    let (kind, detail) = (object.get("type"), object.get("detail"));
    if [kind, detail].iter().flatten().all(|value| value.is_string()) {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        // An answer with a key given twice is not parsed, but shown unchanged.
        let body = String::from_utf8_lossy(body).trim().chars().take(SHOWN_MAX).collect::<String>();
        if shown == format!(" {}", body.escape_debug()) {
            return;
        }
        assert_eq!(text(kind).rsplit('/').next(), Some(said.variant()));
        assert_eq!(shown.is_empty(), said.variant().is_empty() && text(detail).is_empty());
    }
}
