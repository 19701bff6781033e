//! Where the pod VMs get their keys.

/// Where the pod VMs get their keys. `K` is what the holder needs for a KBS: its settings, a client, or the tunnels of
/// the Attestation phase.
#[derive(Clone, Debug)]
pub enum KeySource<K> {
    /// From the KBS, after attestation. The adaptor publishes them there.
    Kbs(K),
    /// From their user data. These VMs have no Attestation phase.
    UserData,
}

impl<K> KeySource<K> {
    /// The same source with `K` by reference.
    pub fn as_ref(&self) -> KeySource<&K> {
        match self {
            Self::Kbs(kbs) => KeySource::Kbs(kbs),
            Self::UserData => KeySource::UserData,
        }
    }

    /// The same source with another `K`.
    pub fn map<L>(self, map: impl FnOnce(K) -> L) -> KeySource<L> {
        match self {
            Self::Kbs(kbs) => KeySource::Kbs(map(kbs)),
            Self::UserData => KeySource::UserData,
        }
    }

    /// Whether the VMs attest, and so have an Attestation phase.
    pub(crate) fn attests(&self) -> bool {
        matches!(self, Self::Kbs(_))
    }
}
