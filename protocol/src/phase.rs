//! The two phases of a connection, as values and as types.

use core::fmt;

use serde::{Deserialize, Serialize};

/// Phase of a connection or a tunnel as a value, for logs, user names and messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseName {
    /// Neither end is authenticated; only the KBS's own protocol is trusted.
    Attestation,
    /// Both ends are authenticated with the keys from the KBS or the user data.
    Kubernetes,
}

impl PhaseName {
    /// SSH user name of this phase.
    pub const fn user(self) -> &'static str {
        match self {
            Self::Attestation => "attestation",
            Self::Kubernetes => "kubernetes",
        }
    }

    /// Phase of an SSH user name; none for any other name.
    pub fn from_user(user: &str) -> Option<Self> {
        [Self::Attestation, Self::Kubernetes].into_iter().find(|phase| phase.user() == user)
    }
}

impl fmt::Display for PhaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attestation => "Attestation",
            Self::Kubernetes => "Kubernetes",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Attestation {}
    impl Sealed for super::Kubernetes {}
}

/// Phase as a type, so that code of one phase does not compile with objects of the other.
pub trait Phase: sealed::Sealed + Copy + fmt::Debug + Send + Sync + 'static {
    /// This phase as a value.
    const NAME: PhaseName;
}

/// The Attestation phase as a type.
#[derive(Clone, Copy, Debug)]
pub struct Attestation;

/// The Kubernetes phase as a type.
#[derive(Clone, Copy, Debug)]
pub struct Kubernetes;

impl Phase for Attestation {
    const NAME: PhaseName = PhaseName::Attestation;
}

impl Phase for Kubernetes {
    const NAME: PhaseName = PhaseName::Kubernetes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_name_selects_exactly_one_phase() {
        assert_eq!(PhaseName::from_user("attestation"), Some(PhaseName::Attestation));
        assert_eq!(PhaseName::from_user("kubernetes"), Some(PhaseName::Kubernetes));
        for other in ["", "Kubernetes", "root", "kubernetes "] {
            assert_eq!(PhaseName::from_user(other), None, "{other:?}");
        }
    }
}
