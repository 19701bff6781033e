use proptest::prelude::*;

use super::*;

const EVERY: fn(u64) -> bool = |_| true;
/// More than any pause.
const LONG: Duration = Duration::from_secs(61);

/// A peer of a source of its own.
fn peer(id: u64) -> (u64, Source) {
    from(id, u32::try_from(id).unwrap())
}

/// A peer of this source.
fn from(id: u64, source: u32) -> (u64, Source) {
    (id, Source::of((std::net::Ipv4Addr::from_bits(source), 1).into()))
}

/// Attempts with a clock of their own; every attempt fails after `lasts`.
struct Model {
    queue: AttemptQueue,
    sources: Arc<Sources>,
    connected: Vec<u64>,
    now: Instant,
    lasts: Duration,
}

impl Model {
    fn new(connected: &[u64]) -> Self {
        let sources = Arc::<Sources>::default();
        let queue = AttemptQueue::new(sources.clone());
        let mut model = Self {
            queue,
            sources,
            connected: Vec::new(),
            now: Instant::now(),
            lasts: Duration::from_millis(20),
        };
        connected.iter().for_each(|id| model.connect(*id));
        model
    }

    fn connect(&mut self, id: u64) {
        self.sources.logged_in(peer(id).1, self.now);
        self.connected.push(id);
        self.update();
    }

    fn update(&mut self) {
        self.queue.update(&self.connected.iter().map(|id| peer(*id)).collect::<Vec<_>>(), self.now);
    }

    /// Waits for the next attempt, which fails with `error`; returns whose it was.
    fn attempt(&mut self, error: &str) -> u64 {
        self.update();
        let id = match self.queue.next(self.now, EVERY) {
            Next::Now(id) => id,
            Next::Later(at) => {
                assert!(at > self.now && at <= self.now + KEYS_RETRY_MAX);
                self.now = at;
                let Next::Now(id) = self.queue.next(at, EVERY) else { panic!("a pause has ended") };
                id
            }
            Next::None => panic!("peers are connected"),
        };
        self.queue.begin(id, self.now);
        self.now += self.lasts;
        self.queue.failed(id, error, self.now);
        id
    }

    fn reconnect(&mut self, old: u64, new: u64) {
        self.connected.retain(|id| *id != old);
        self.connect(new);
    }
}

#[test]
fn a_stranger_that_reconnects_does_not_starve_a_peer_that_failed_once() {
    // The stranger reconnects after each of its attempts, fast or slow, and is a newcomer every time.
    for lasts in [Duration::from_millis(20), Duration::from_secs(1), Duration::from_secs(20)] {
        let mut model = Model { lasts, ..Model::new(&[0, 1]) };
        let end = model.now + 5 * LONG;
        let mut honest = 0;
        while model.now < end {
            match model.attempt("status 500") {
                0 => honest += 1,
                stranger => model.reconnect(stranger, stranger + 1),
            }
        }
        assert!(honest > 6, "{lasts:?}: {honest} attempts of the honest peer");
    }
}

#[test]
fn every_peer_is_served_again_after_at_most_all_others() {
    let mut model = Model::new(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let mut newest = 7;
    let mut since_honest = 0;
    for _ in 0..500 {
        // All have ended their pauses.
        model.now += LONG;
        let id = model.attempt("status 500");
        since_honest = if id == 0 { 0 } else { since_honest + 1 };
        assert!(since_honest < 8, "seven others were served, and one of them twice");
        if id != 0 {
            newest += 1;
            model.reconnect(id, newest);
        }
    }
}

#[test]
fn peers_are_served_in_the_order_in_which_they_came() {
    let mut model = Model::new(&[4, 9]);
    model.connect(12);
    assert_eq!([(); 3].map(|()| model.attempt("no")), [4, 9, 12]);
    // One that is not eligible keeps its place.
    model.now += LONG;
    assert_eq!(model.queue.next(model.now, |id| id != 4), Next::Now(9));
    assert_eq!(model.queue.next(model.now, EVERY), Next::Now(4));
    assert_eq!(model.queue.next(model.now, |_| false), Next::None);
}

#[test]
fn a_newcomer_need_not_wait_for_the_pauses_of_others() {
    let mut model = Model::new(&[1]);
    for _ in 0..40 {
        assert_eq!(model.attempt("denied"), 1);
    }
    assert!(matches!(model.queue.next(model.now, EVERY), Next::Later(_)));
    model.reconnect(1, 2);
    let before = model.now;
    assert_eq!(model.attempt("denied"), 2);
    assert_eq!(model.now, before + model.lasts, "at once");
}

#[test]
fn only_a_peer_without_an_attempt_is_a_newcomer() {
    let (mut queue, now) = (AttemptQueue::new(Arc::default()), Instant::now());
    assert!(queue.is_newcomer(3), "not even known");
    queue.update(&[peer(3)], now);
    assert!(queue.is_newcomer(3));
    assert!(queue.begin(3, now) && !queue.begin(3, now) && !queue.is_newcomer(3));
    assert!(!queue.begin(4, now), "it has left");
    assert_eq!(queue.failed(4, "", Instant::now()), None);
}

#[test]
fn turns_go_to_sources_however_many_connections_they_have() {
    let (mut queue, mut now) = (AttemptQueue::new(Arc::default()), Instant::now());
    // The last one comes from another source than the crowd.
    let mut peers: Vec<_> = (0..7).map(|id| from(id, 1)).collect();
    peers.push(from(7, 2));
    queue.update(&peers, now);
    let served = [(); 6].map(|()| {
        now += Duration::from_secs(1);
        let Next::Now(id) = queue.next(now, EVERY) else { panic!("none pauses") };
        queue.begin(id, now);
        id
    });
    assert_eq!(served, [0, 7, 1, 7, 2, 7]);
}

#[test]
fn a_source_with_a_penalty_comes_behind_the_others_and_is_not_shut_out() {
    let (sources, mut now) = (Arc::<Sources>::default(), Instant::now());
    let mut queue = AttemptQueue::new(sources.clone());
    let (failed, failed_source) = peer(1);
    sources.attempt_failed(failed_source, now);
    queue.update(&[peer(1)], now);
    assert_eq!(queue.next(now, EVERY), Next::Now(failed), "alone it need not wait");
    // Ever new sources come, one a second.
    let mut served = 0;
    for id in 2..1000 {
        now += Duration::from_secs(1);
        let fresh = peer(id);
        sources.logged_in(fresh.1, now);
        queue.update(&[peer(1), fresh], now);
        let Next::Now(next) = queue.next(now, EVERY) else { panic!("none pauses") };
        queue.begin(next, now);
        if next == failed {
            assert!(served > 0 || id >= 15, "the penalty is shorter than it should be");
            served += 1;
            sources.attempt_failed(failed_source, now);
        }
    }
    assert!(served >= 14, "{served} attempts of the source that fails");
}

#[test]
fn only_a_source_without_a_penalty_contests_an_attempt() {
    let (sources, now) = (Arc::<Sources>::default(), Instant::now());
    let mut queue = AttemptQueue::new(sources.clone());
    queue.update(&[from(1, 1), from(2, 1)], now);
    let current = from(1, 1).1;
    assert!(!queue.is_contested(current, now, EVERY), "its own source");
    queue.update(&[from(1, 1), from(2, 1), from(3, 3)], now);
    assert!(queue.is_contested(current, now, EVERY));
    assert!(!queue.is_contested(current, now, |id| id != 3));
    sources.attempt_failed(from(3, 3).1, now);
    assert!(!queue.is_contested(current, now, EVERY));
    assert!(queue.is_contested(current, now + LONG, EVERY), "the penalty is over");
    queue.failed(3, "denied", now + LONG);
    assert!(!queue.is_contested(current, now + LONG, EVERY), "it pauses");
}

/// Attempts within an hour, if each fails with the next of `errors`.
fn attempts_an_hour(errors: &mut dyn FnMut(usize) -> String) -> usize {
    let mut model = Model::new(&[1]);
    let end = model.now + Duration::from_secs(3600);
    let mut attempts = 0;
    while model.now < end {
        model.attempt(&errors(attempts));
        attempts += 1;
    }
    attempts
}

#[test]
fn the_same_answer_is_asked_for_about_once_a_minute() {
    let denied = "status 500: policy denied this VM";
    let same = attempts_an_hour(&mut |_| denied.to_owned());
    // Pauses are half a minute to a minute.
    assert!((60..140).contains(&same), "{same}");
    let ids = attempts_an_hour(&mut |n| format!("{denied}: request 7f{n:x}-a{n} at 12:{:02}", n % 60));
    assert!((60..140).contains(&ids), "with the id of each request: {ids}");
    let two = attempts_an_hour(&mut |n| ["status 500", "status 404"][n % 2].to_owned());
    assert!((60..150).contains(&two), "two answers that alternate: {two}");
    let words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"];
    let new = attempts_an_hour(&mut |n| format!("{} {}", words[n % 11], words[n / 11 % 11]));
    assert!((60..300).contains(&new), "ever new answers: {new}");
}

#[test]
fn the_first_attempts_come_soon_and_so_do_those_after_another_answer() {
    let mut model = Model::new(&[1]);
    let began = model.now;
    for _ in 0..=SAME_ANSWERS {
        model.attempt("status 500");
    }
    assert!(model.now - began < Duration::from_secs(40), "{:?}", model.now - began);
    for _ in 0..10 {
        model.attempt("status 500");
    }
    model.attempt("status 404");
    let before = model.now;
    model.attempt("status 404");
    assert!(model.now - before < Duration::from_secs(1), "another status is another answer");
}

#[test]
fn the_pause_is_reported_only_when_it_grows() {
    let mut model = Model::new(&[1]);
    let pauses: Vec<_> = (0..30).filter_map(|_| model.queue.failed(1, "status 500", model.now)).collect();
    let longer: Vec<_> = pauses.iter().filter(|pause| **pause > RETRY_MAX).map(Duration::as_secs).collect();
    assert_eq!(longer, [10, 20, 40, 60]);
}

proptest! {
    #[test]
    fn no_peer_waits_longer_than_all_others_take(
        events in prop::collection::vec((0u8..8, any::<bool>()), 1..200)
    ) {
        let mut model = Model::new(&(0..8).collect::<Vec<_>>());
        let mut newest = 8;
        let mut waits = std::collections::HashMap::new();
        for (slot, reconnects) in events {
            if reconnects {
                let old = model.connected[usize::from(slot)];
                model.reconnect(old, newest);
                newest += 1;
            }
            model.now += LONG;
            let served = model.attempt("no");
            for id in &model.connected {
                let wait = waits.entry(*id).or_insert(0);
                *wait = if *id == served { 0 } else { *wait + 1 };
                prop_assert!(*wait <= 8, "{} waited for {} attempts", id, wait);
            }
        }
    }
}
