//! The SSH profile: RFC 4253 and 4254 with few algorithms.

use std::borrow::Cow;

use russh::keys::{Algorithm, PrivateKey};
use russh::{
    AlgorithmKind, Limits, MethodKind, MethodSet, Preferred, SshId, cipher, client, compression, kex, mac,
    server,
};
use secure_comms_protocol::PhaseName;
use secure_comms_protocol::limits::{
    AUTH_TRIES, KEEPALIVE, KEEPALIVE_TRIES, MESSAGE_MAX, REKEY_TIME, SILENCE, SSH_WINDOW,
};

/// Messages of one channel that may wait for its task, in the Kubernetes phase. With credits the task takes them at
/// once; a peer without credits can fill the queue of each stream.
const CHANNEL_QUEUE: usize = 32;
/// Messages of one channel that may wait for its task, in the Attestation phase, where peers are unproven.
const UNAUTHENTICATED_CHANNEL_QUEUE: usize = 4;

/// Messages of all channels together that may wait for the SSH session. (russh's client has a fixed 10.) A longer queue
/// only makes small messages wait behind bulk data, and pollutes the caches.
const SESSION_QUEUE: usize = 4;

/// Most bytes that are quoted of a peer's list of algorithms.
const OFFER_MAX: usize = 200;

/// First line that both ends send (RFC 4253 4.2).
const IDENTIFICATION: &str = concat!("SSH-2.0-SecureComms_", env!("CARGO_PKG_VERSION"));

/// Which key exchange an end offers and accepts, first and in each renewal of the session keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// Post-quantum where the other end has it, else X25519.
    #[default]
    Any,
    /// Post-quantum only: who records the traffic can't read it with a quantum computer of later years.
    PostQuantum,
}

impl KeyExchange {
    /// The one that an end uses for which post-quantum key exchange is required, or not.
    pub fn post_quantum(required: bool) -> Self {
        if required { Self::PostQuantum } else { Self::Any }
    }

    /// All of its names. Without the four extension names in the list, russh silently turns strict key exchange off.
    fn names(self) -> &'static [kex::Name] {
        const ANY: &[kex::Name] = &[
            kex::MLKEM768X25519_SHA256,
            kex::CURVE25519,
            kex::EXTENSION_SUPPORT_AS_CLIENT,
            kex::EXTENSION_SUPPORT_AS_SERVER,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
        ];
        const POST_QUANTUM: &[kex::Name] = &[
            kex::MLKEM768X25519_SHA256,
            kex::EXTENSION_SUPPORT_AS_CLIENT,
            kex::EXTENSION_SUPPORT_AS_SERVER,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
        ];
        match self {
            Self::Any => ANY,
            Self::PostQuantum => POST_QUANTUM,
        }
    }
}

/// Says what two ends have not in common, if that is why an SSH session failed; none for other errors. What the peer offered is
/// quoted as one line of ASCII and cut: anyone may have said it. `required_by` is the setting of this end that requires
/// post-quantum key exchange.
pub fn nothing_in_common(error: &russh::Error, required_by: &str) -> Option<String> {
    let russh::Error::NoCommonAlgo { kind, ours, theirs } = error else { return None };
    let is_extension = |name: &str| name.starts_with("ext-info-") || name.starts_with("kex-strict-");
    let ours: Vec<_> = ours.iter().map(String::as_str).filter(|name| !is_extension(name)).collect();
    let theirs: Vec<_> = theirs.iter().map(String::as_str).filter(|name| !is_extension(name)).collect();
    let offered = theirs.join(",");
    let shown = offered.get(..offered.floor_char_boundary(OFFER_MAX)).unwrap_or_default().escape_default();
    let more = if offered.len() > OFFER_MAX { "..." } else { "" };
    let post_quantum = kex::MLKEM768X25519_SHA256.as_ref();
    Some(if matches!(kind, AlgorithmKind::Kex) && ours == [post_quantum] {
        format!(
            "the other end offers no post-quantum key exchange: {required_by} requires {post_quantum} here, it offers \
             {shown}{more}; update it, or see who changes the connection on its way"
        )
    } else {
        format!(
            "the other end has no {} algorithm of ours ({}): it offers {shown}{more}",
            name(kind),
            ours.join(",")
        )
    })
}

fn name(kind: &AlgorithmKind) -> &'static str {
    match kind {
        AlgorithmKind::Kex => "Kex",
        AlgorithmKind::Key => "Key",
        AlgorithmKind::Cipher => "Cipher",
        AlgorithmKind::Compression => "Compression",
        AlgorithmKind::Mac => "Mac",
    }
}

/// Algorithms of both ends.
fn preferred(kex: KeyExchange) -> Preferred {
    Preferred {
        kex: Cow::Borrowed(kex.names()),
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
pub fn server(
    phase: PhaseName,
    host_key: PrivateKey,
    rekey_bytes: usize,
    kex: KeyExchange,
) -> server::Config {
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
        preferred: preferred(kex),
        max_auth_attempts: AUTH_TRIES,
        inactivity_timeout: Some(SILENCE),
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: KEEPALIVE_TRIES,
        nodelay: true,
        ..server::Config::default()
    }
}

/// Configuration of the adaptor's client. `rekey_bytes` is the limit in each direction, in bytes.
pub fn client(rekey_bytes: usize, kex: KeyExchange) -> client::Config {
    client::Config {
        client_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        limits: limits(rekey_bytes),
        window_size: SSH_WINDOW,
        maximum_packet_size: MESSAGE_MAX as u32,
        channel_buffer_size: CHANNEL_QUEUE,
        preferred: preferred(kex),
        inactivity_timeout: Some(SILENCE),
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: KEEPALIVE_TRIES,
        nodelay: true,
        ..client::Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(kind: AlgorithmKind, ours: &[&str], theirs: &[&str]) -> Option<String> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let error = russh::Error::NoCommonAlgo { kind, ours: names(ours), theirs: names(theirs) };
        nothing_in_common(&error, "-require")
    }

    #[test]
    fn an_end_without_post_quantum_key_exchange_is_named_as_such() {
        let ours = ["mlkem768x25519-sha256", "ext-info-c", "kex-strict-s-v00@openssh.com"];
        let text = nothing(AlgorithmKind::Kex, &ours, &["a", "b\u{1b}\n", "ext-info-s"]).unwrap();
        assert_eq!(
            text,
            "the other end offers no post-quantum key exchange: -require requires mlkem768x25519-sha256 here, it offers \
             a,b\\u{1b}\\n; update it, or see who changes the connection on its way"
        );
        // Not a matter of the setting.
        let text =
            nothing(AlgorithmKind::Kex, &["mlkem768x25519-sha256", "curve25519-sha256"], &["x"]).unwrap();
        assert_eq!(
            text,
            "the other end has no Kex algorithm of ours (mlkem768x25519-sha256,curve25519-sha256): it offers x"
        );
        let text = nothing(AlgorithmKind::Cipher, &["mlkem768x25519-sha256"], &["x"]).unwrap();
        assert!(text.starts_with("the other end has no Cipher algorithm of ours"), "{text}");
        assert_eq!(nothing_in_common(&russh::Error::Kex, "-require"), None);
    }

    #[test]
    fn what_a_stranger_offers_is_cut() {
        let long = "\u{e9}".repeat(100_000);
        for ours in [&["mlkem768x25519-sha256"][..], &["a"]] {
            let text = nothing(AlgorithmKind::Kex, ours, &[&long]).unwrap();
            assert!(text.len() < 1500 && text.contains("..."), "{} bytes", text.len());
        }
    }

    #[test]
    fn strict_key_exchange_stays_on_whatever_is_required() {
        for policy in [KeyExchange::Any, KeyExchange::PostQuantum] {
            let names = policy.names();
            for extension in [
                kex::EXTENSION_SUPPORT_AS_CLIENT,
                kex::EXTENSION_SUPPORT_AS_SERVER,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
            ] {
                assert!(names.contains(&extension), "{policy:?}");
            }
            assert_eq!(names.contains(&kex::CURVE25519), policy == KeyExchange::Any);
        }
    }
}
