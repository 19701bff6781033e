//! Bounded places for connections: a newer one takes the place of an older one, but not of the first with its name.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// A bounded number of places. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct Places(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    /// The next arrival's number.
    next: u64,
    /// By arrival.
    taken: BTreeMap<u64, Taken>,
    most: usize,
    most_per_name: usize,
}

#[derive(Debug)]
struct Taken {
    name: String,
    /// It keeps its place even if all are taken.
    recognised: bool,
    /// Dropped with its place.
    _evict: oneshot::Sender<Infallible>,
}

/// A place; free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    number: u64,
    evicted: oneshot::Receiver<Infallible>,
}

impl Places {
    /// Places for connections that no name tells apart.
    pub(super) fn unnamed(most: usize) -> Self {
        Self::new(most, usize::MAX)
    }

    pub(super) fn new(most: usize, most_per_name: usize) -> Self {
        Self(Arc::new(Mutex::new(Table { next: 0, taken: BTreeMap::new(), most, most_per_name })))
    }

    /// A place, if need be that of the second oldest with the same name, or else of the oldest that is not recognised. `None`:
    /// all places are taken by recognised ones.
    ///
    /// The first one with a name stays: it is cloud-api-adaptor's, unless a stranger was faster, and the newer ones may be a
    /// stranger's burst. A place is free as soon as its client has given up.
    pub(super) fn enter(&self, name: &str) -> Option<Place> {
        let mut table = self.lock();
        let same = || table.taken.iter().filter(|(_, taken)| taken.name == name).map(|(number, _)| *number);
        let evict = if same().count() >= table.most_per_name {
            same().nth(1).or_else(|| same().next())
        } else if table.taken.len() >= table.most {
            Some(table.taken.iter().find(|(_, taken)| !taken.recognised).map(|(number, _)| *number)?)
        } else {
            None
        };
        if let Some(number) = evict {
            table.taken.remove(&number);
        }
        let number = table.next;
        table.next += 1;
        let (evict, evicted) = oneshot::channel();
        table.taken.insert(number, Taken { name: name.to_owned(), recognised: false, _evict: evict });
        drop(table);
        Some(Place { places: self.clone(), number, evicted })
    }

    /// Never poisoned: nothing panics under the lock.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Only one with the same name takes this place from now on.
    pub(super) fn recognise(&self) {
        if let Some(taken) = self.places.lock().taken.get_mut(&self.number) {
            taken.recognised = true;
        }
    }

    /// Returns once a newer one has taken the place.
    ///
    /// # Cancellation
    /// Loses nothing.
    pub(super) async fn evicted(&mut self) {
        let Err(_) = (&mut self.evicted).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_evicted(place: &mut Place) -> bool {
        place.evicted.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn the_first_and_the_newest_of_a_name_stay() {
        let places = Places::new(10, 2);
        let mut other = places.enter("b").unwrap();
        let mut first = places.enter("a").unwrap();
        let mut second = places.enter("a").unwrap();
        second.recognise();
        let mut third = places.enter("a").unwrap();
        assert!(is_evicted(&mut second));
        assert!(!is_evicted(&mut first) && !is_evicted(&mut third) && !is_evicted(&mut other));
        drop(first);
        let mut fourth = places.enter("a").unwrap();
        assert!(!is_evicted(&mut third) && !is_evicted(&mut fourth), "the first has gone by itself");
    }

    #[test]
    fn of_those_without_a_name_the_newest_stay() {
        let places = Places::unnamed(2);
        let mut all: Vec<_> = (0..3).map(|_| places.enter("").unwrap()).collect();
        assert_eq!(all.iter_mut().map(is_evicted).collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn the_oldest_unrecognised_makes_room() {
        let places = Places::new(2, 2);
        let mut first = places.enter("a").unwrap();
        first.recognise();
        let mut second = places.enter("b").unwrap();
        let mut third = places.enter("c").unwrap();
        assert!(!is_evicted(&mut first) && is_evicted(&mut second) && !is_evicted(&mut third));
        third.recognise();
        assert!(places.enter("d").is_none(), "all are recognised");
        drop(first);
        assert!(places.enter("d").is_some(), "a place is free");
    }

    #[test]
    fn a_place_that_was_taken_over_frees_no_other() {
        let places = Places::unnamed(1);
        let first = places.enter("a").unwrap();
        let mut second = places.enter("a").unwrap();
        drop(first);
        assert_eq!(places.lock().taken.len(), 1);
        assert!(!is_evicted(&mut second));
    }
}
