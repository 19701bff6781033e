//! Reads JSON values of given types, and collects all faults instead of ending at the first.

use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The faults so far, each with its key.
#[derive(Default)]
pub(super) struct FieldReader {
    pub(super) faults: Vec<String>,
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
        let number = value.as_i64().and_then(|number| T::try_from(number).ok());
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            let (first, last) = range.into_inner();
            self.fault(key, &format!("{value}: expected a number from {first} to {last}"));
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

    /// Reads a list of objects; an empty one for null. Leaves out items for which `read` returns none after adding a fault.
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
            // Derived code would accept a JSON array as the fields in their order.
            if !item.is_object() {
                self.fault(&key, "expected a JSON object");
                continue;
            }
            match C::deserialize(item) {
                Ok(config) => list.extend(read(self, &key, config)),
                Err(error) => self.fault(&key, &error.to_string()),
            }
        }
        list
    }
}
