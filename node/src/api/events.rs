//! The events of all pods, kept for a while: each reader has a place in them, and none holds up another.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use secure_comms_adaptor::pod::PodEvent;
use secure_comms_protocol::PodId;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::types::Event;
use super::view;
use crate::pods::{Happening, Launch, Pods};

/// Events that are kept.
const KEPT: usize = 4096;
/// Events that a reader takes at a time.
const BATCH: usize = 64;

/// A place in the events: the number of the next one, of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    process: u64,
    next: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{}", self.process, self.next)
    }
}

impl Place {
    /// A place of no process: its reader has lost what it has not seen.
    pub(super) fn unknown() -> Self {
        Self { process: 0, next: 0 }
    }

    /// The place that an id of an event names.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (process, next) = text.split_once('-')?;
        Some(Self { process: u64::from_str_radix(process, 16).ok()?, next: next.parse().ok()? })
    }
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// An event.
    Event(Arc<Event>),
    /// Events are not kept any more: how many, if that is known.
    Lost(Option<u64>),
}

/// How the pods are launched that have had events. A pod is gone already when its last event is recorded.
#[derive(Debug, Default)]
struct Launches(HashMap<PodId, Launch>);

impl Launches {
    /// How the pod of this event is launched; `now`: as the pods know it.
    fn of(&mut self, happening: &Happening, now: Option<Launch>) -> Option<Launch> {
        let pod = &happening.pod;
        if matches!(*happening.event, PodEvent::Deleted) {
            return now.or(self.0.remove(pod));
        }
        let Some(now) = now else { return self.0.get(pod).cloned() };
        // More than that: events were lost, or pods were forgotten, which makes no event.
        if self.0.len() >= KEPT && !self.0.contains_key(pod) {
            self.0.clear();
        }
        self.0.insert(pod.clone(), now.clone());
        Some(now)
    }
}

/// The last events of all pods. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct History(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    process: u64,
    ring: Mutex<Ring>,
    /// The number of the next event.
    news: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    next: u64,
    kept: VecDeque<(u64, Arc<Event>)>,
}

impl History {
    pub(super) fn new() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let process = u64::try_from(since.as_millis()).unwrap_or_default();
        Self(Arc::new(Inner { process, ring: Mutex::default(), news: watch::Sender::new(0) }))
    }

    /// Records what happens to the pods. Never returns while there are pods.
    ///
    /// # Cancellation
    /// Dropping the future ends the record.
    pub(super) async fn record(&self, pods: &Pods) {
        let mut happenings = pods.events();
        let mut launches = Launches::default();
        loop {
            match happenings.recv().await {
                Ok(happening) => {
                    let now = pods.get(&happening.pod).map(|pod| pod.launch);
                    let launch = launches.of(&happening, now);
                    self.push(view::event(&happening, launch.as_ref()));
                }
                // Their numbers are left out, so that each reader learns of them.
                Err(RecvError::Lagged(count)) => self.skip(count),
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn push(&self, event: Event) {
        let mut ring = self.ring();
        let number = ring.next;
        ring.kept.push_back((number, Arc::new(event)));
        if ring.kept.len() > KEPT {
            ring.kept.pop_front();
        }
        ring.next += 1;
        self.0.news.send_replace(ring.next);
    }

    fn skip(&self, count: u64) {
        let mut ring = self.ring();
        ring.next = ring.next.saturating_add(count);
        self.0.news.send_replace(ring.next);
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of the next event.
    pub(super) fn end(&self) -> Place {
        Place { process: self.0.process, next: self.ring().next }
    }

    /// Learns of new events.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.0.news.subscribe()
    }

    /// What comes at `place`, at most a batch, each with the place after it. Empty: nothing yet.
    pub(super) fn read(&self, place: Place) -> Vec<(Place, Read)> {
        let ring = self.ring();
        let at = |next| Place { process: self.0.process, next };
        if place.process != self.0.process || place.next > ring.next {
            let first = ring.kept.front().map_or(ring.next, |(number, _)| *number);
            return vec![(at(first), Read::Lost(None))];
        }
        let (mut read, mut next) = (Vec::new(), place.next);
        let from = ring.kept.partition_point(|(number, _)| *number < next);
        for (number, event) in ring.kept.iter().skip(from).take(BATCH) {
            if *number > next {
                read.push((at(*number), Read::Lost(Some(number - next))));
            }
            next = number + 1;
            read.push((at(next), Read::Event(Arc::clone(event))));
        }
        if read.is_empty() && ring.next > next {
            read.push((at(ring.next), Read::Lost(Some(ring.next - next))));
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::EventKind;
    use super::*;
    use crate::pods::Launcher;

    fn event(number: u64) -> Event {
        Event {
            time: SystemTime::now().into(),
            pod: "p1".into(),
            namespace: None,
            name: None,
            kind: EventKind::Normal,
            reason: "Other".into(),
            message: number.to_string(),
        }
    }

    fn messages(read: &[(Place, Read)]) -> Vec<String> {
        let message = |read: &Read| match read {
            Read::Event(event) => event.message.clone(),
            Read::Lost(count) => format!("lost {count:?}"),
        };
        read.iter().map(|(_, read)| message(read)).collect()
    }

    #[test]
    fn the_last_event_of_a_pod_has_its_name() {
        let happening = |pod: &str, event| Happening {
            at: SystemTime::now(),
            pod: pod.parse().unwrap(),
            event: Arc::new(event),
        };
        let launch = Launch::now(Launcher::Api, None);
        let mut launches = Launches::default();
        assert_eq!(
            launches.of(&happening("p", PodEvent::Published), Some(launch.clone())),
            Some(launch.clone())
        );
        assert_eq!(launches.of(&happening("p", PodEvent::Stopped), None), Some(launch.clone()));
        assert_eq!(launches.of(&happening("p", PodEvent::Deleted), None), Some(launch.clone()));
        assert_eq!(launches.of(&happening("p", PodEvent::Deleted), None), None, "it is forgotten");
        for number in 0..=KEPT {
            launches.of(&happening(&format!("p{number}"), PodEvent::Published), Some(launch.clone()));
        }
        assert!(launches.0.len() <= KEPT);
    }

    #[test]
    fn a_reader_goes_on_where_it_was() {
        let history = History::new();
        let start = history.end();
        assert!(history.read(start).is_empty());
        (0..3).for_each(|number| history.push(event(number)));
        let read = history.read(start);
        assert_eq!(messages(&read), ["0", "1", "2"]);
        let place = Place::parse(&read[1].0.to_string()).unwrap();
        assert_eq!(messages(&history.read(place)), ["2"]);
        assert!(history.read(history.end()).is_empty());
    }

    #[test]
    fn a_slow_reader_learns_how_much_it_lost() {
        let history = History::new();
        let start = history.end();
        (0..KEPT as u64 + 10).for_each(|number| history.push(event(number)));
        let read = history.read(start);
        assert_eq!(messages(&read)[..2], ["lost Some(10)", "10"]);
        assert_eq!(read.len(), BATCH + 1);
    }

    #[test]
    fn events_that_never_came_are_lost() {
        let history = History::new();
        let start = history.end();
        history.push(event(0));
        history.skip(5);
        let first = history.read(start);
        assert_eq!(messages(&first), ["0"]);
        assert_eq!(messages(&history.read(first[0].0)), ["lost Some(5)"]);
        history.push(event(6));
        assert_eq!(messages(&history.read(start)), ["0", "lost Some(5)", "6"]);
        assert_eq!(messages(&history.read(history.end())), [""; 0]);
    }

    #[test]
    fn a_place_of_another_process_is_lost() {
        let history = History::new();
        history.push(event(0));
        let place = Place { process: 1, next: 0 };
        let read = history.read(place);
        assert_eq!(messages(&read), ["lost None"]);
        assert_eq!(messages(&history.read(read[0].0)), ["0"]);
        for text in ["", "-", "1-", "x-1", "1-x", "1"] {
            assert_eq!(Place::parse(text), None, "{text}");
        }
    }
}
