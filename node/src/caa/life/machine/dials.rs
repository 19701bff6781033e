//! The held dials of one sandbox.

use std::net::IpAddr;

use super::input::DialNo;

/// Held dials of one sandbox. A stranger's dials must not displace that of cloud-api-adaptor, which has one at a time.
pub(super) const DIALS_MAX: usize = 3;

/// Held dials with the address that each is for, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Dials(Vec<(DialNo, IpAddr)>);

impl Dials {
    /// Holds one more. Returns the one that has to make room for it: neither the oldest, because cloud-api-adaptor closes a
    /// dial before it makes the next, nor the one whose handshake is being ended.
    pub(super) fn hold(&mut self, dial: DialNo, vm: IpAddr, finishing: Option<DialNo>) -> Option<DialNo> {
        let mut dropped = None;
        if self.0.len() >= DIALS_MAX
            && let Some(place) = self.0.iter().skip(1).position(|(dial, _)| Some(*dial) != finishing)
        {
            dropped = Some(self.0.remove(place + 1).0);
        }
        self.0.push((dial, vm));
        dropped
    }

    /// Whether it was held.
    pub(super) fn remove(&mut self, dial: DialNo) -> bool {
        let before = self.0.len();
        self.0.retain(|(held, _)| *held != dial);
        self.0.len() < before
    }

    /// Removes all that are to this address.
    pub(super) fn remove_to(&mut self, vm: IpAddr) -> Vec<DialNo> {
        let removed = self.0.extract_if(.., |(_, dialled)| *dialled == vm);
        removed.map(|(dial, _)| dial).collect()
    }

    pub(super) fn remove_all(&mut self) -> Vec<DialNo> {
        self.0.drain(..).map(|(dial, _)| dial).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The address that the oldest is for.
    pub(super) fn first_vm(&self) -> Option<IpAddr> {
        self.0.first().map(|(_, vm)| *vm)
    }

    /// The oldest to this address.
    pub(super) fn first_to(&self, vm: IpAddr) -> Option<DialNo> {
        self.0.iter().find(|(_, dialled)| *dialled == vm).map(|(dial, _)| *dial)
    }

    /// Whether there are dials, and all of them to other addresses.
    pub(super) fn are_elsewhere(&self, vm: IpAddr) -> bool {
        !self.is_empty() && self.first_to(vm).is_none()
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (DialNo, IpAddr)> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn vm(number: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, number).into()
    }

    #[test]
    fn the_oldest_and_the_one_that_finishes_are_kept() {
        let mut dials = Dials::default();
        for dial in 1..=3 {
            assert_eq!(dials.hold(dial, vm(1), None), None);
        }
        assert_eq!(dials.hold(4, vm(1), Some(2)), Some(3));
        assert_eq!(dials.hold(5, vm(1), Some(1)), Some(2));
        assert_eq!(dials.iter().map(|(dial, _)| dial).collect::<Vec<_>>(), [1, 4, 5]);
    }

    #[test]
    fn dials_are_found_and_removed_by_address() {
        let mut dials = Dials::default();
        assert!(!dials.are_elsewhere(vm(1)), "there are none");
        for (dial, to) in [(1, 1), (2, 2), (3, 1)] {
            dials.hold(dial, vm(to), None);
        }
        assert_eq!((dials.first_vm(), dials.first_to(vm(2))), (Some(vm(1)), Some(2)));
        assert!(dials.are_elsewhere(vm(3)) && !dials.are_elsewhere(vm(2)));
        assert_eq!(dials.remove_to(vm(1)), [1, 3]);
        assert!(!dials.remove(1) && dials.remove(2) && dials.is_empty());
    }
}
