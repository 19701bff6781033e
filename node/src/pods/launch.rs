//! Who launched a pod, and what Kubernetes calls it: saved with the pod, so that it is known after a restart.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use secure_comms_adaptor::store::Labels;

use crate::init_data::PodName;

/// What begins, readies and ends a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Launcher {
    /// cloud-api-adaptor, whose connections are redirected to us.
    Caa,
    /// A client of the API.
    Api,
}

impl Launcher {
    /// Its word in labels, in the API and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Caa => "caa",
            Self::Api => "api",
        }
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Launcher {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "caa" => Ok(Self::Caa),
            "api" => Ok(Self::Api),
            _ => Err("expected caa or api"),
        }
    }
}

/// A pod's origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who launched it. `None`: another command of this program, as `connect`.
    pub launcher: Option<Launcher>,
    /// Its namespace and name in Kubernetes, where they are known. The launcher says them; nothing proves them.
    pub name: Option<PodName>,
    /// When it was first prepared, in whole milliseconds. `None` if that was not saved.
    pub created: Option<SystemTime>,
}

impl Launch {
    /// A pod that is launched now.
    pub fn now(launcher: Launcher, name: Option<PodName>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let created =
            UNIX_EPOCH + Duration::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        Self { launcher: Some(launcher), name, created: Some(created) }
    }

    pub(crate) fn to_labels(&self) -> Labels {
        let mut labels = Labels::new();
        labels.extend(self.launcher.map(|launcher| ("launcher".to_owned(), launcher.to_string())));
        labels.extend(self.name.as_ref().map(|name| ("name".to_owned(), name.to_string())));
        let created = self.created.and_then(|created| created.duration_since(UNIX_EPOCH).ok());
        labels.extend(created.map(|created| ("created".to_owned(), created.as_millis().to_string())));
        labels
    }

    /// What is missing or not readable is unknown.
    pub(crate) fn of_labels(labels: &Labels) -> Self {
        let millis = labels.get("created").and_then(|text| text.parse().ok());
        Self {
            launcher: labels.get("launcher").and_then(|text| text.parse().ok()),
            name: labels.get("name").and_then(|text| text.parse().ok()),
            created: millis.and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_found_again_in_its_labels() {
        let launch = Launch::now(Launcher::Caa, Some("default/web-1".parse().unwrap()));
        assert_eq!(Launch::of_labels(&launch.to_labels()), launch);
        let unknown = Launch { launcher: None, name: None, created: None };
        assert_eq!(Launch::of_labels(&unknown.to_labels()), unknown);
    }

    #[test]
    fn damaged_labels_are_unknown() {
        let text = |value: &str| value.to_owned();
        let labels = Labels::from([
            (text("launcher"), text("x")),
            (text("name"), text("A")),
            (text("created"), text("18446744073709551615")),
        ]);
        let launch = Launch::of_labels(&labels);
        assert_eq!((launch.launcher, launch.name), (None, None));
    }
}
