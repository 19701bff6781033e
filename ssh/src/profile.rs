//! The SSH profile: plain RFC 4253 and 4254, few algorithms.

use std::borrow::Cow;

use russh::keys::{Algorithm, PrivateKey};
use russh::{Limits, MethodKind, MethodSet, Preferred, SshId, cipher, client, compression, kex, server};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{
    AUTH_TRIES, KEEPALIVE, KEEPALIVE_TRIES, MESSAGE_MAX, REKEY_TIME, SILENCE, SSH_WINDOW,
};

/// Messages of one channel that may wait for its task. With credits the task takes them at once; a peer without
/// can fill this, for each of its streams.
const CHANNEL_QUEUE: usize = 32;
/// The same while strangers are let in.
const UNAUTHENTICATED_CHANNEL_QUEUE: usize = 4;

/// Messages of all channels together that wait for the session (russh's client has 10, and no way to say otherwise). More
/// than it takes to keep it busy only makes a small message wait behind bulk data, and spoils the caches.
const SESSION_QUEUE: usize = 4;

/// The first line that both ends send (RFC 4253 4.2).
const IDENTIFICATION: &str = concat!("SSH-2.0-SecureComms_", env!("CARGO_PKG_VERSION"));

/// The algorithms. The four extension names must be in the list: without them russh turns strict key exchange
/// off without a word.
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
        // Both ciphers authenticate by themselves.
        mac: Cow::Borrowed(&[]),
        compression: Cow::Borrowed(&[compression::NONE]),
    }
}

fn limits(rekey_bytes: usize) -> Limits {
    Limits { rekey_write_limit: rekey_bytes, rekey_read_limit: rekey_bytes, rekey_time_limit: REKEY_TIME }
}

/// The agent's side in a phase; `host_key` is what it proves itself with.
pub fn server(phase: PhaseName, host_key: PrivateKey, rekey_bytes: usize) -> server::Config {
    let methods: &[MethodKind] = &[MethodKind::None, MethodKind::PublicKey];
    server::Config {
        server_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        methods: MethodSet::from(methods),
        // The answer depends on public keys alone, compared in constant time: no delay hides anything.
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

/// The adaptor's side.
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
