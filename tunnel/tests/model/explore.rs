//! Visits every state of a small world, breadth first, and reports the shortest list of steps to a fault.
//!
//! A library (stateright) was looked at: it brings an HTTP server and 45 crates, and has no check of "this state can
//! still finish", the property that finds deadlocks, lost credit and streams that are never forgotten.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};

use super::world::World;

/// The result of a complete exploration.
#[derive(Debug)]
pub(crate) struct Explored {
    pub(crate) states: usize,
    pub(crate) edges: usize,
}

/// A property that does not hold, with the steps to where it does not.
#[derive(Debug)]
pub(crate) struct Broken(pub(crate) String);

/// Number of a state.
type State = u32;

/// The number of a state by its content, of 128 bits: among a million states two have the same one with a probability of
/// 10^-26. Without optimisation it takes a third of the time of std's.
struct Content(u128);

impl Hasher for Content {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number.cast_unsigned() as u64);
    }

    fn write_u64(&mut self, number: u64) {
        // The multiplier of a 128-bit PCG, an odd number with bits all over.
        let mixed = (self.0 ^ u128::from(number)).wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645);
        self.0 = mixed ^ (mixed >> 67);
    }

    fn finish(&self) -> u64 {
        0
    }
}

fn number(world: &impl Hash) -> u128 {
    let mut content = Content(1);
    world.hash(&mut content);
    content.0
}

/// How a state was reached first: the state before, and the number of the step among its steps.
#[derive(Clone, Copy)]
struct Origin(State, u16);

/// Visits every state. In each, no property is broken, and certain steps alone can still reach a state that is done.
///
/// # Errors
/// The shortest list of steps to a state where this is not so.
pub(crate) fn explore<W: World>(start: &W) -> Result<Explored, Broken> {
    let mut seen = HashMap::from([(number(start), 0)]);
    let mut origins = vec![Origin(0, 0)];
    let mut certain: Vec<(State, State)> = Vec::new();
    let mut done = Vec::new();
    let mut edges = 0;
    let mut level = vec![(0, start.clone())];
    while !level.is_empty() {
        let mut next_level = Vec::new();
        for (from, world) in level {
            if world.is_done() {
                done.push(from);
            }
            for (index, step) in (0..).zip(world.steps()) {
                edges += 1;
                let mut next = world.clone();
                if let Err(fault) = next.take(&step) {
                    let steps = trace(start, &origins, from);
                    return Err(Broken(format!("{fault}\n{steps}{step:?}  <- broken")));
                }
                let new = State::try_from(origins.len()).expect("fewer than 2^32 states");
                let to = *seen.entry(number(&next)).or_insert(new);
                if to == new {
                    origins.push(Origin(from, index));
                    next_level.push((to, next));
                }
                if W::is_certain(&step) {
                    certain.push((to, from));
                }
            }
        }
        level = next_level;
    }
    match stuck(origins.len(), &done, certain) {
        Some(state) => Err(Broken(format!("can never finish\n{}", trace(start, &origins, state)))),
        None => Ok(Explored { states: origins.len(), edges }),
    }
}

/// The first state from which no state that is done can be reached.
fn stuck(states: usize, done: &[State], mut backwards: Vec<(State, State)>) -> Option<State> {
    backwards.sort_unstable();
    let mut finishes = vec![false; states];
    let mut open = done.to_vec();
    while let Some(state) = open.pop() {
        if std::mem::replace(&mut finishes[state as usize], true) {
            continue;
        }
        let first = backwards.partition_point(|(to, _)| *to < state);
        open.extend(backwards[first..].iter().take_while(|(to, _)| *to == state).map(|(_, from)| from));
    }
    let state = finishes.iter().position(|finishes| !finishes)?;
    State::try_from(state).ok()
}

/// The steps from the start to a state.
fn trace<W: World>(start: &W, origins: &[Origin], mut state: State) -> String {
    let mut indices = Vec::new();
    while state != 0 {
        let Origin(before, index) = origins[state as usize];
        indices.push(index);
        state = before;
    }
    let mut world = start.clone();
    let mut text = String::new();
    for index in indices.into_iter().rev() {
        let step = world.steps().swap_remove(index.into());
        writeln!(text, "{step:?}").expect("a string takes all text");
        world.take(&step).expect("this step was taken before");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up to `last`, if it is not diverted on its way.
    #[derive(Clone, Hash)]
    struct Counter {
        at: u8,
        last: u8,
        forbidden: u8,
        trap: bool,
    }

    impl World for Counter {
        type Step = &'static str;

        fn steps(&self) -> Vec<Self::Step> {
            match self.at {
                200 => vec!["stay"],
                at if at == self.last => vec![],
                3 if self.trap => vec!["count", "divert"],
                _ => vec!["count"],
            }
        }

        fn take(&mut self, step: &Self::Step) -> Result<(), String> {
            match *step {
                "count" => self.at += 1,
                "divert" => self.at = 200,
                _ => {}
            }
            if self.at == self.forbidden { Err("a forbidden number".to_owned()) } else { Ok(()) }
        }

        fn is_certain(step: &Self::Step) -> bool {
            *step != "divert"
        }

        fn is_done(&self) -> bool {
            self.at == self.last
        }
    }

    const COUNTER: Counter = Counter { at: 0, last: 5, forbidden: 9, trap: false };

    #[test]
    fn a_world_without_a_fault_is_explored_whole() {
        let explored = explore(&COUNTER).unwrap();
        assert_eq!((explored.states, explored.edges), (6, 5));
    }

    #[test]
    fn a_broken_property_is_found_with_its_steps() {
        let Broken(text) = explore(&Counter { forbidden: 2, ..COUNTER }).unwrap_err();
        assert_eq!(text, "a forbidden number\n\"count\"\n\"count\"  <- broken");
    }

    #[test]
    fn a_state_that_can_never_finish_is_found() {
        let Broken(text) = explore(&Counter { trap: true, ..COUNTER }).unwrap_err();
        assert!(text.starts_with("can never finish\n") && text.ends_with("\"divert\"\n"), "{text}");
    }
}
