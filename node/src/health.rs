//! What works in the service and what does not: for readiness, `status`, the service manager and metrics.

use std::collections::BTreeMap;

use tokio::sync::watch;

/// The parts of the service, by name, and what is wrong with each; `None`: it works. A clone is the same.
#[derive(Clone, Debug)]
pub struct Health(watch::Sender<BTreeMap<&'static str, Option<String>>>);

impl Default for Health {
    fn default() -> Self {
        Self(watch::Sender::new(BTreeMap::new()))
    }
}

impl Health {
    /// The part works.
    pub fn works(&self, part: &'static str) {
        self.set(part, None);
    }

    /// The part does not work, and why: one line, that says what to do.
    pub fn fails(&self, part: &'static str, reason: impl Into<String>) {
        self.set(part, Some(reason.into()));
    }

    /// The parts now.
    pub fn parts(&self) -> BTreeMap<&'static str, Option<String>> {
        self.0.borrow().clone()
    }

    /// What does not work; empty: all does.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let parts = self.parts();
        parts.into_iter().filter_map(|(part, fault)| Some((part, fault?))).collect()
    }

    /// The changes.
    pub fn subscribe(&self) -> watch::Receiver<BTreeMap<&'static str, Option<String>>> {
        self.0.subscribe()
    }

    fn set(&self, part: &'static str, fault: Option<String>) {
        self.0.send_if_modified(|parts| {
            let changes = parts.get(part) != Some(&fault);
            parts.insert(part, fault);
            changes
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_what_does_not_work() {
        let health = Health::default();
        let mut changes = health.subscribe();
        health.works("api");
        health.fails("rules", "nft is missing: install nftables");
        assert_eq!(health.faults(), [("rules", "nft is missing: install nftables".to_owned())]);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        health.works("api");
        assert!(!changes.has_changed().unwrap());
        health.works("rules");
        assert!(health.faults().is_empty());
    }
}
