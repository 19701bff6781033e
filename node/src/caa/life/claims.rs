//! Which sandbox has which VM address: of all that were dialled there, the youngest. An address is used again once its VM is
//! gone, and cloud-api-adaptor may go on dialling it for the older sandbox.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::SystemTime;

use secure_comms_protocol::PodId;

/// Addresses that are remembered, those of sandboxes that have ended included: an older one must not get one back. The VM
/// that is there next may be a third sandbox's, not dialled yet: it would attest with the older one's keys.
const ADDRESSES_MAX: usize = 4096;

/// A sandbox and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// When its `apf.json` was written.
    pub(super) written: SystemTime,
    /// The sandbox.
    pub(super) id: PodId,
}

impl Claim {
    /// The same for all that ask, also if two were written at the same time.
    fn is_younger_than(&self, other: &Self) -> bool {
        (self.written, &self.id) > (other.written, &other.id)
    }
}

/// What a dial to an address means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The sandbox has the address.
    Owner,
    /// The sandbox has the address now; this older one has lost it.
    Taken(PodId),
    /// This younger sandbox has the address.
    Zombie(PodId),
}

/// The youngest sandbox of each address.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<IpAddr, Claim>);

impl Claims {
    /// The sandbox is dialled at this address.
    pub(super) fn dialled(&mut self, vm: IpAddr, claim: Claim) -> Verdict {
        let verdict = match self.0.get(&vm) {
            None => Verdict::Owner,
            Some(owner) if owner.id == claim.id => Verdict::Owner,
            Some(owner) if owner.is_younger_than(&claim) => return Verdict::Zombie(owner.id.clone()),
            Some(owner) => Verdict::Taken(owner.id.clone()),
        };
        self.0.insert(vm, claim);
        if self.0.len() > ADDRESSES_MAX {
            self.forget_oldest();
        }
        verdict
    }

    /// A quarter at once, so that it costs little per address.
    fn forget_oldest(&mut self) {
        let mut ages: Vec<SystemTime> = self.0.values().map(|claim| claim.written).collect();
        let (_, limit, _) = ages.select_nth_unstable(ADDRESSES_MAX / 4);
        let limit = *limit;
        self.0.retain(|_, claim| claim.written > limit);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    fn claim(id: &str, seconds: u64) -> Claim {
        Claim { written: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds), id: id.parse().unwrap() }
    }

    fn vm(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(number).into()
    }

    #[test]
    fn the_youngest_sandbox_has_the_address() {
        let mut claims = Claims::default();
        let (old, young) = (claim("old", 1), claim("young", 2));
        assert_eq!(claims.dialled(vm(1), old.clone()), Verdict::Owner);
        assert_eq!(claims.dialled(vm(1), old.clone()), Verdict::Owner);
        assert_eq!(claims.dialled(vm(1), young.clone()), Verdict::Taken(old.id.clone()));
        assert_eq!(claims.dialled(vm(1), old.clone()), Verdict::Zombie(young.id.clone()));
        assert_eq!(claims.dialled(vm(1), young), Verdict::Owner);
        assert_eq!(claims.dialled(vm(2), old), Verdict::Owner, "elsewhere");
    }

    #[test]
    fn two_of_one_age_do_not_alternate() {
        let mut claims = Claims::default();
        let (a, b) = (claim("a", 1), claim("b", 1));
        assert_eq!(claims.dialled(vm(1), b.clone()), Verdict::Owner);
        for _ in 0..3 {
            assert_eq!(claims.dialled(vm(1), a.clone()), Verdict::Zombie(b.id.clone()));
            assert_eq!(claims.dialled(vm(1), b.clone()), Verdict::Owner);
        }
    }

    #[test]
    fn addresses_are_bounded_and_the_youngest_stay() {
        let mut claims = Claims::default();
        for number in 0..20_000_u32 {
            claims.dialled(vm(number), claim(&format!("p{number}"), number.into()));
            assert!(claims.0.len() <= ADDRESSES_MAX);
        }
        assert!(claims.0.contains_key(&vm(19_999)));
        assert!(!claims.0.contains_key(&vm(0)));
    }

    #[test]
    fn many_of_one_age_are_bounded_too() {
        let mut claims = Claims::default();
        for number in 0..10_000_u32 {
            claims.dialled(vm(number), claim(&format!("p{number}"), 1));
            assert!(claims.0.len() <= ADDRESSES_MAX);
        }
    }
}
