//! The SSH configuration of the host key that is shown now, built once for each generation.

use std::sync::{Arc, Mutex, PoisonError};

use russh::server::Config;
use secure_comms_ssh::profile::{self, KeyExchange};

use crate::access::policy::Admission;

/// Builds and caches SSH configurations.
#[derive(Debug)]
pub(super) struct HostConfigs {
    rekey_bytes: usize,
    kex: KeyExchange,
    newest: Mutex<Option<(u64, Arc<Config>)>>,
}

impl HostConfigs {
    /// Configurations that ask for new session keys after `rekey_bytes` bytes.
    pub(super) fn new(rekey_bytes: usize, kex: KeyExchange) -> Self {
        Self { rekey_bytes, kex, newest: Mutex::default() }
    }

    /// The configuration of an admission.
    pub(super) fn get(&self, admission: &Admission) -> Arc<Config> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        match &*newest {
            Some((generation, config)) if *generation == admission.generation => config.clone(),
            _ => {
                let host_key = (*admission.host_key).clone();
                let config = Arc::new(profile::server(admission.phase, host_key, self.rekey_bytes, self.kex));
                *newest = Some((admission.generation, config.clone()));
                config
            }
        }
    }
}
