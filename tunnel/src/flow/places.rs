//! The places of a connection's streams: how many of them each end may open, and how many each tunnel may take of these.
//!
//! Without shares the local clients of one tunnel could take every place, and no stream of another tunnel would be
//! served until they leave. Three rules prevent that:
//!
//! - An end opens at most [`CreditLimits::opener_streams`], so that the other end can always open some.
//! - A tunnel may take another place while it has fewer than [`TUNNEL_SHARE`] times those that are still free. So a
//!   lone tunnel gets two thirds of the places, and of several greedy ones each leaves a third of the rest.
//! - [`CreditLimits::reserved`] places are for the streams that the adaptor opens to the kata agent, and for no others:
//!   without them a runtime can't stop a container.

use std::collections::HashMap;

use secure_comms_protocol::TunnelName;
use secure_comms_protocol::limits::{CreditLimits, TUNNEL_SHARE};

use super::Side;

/// The places that are taken.
#[derive(Debug, Default)]
pub(super) struct Places {
    adaptor: Opened,
    agent: Opened,
}

/// The streams that one end has opened.
#[derive(Debug, Default)]
struct Opened {
    count: usize,
    /// Those of the reserve, which `count` does not include.
    reserved: usize,
    /// All of them by tunnel. A tunnel without streams has no entry.
    tunnels: HashMap<TunnelName, usize>,
}

/// Whether a stream belongs to the tunnel of the reserve.
fn has_reserve(opener: Side, tunnel: &TunnelName) -> bool {
    opener == Side::Adaptor && tunnel.is_kata_agent()
}

impl Places {
    fn opened(&mut self, opener: Side) -> &mut Opened {
        match opener {
            Side::Adaptor => &mut self.adaptor,
            Side::Agent => &mut self.agent,
        }
    }

    /// Number of places taken.
    pub(super) fn taken(&self) -> usize {
        self.adaptor.count + self.adaptor.reserved + self.agent.count + self.agent.reserved
    }

    /// Takes a place for a stream of `tunnel` that `opener` opens. Returns whether there was one.
    pub(super) fn take(&mut self, limits: &CreditLimits, opener: Side, tunnel: &TunnelName) -> bool {
        let common = limits.streams.saturating_sub(limits.reserved + self.adaptor.count + self.agent.count);
        let opened = self.opened(opener);
        let own = opened.tunnels.get(tunnel).copied().unwrap_or(0);
        if has_reserve(opener, tunnel) && opened.reserved < limits.reserved {
            opened.reserved += 1;
        } else {
            let own = if has_reserve(opener, tunnel) { own.saturating_sub(opened.reserved) } else { own };
            let free = common.min(limits.opener_streams.saturating_sub(opened.count));
            if own >= free.saturating_mul(TUNNEL_SHARE) {
                return false;
            }
            opened.count += 1;
        }
        match opened.tunnels.get_mut(tunnel) {
            Some(streams) => *streams += 1,
            None => drop(opened.tunnels.insert(tunnel.clone(), 1)),
        }
        true
    }

    /// Gives a place back.
    pub(super) fn give_back(&mut self, opener: Side, tunnel: &TunnelName) {
        let opened = self.opened(opener);
        let Some(streams) = opened.tunnels.get_mut(tunnel) else { return };
        *streams -= 1;
        // The reserve last: a tunnel that shrinks frees the places of the others first.
        if has_reserve(opener, tunnel) && *streams < opened.reserved {
            opened.reserved -= 1;
        } else {
            opened.count -= 1;
        }
        if *streams == 0 {
            opened.tunnels.remove(tunnel);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secure_comms_protocol::limits::INBOUND_CLIENTS_MAX;

    use super::*;

    const LIMITS: CreditLimits = CreditLimits::KUBERNETES;

    fn tunnel(name: &str) -> TunnelName {
        name.parse().unwrap()
    }

    /// Takes places until there are no more for this tunnel; returns how many there were.
    fn fill(places: &mut Places, opener: Side, name: &str) -> usize {
        (0..=LIMITS.streams).take_while(|_| places.take(&LIMITS, opener, &tunnel(name))).count()
    }

    #[test]
    fn a_lone_tunnel_gets_two_thirds_of_what_its_end_may_open() {
        let (mut places, most) = (Places::default(), LIMITS.tunnel_streams());
        assert_eq!(fill(&mut places, Side::Agent, "LOG"), most);
        assert_eq!(most, LIMITS.opener_streams * 2 / 3);
        let mut places = Places::default();
        assert_eq!(fill(&mut places, Side::Adaptor, "KATAAGENT"), most + LIMITS.reserved);
    }

    #[test]
    fn the_clients_of_an_inbound_have_places_while_other_tunnels_are_used() {
        let mut places = Places::default();
        for number in 0..190 {
            assert!(places.take(&LIMITS, Side::Adaptor, &tunnel(&format!("T{}", number % 3))));
        }
        assert!(fill(&mut places, Side::Adaptor, "SSH") >= INBOUND_CLIENTS_MAX);
    }

    #[test]
    fn greedy_tunnels_of_one_end_leave_places_for_all_others() {
        let mut places = Places::default();
        let got = [1, 2, 3, 4].map(|number| fill(&mut places, Side::Agent, &format!("LOG{number}")));
        assert_eq!(got, [512, 171, 57, 19]);
        assert!(fill(&mut places, Side::Agent, "KBS") >= 6);
        assert!(fill(&mut places, Side::Adaptor, "SSH") >= 128);
        assert_eq!(fill(&mut places, Side::Agent, "kbs"), 0, "names have no case");
    }

    #[test]
    fn the_reserve_of_the_kata_agent_is_never_taken_by_others() {
        let mut places = Places::default();
        for number in 0..200 {
            fill(&mut places, Side::Agent, &format!("A{number}"));
            fill(&mut places, Side::Adaptor, &format!("B{number}"));
        }
        // The agent may not use the adaptor's reserve either.
        assert_eq!(fill(&mut places, Side::Agent, "KATAAGENT"), 0);
        assert!(fill(&mut places, Side::Adaptor, "kataagent") >= LIMITS.reserved);
        assert!(places.taken() <= LIMITS.streams, "{}", places.taken());
    }

    #[test]
    fn the_kata_agents_streams_leave_places_for_all_others() {
        let mut places = Places::default();
        fill(&mut places, Side::Adaptor, "KATAAGENT");
        assert!(fill(&mut places, Side::Adaptor, "SSH") > 100);
        assert!(fill(&mut places, Side::Agent, "KBS") > 100);
    }

    proptest! {
        #[test]
        fn places_that_are_given_back_can_be_taken_again(
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), 0..4_u8), 0..3000)
        ) {
            let mut places = Places::default();
            let mut taken = Vec::new();
            for (takes, adaptor, number) in steps {
                let opener = if adaptor { Side::Adaptor } else { Side::Agent };
                let name = tunnel(["KATAAGENT", "KBS", "A", "B"][usize::from(number)]);
                if takes || taken.is_empty() {
                    if places.take(&LIMITS, opener, &name) {
                        taken.push((opener, name));
                    }
                } else {
                    let (opener, name) = taken.swap_remove(usize::from(number) % taken.len());
                    places.give_back(opener, &name);
                }
                prop_assert_eq!(places.taken(), taken.len());
                prop_assert!(taken.len() <= LIMITS.streams);
            }
            for (opener, name) in taken.drain(..) {
                places.give_back(opener, &name);
            }
            prop_assert_eq!(places.taken(), 0);
            prop_assert!(places.agent.tunnels.is_empty() && places.adaptor.tunnels.is_empty());
            prop_assert_eq!(fill(&mut places, Side::Adaptor, "A"), LIMITS.tunnel_streams());
        }
    }
}
