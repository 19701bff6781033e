//! Reads JSON values of given types, and collects all faults instead of ending at the first.

use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::names::Names;

/// What was wrong so far, each with its key.
#[derive(Default)]
pub(super) struct FieldReader {
    /// Faults that leave no network.
    pub(super) faults: Vec<String>,
    /// Parts of the network that are left out or replaced by a default.
    pub(super) remarks: Vec<String>,
}

impl FieldReader {
    pub(super) fn fault(&mut self, key: &str, fault: &str) {
        self.faults.push(format!("'{key}': {fault}"));
    }

    /// Reads a text; none for null and for the empty text.
    pub(super) fn text<'v>(&mut self, key: &str, value: &'v Value) -> Option<&'v str> {
        match value {
            Value::Null => None,
            Value::String(text) => Some(text.as_str()).filter(|text| !text.is_empty()),
            _ => {
                self.fault(key, "not a text; expected a JSON string");
                None
            }
        }
    }

    /// Reads and parses an optional text.
    pub(super) fn parsed<T: FromStr>(&mut self, key: &str, value: &Value, expected: &str) -> Option<T> {
        let text = self.text(key, value)?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.fault(key, &format!("'{text}': expected {expected}"));
        }
        parsed
    }

    /// Reads and parses a text; its absence is a fault.
    pub(super) fn required<T: FromStr>(&mut self, key: &str, value: &Value, expected: &str) -> Option<T> {
        self.missing(key, value, expected);
        self.parsed(key, value, expected)
    }

    /// Adds a fault if there is no value.
    pub(super) fn missing(&mut self, key: &str, value: &Value, expected: &str) {
        if value.is_null() || value.as_str() == Some("") {
            self.fault(key, &format!("missing; expected {expected}"));
        }
    }

    /// Reads a number in a range; none for null.
    pub(super) fn number<T>(&mut self, key: &str, value: &Value, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + std::fmt::Display,
    {
        if value.is_null() {
            return None;
        }
        let number = match value {
            Value::String(text) if text.is_empty() => return None,
            // i64's parser would accept a sign.
            Value::String(text) => text.parse().ok().filter(|_| !text.starts_with('+')),
            _ => value.as_i64(),
        };
        let number = number.and_then(|number| T::try_from(number).ok());
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            let (first, last) = range.into_inner();
            self.fault(key, &format!("{value}: expected a number from {first} to {last}"));
        }
        number
    }

    /// Reads a name or a number; none for null and for the empty text. An unknown one is none too, with a remark: it describes
    /// a route or a neighbour, which works without it.
    pub(super) fn named(&mut self, key: &str, value: &Value, names: &Names) -> Option<u16> {
        let number = match value {
            Value::Null => return None,
            Value::String(text) if text.is_empty() => return None,
            Value::String(text) => names.number(text),
            Value::Number(number) => number
                .as_u64()
                .and_then(|number| u16::try_from(number).ok())
                .filter(|number| names.range.contains(number)),
            _ => None,
        };
        if number.is_none() {
            let Names { kind, default, .. } = names;
            self.remarks.push(format!("'{key}': {value} is no {kind}; {default} is taken"));
        }
        number
    }

    /// Reads a boolean; false for null.
    pub(super) fn flag(&mut self, key: &str, value: &Value) -> bool {
        if !value.is_null() && !value.is_boolean() {
            self.fault(key, "expected true or false");
        }
        value.as_bool().unwrap_or(false)
    }

    /// Reads a list of objects; an empty one for null. An item with a fault is left out, with a remark: one strange item must
    /// not cost the pod its network.
    pub(super) fn list<C: DeserializeOwned, T>(
        &mut self,
        key: &str,
        value: &Value,
        read: impl Fn(&mut Self, &str, C) -> Option<T>,
    ) -> Vec<T> {
        let empty = Vec::new();
        let items = match value {
            Value::Null => &empty,
            Value::Array(items) => items,
            _ => {
                self.fault(key, "not a list; expected a JSON array");
                &empty
            }
        };
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let key = format!("{key}[{index}]");
            let mut reader = Self::default();
            // Derived code would accept a JSON array as the fields in their order.
            let config = item.is_object().then(|| C::deserialize(item));
            let read = match config {
                Some(Ok(config)) => read(&mut reader, &key, config),
                Some(Err(error)) => {
                    reader.fault(&key, &error.to_string());
                    None
                }
                None => {
                    reader.fault(&key, "expected a JSON object");
                    None
                }
            };
            if reader.faults.is_empty() {
                list.extend(read);
                self.remarks.extend(reader.remarks);
            } else {
                self.remarks.push(format!("{}; left out", reader.faults.join("; ")));
            }
        }
        list
    }
}
