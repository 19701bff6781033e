//! What all pods of an adaptor have in common.

use std::fmt;
use std::sync::Arc;

use secure_comms_protocol::{InboundTag, OutboundTag};

use crate::kbs::KbsClient;
use crate::key_source::KeySource;
use crate::pod::Observer;
use crate::store::Store;

/// What all pods of an adaptor have in common.
#[derive(Clone)]
pub struct Config {
    /// Inbounds of each pod, KATAAGENT included. All pods share the list, so a fixed port or path serves one pod only.
    pub inbounds: Vec<InboundTag>,
    /// Outbounds of each pod, KBS included.
    pub outbounds: Vec<OutboundTag>,
    /// Bytes in one direction after which the session keys of a connection are renewed.
    pub rekey_bytes: usize,
    /// Whether only post-quantum key exchange is offered and accepted, in both phases.
    pub require_pq: bool,
    /// Receives every event of every pod.
    pub observer: Observer,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("inbounds", &self.inbounds)
            .field("outbounds", &self.outbounds)
            .finish_non_exhaustive()
    }
}

/// The store, the KBS and the configuration.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Arc<dyn Store>,
    pub(super) key_source: KeySource<KbsClient>,
    pub(super) config: Config,
}
