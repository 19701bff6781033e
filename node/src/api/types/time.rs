//! A point in time, as RFC 3339.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A point in time. Its text is RFC 3339 in UTC, with milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(SystemTime);

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        Self(time)
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        time.0
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Years that RFC 3339 cannot write are no times of ours.
        let time = Timestamp::try_from(self.0).unwrap_or_default();
        write!(f, "{time:.3}")
    }
}

impl FromStr for Time {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<Timestamp>().map(|time| Self(time.into()))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_time_is_rfc_3339_in_milliseconds() {
        let time = Time(UNIX_EPOCH + Duration::from_micros(1_764_241_200_123_456));
        assert_eq!(time.to_string(), "2025-11-27T11:00:00.123Z");
        assert_eq!(time.to_string().parse::<Time>().unwrap().to_string(), time.to_string());
        assert_eq!(Time(UNIX_EPOCH).to_string(), "1970-01-01T00:00:00.000Z");
        assert!("yesterday".parse::<Time>().is_err());
    }
}
