//! What the end of the service's process costs the pods.

use std::fmt;

use secure_comms_adaptor::pod::PodState;

use super::{PodView, Pods, Runtime};

/// Pods that are named; the others are counted.
const NAMED_MAX: usize = 10;
/// Digits of an id.
const SHORT_ID: usize = 12;

/// What it costs the pods if the service ends now. Their keys are kept, and the next process resumes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopCost {
    /// Pods whose runtime is connected through us. Its connection is cut, so the runtime ends them.
    pub connected: usize,
    /// The first of them, for people.
    pub names: Vec<String>,
    /// Pods whose runtime waits until they can be used. It dials again.
    pub starting: usize,
    /// Other pods whose channel is up: what is connected through it is cut.
    pub up: usize,
}

impl Pods {
    /// What it costs the pods if the service ends now.
    pub fn stop_cost(&self) -> StopCost {
        let mut cost = StopCost::default();
        for pod in self.list() {
            match (&pod.runtime, &pod.snapshot.state) {
                (Runtime::Connected { .. }, _) => {
                    cost.connected += 1;
                    if cost.names.len() < NAMED_MAX {
                        cost.names.push(named(&pod));
                    }
                }
                (Runtime::Held { .. }, _) => cost.starting += 1,
                (_, PodState::Up { .. } | PodState::Down { .. }) => cost.up += 1,
                _ => {}
            }
        }
        cost
    }
}

/// `namespace/name (id)` with a short id, or the id.
fn named(pod: &PodView) -> String {
    let id = pod.id.as_str();
    match &pod.launch.name {
        Some(name) => format!("{name} ({})", id.get(..SHORT_ID).unwrap_or(id)),
        None => id.to_owned(),
    }
}

impl fmt::Display for StopCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if (self.connected, self.starting, self.up) == (0, 0, 0) {
            return f.write_str("no pod is connected");
        }
        let mut parts = Vec::new();
        if self.connected > 0 {
            let more = self.connected.saturating_sub(self.names.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let names = self.names.join(", ");
            parts.push(format!("the runtime ends {}: {names}{more}", pods(self.connected)));
        }
        if self.starting > 0 {
            parts.push(format!("{} starting, which the next process goes on with", pods(self.starting)));
        }
        if self.up > 0 {
            parts.push(format!("the open streams of {} are cut", pods(self.up)));
        }
        f.write_str(&parts.join("; "))
    }
}

fn pods(count: usize) -> String {
    if count == 1 { "1 pod".to_owned() } else { format!("{count} pods") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_names_some_pods_and_counts_the_others() {
        assert_eq!(StopCost::default().to_string(), "no pod is connected");
        let names = vec!["n/a (0123456789ab)".to_owned(), "p2".to_owned()];
        let cost = StopCost { connected: 4, names, starting: 1, up: 2 };
        assert_eq!(
            cost.to_string(),
            "the runtime ends 4 pods: n/a (0123456789ab), p2 and 2 more; 1 pod starting, which the next process goes on with; \
             the open streams of 2 pods are cut"
        );
    }
}
