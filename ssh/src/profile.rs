//! The SSH profile: RFC 4253 and 4254 with few algorithms.

use std::borrow::Cow;

use russh::keys::{Algorithm, PrivateKey};
use russh::{Limits, MethodKind, MethodSet, Preferred, SshId, cipher, client, compression, kex, mac, server};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{
    AUTH_TRIES, KEEPALIVE, KEEPALIVE_TRIES, MESSAGE_MAX, REKEY_TIME, SILENCE, SSH_WINDOW,
};

/// Messages of one channel that may wait for its task, in the Kubernetes phase. With credits the task takes them at
/// once; a peer without credits can fill the queue of each stream.
const CHANNEL_QUEUE: usize = 32;
/// Messages of one channel that may wait for its task, in the Attestation phase, where peers are unproven.
const UNAUTHENTICATED_CHANNEL_QUEUE: usize = 4;

/// Messages of all channels together that may wait for the session. (russh's client has a fixed 10.) A longer queue
/// only makes small messages wait behind bulk data, and pollutes the caches.
const SESSION_QUEUE: usize = 4;

/// First line that both ends send (RFC 4253 4.2).
const IDENTIFICATION: &str = concat!("SSH-2.0-SecureComms_", env!("CARGO_PKG_VERSION"));

/// Algorithms of both ends. Without the four extension names in the list, russh silently turns strict key exchange off.
fn preferred() -> Preferred {
    const KEX: &[kex::Name] = &[
        kex::MLKEM768X25519_SHA256,
        kex::CURVE25519,
        kex::EXTENSION_SUPPORT_AS_CLIENT,
        kex::EXTENSION_SUPPORT_AS_SERVER,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
    ];
    Preferred {
        kex: Cow::Borrowed(KEX),
        key: Cow::Borrowed(&[Algorithm::Ed25519]),
        host_key_certificates: Cow::Borrowed(&[]),
        cipher: Cow::Borrowed(&[cipher::AES_256_GCM, cipher::CHACHA20_POLY1305]),
        // Never used, because both ciphers are AEADs. Paramiko and libssh give up on an empty list.
        mac: Cow::Borrowed(&[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM]),
        compression: Cow::Borrowed(&[compression::NONE]),
    }
}

fn limits(rekey_bytes: usize) -> Limits {
    Limits { rekey_write_limit: rekey_bytes, rekey_read_limit: rekey_bytes, rekey_time_limit: REKEY_TIME }
}

/// Configuration of the agent's server in a phase. `rekey_bytes` is the limit in each direction, in bytes.
pub fn server(phase: PhaseName, host_key: PrivateKey, rekey_bytes: usize) -> server::Config {
    let methods: &[MethodKind] = &[MethodKind::None, MethodKind::PublicKey];
    server::Config {
        server_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        methods: MethodSet::from(methods),
        // No delay is needed: the answer depends on public keys only, which are compared in constant time.
        auth_rejection_time: std::time::Duration::ZERO,
        auth_rejection_time_initial: None,
        keys: vec![host_key],
        limits: limits(rekey_bytes),
        window_size: SSH_WINDOW,
        maximum_packet_size: MESSAGE_MAX as u32,
        event_buffer_size: SESSION_QUEUE,
        channel_buffer_size: match phase {
            PhaseName::Attestation => UNAUTHENTICATED_CHANNEL_QUEUE,
            PhaseName::Kubernetes => CHANNEL_QUEUE,
        },
        preferred: preferred(),
        max_auth_attempts: AUTH_TRIES,
        inactivity_timeout: Some(SILENCE),
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: KEEPALIVE_TRIES,
        nodelay: true,
        ..server::Config::default()
    }
}

/// Configuration of the adaptor's client. `rekey_bytes` is the limit in each direction, in bytes.
pub fn client(rekey_bytes: usize) -> client::Config {
    client::Config {
        client_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        limits: limits(rekey_bytes),
        window_size: SSH_WINDOW,
        maximum_packet_size: MESSAGE_MAX as u32,
        channel_buffer_size: CHANNEL_QUEUE,
        preferred: preferred(),
        inactivity_timeout: Some(SILENCE),
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: KEEPALIVE_TRIES,
        nodelay: true,
        ..client::Config::default()
    }
}
