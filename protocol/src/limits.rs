//! Every wait and every bound of the protocol, in one place.

use core::time::Duration;

/// The TCP port the agent listens on unless told otherwise.
pub const SSH_PORT: u16 = 2222;
/// The version of the control protocol in `hello`.
pub const PROTOCOL_VERSION: u32 = 1;
/// The name of the SSH subsystem that carries the control messages.
pub const CONTROL_SUBSYSTEM: &str = "secure-comms";

/// The longest control line, in bytes, without its newline.
pub const CONTROL_LINE_MAX: usize = 64 * 1024;
/// The largest message on a stream, in bytes: russh's `maximum_packet_size`, so that it never splits one.
pub const MESSAGE_MAX: usize = 32 * 1024;
/// What the shortest message costs, in bytes of credit, so that a flood of small messages is bounded too.
pub const MESSAGE_COST_MIN: u32 = 512;
/// The SSH channel window of a connection, in bytes. Credits govern; this only has to be larger than twice
/// any stream's credit, and half of the most that may be in flight while we rekey.
pub const SSH_WINDOW: u32 = 64 * 1024 * 1024;
/// Data in either direction after which a side asks for new keys, in bytes.
pub const REKEY_BYTES: usize = 32 * 1024 * 1024 * 1024;
/// Time after which a side asks for new keys.
pub const REKEY_TIME: Duration = Duration::from_secs(24 * 3600);

/// How much a connection may hold for streams whose readers are slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditLimits {
    /// What each stream is granted when it opens, in bytes; the value in `hello`.
    pub initial: u32,
    /// What a stream that is used grows to, whatever the line is like, in bytes.
    pub stream_soft_max: u32,
    /// What one may grow to that uses its window up as fast as the round trip allows, in bytes.
    pub stream_max: u32,
    /// What all streams together may have grown by, in bytes.
    pub growth_pool: u32,
    /// How many streams may be open at a time.
    pub streams: usize,
}

impl CreditLimits {
    /// Nobody yet: at most 640 KiB are held for all streams of the connection.
    pub const ATTESTATION: Self = Self {
        initial: 32 * 1024,
        stream_soft_max: 160 * 1024,
        stream_max: 160 * 1024,
        growth_pool: 128 * 1024,
        streams: 16,
    };
    /// Proven: at most 64 MiB is held for all streams of the connection.
    pub const KUBERNETES: Self = Self {
        initial: 32 * 1024,
        stream_soft_max: 512 * 1024,
        stream_max: 16 * 1024 * 1024,
        growth_pool: 32 * 1024 * 1024,
        streams: 1024,
    };

    /// The most that may be in flight towards us on one connection, in bytes.
    pub const fn held_max(&self) -> usize {
        self.streams * self.initial as usize + self.growth_pool as usize
    }
}

/// A stream that needs longer than this to use its window up gives half back of what it has beyond the usual.
pub const WINDOW_UNUSED: Duration = Duration::from_secs(10);

/// A new TCP connection is given up after this long.
pub const TCP_CONNECT: Duration = Duration::from_secs(5);
/// How long a peer may take to authenticate, from its TCP connect on.
pub const AUTHENTICATE: Duration = Duration::from_secs(10);
/// Authentication tries of one connection.
pub const AUTH_TRIES: usize = 6;
/// Connections that have not authenticated yet; at the limit a random one makes room.
pub const UNAUTHENTICATED_MAX: usize = 16;
/// Connections that wait for a place among these, or have not said their first line; at the limit a random one makes room.
pub const WAITING_MAX: usize = 256;
/// A connection that has said nothing for this long is taken for one that waits for our first line.
pub const FIRST_LINE: Duration = Duration::from_secs(2);
/// While there is no place, those that wait push one another out this often, so that each has time for a handshake.
pub const ADMISSION_PACE: Duration = Duration::from_millis(5);
/// Authenticated attestation peers; at the limit a random one makes room.
pub const ATTESTATION_PEERS_MAX: usize = 8;
/// An idle connection is probed this often.
pub const KEEPALIVE: Duration = Duration::from_secs(5);
/// Probes without any answer after which a connection is dead.
pub const KEEPALIVE_TRIES: usize = 3;
/// A connection on which nothing arrives, or no write proceeds, for this long is dead.
pub const SILENCE: Duration = Duration::from_secs(20);
/// How long a peer whose control channel is open may take to say `hello`.
pub const HELLO: Duration = Duration::from_secs(5);
/// How long a client of an inbound waits for a peer before it is closed.
pub const INBOUND_WAIT: Duration = Duration::from_secs(30);
/// How long an outbound tries its server.
pub const OUTBOUND_CONNECT: Duration = Duration::from_secs(10);
/// How long the agent tries the kata agent's socket, which may come up after it.
pub const KATA_AGENT_CONNECT: Duration = Duration::from_secs(150);
/// The longest data of a ttrpc frame, in bytes, without the header.
pub const TTRPC_DATA_MAX: usize = 4 * 1024 * 1024;
/// Requests to the kata agent that one tunnel may hold back at a time.
pub const HELD_REQUESTS_MAX: usize = 64;
/// What the requests that one tunnel holds back may take up together, in bytes.
pub const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Answers of our own that may wait on one tunnel until its client takes them.
pub const REPLIES_MAX: usize = 64;
/// How long a container waits until its annotated volumes are mounted.
pub const VOLUME_MOUNT: Duration = Duration::from_secs(180);
/// A channel open that is not answered within this long is given up.
pub const CHANNEL_OPEN: Duration = Duration::from_secs(160);
/// A stream that the other end has closed is dropped when its local reader takes nothing for this long.
pub const FLUSH: Duration = Duration::from_secs(30);
/// Clients of one inbound that may wait or be served at a time.
pub const INBOUND_CLIENTS_MAX: usize = 1024;

/// The first pause between tries that repeat; it doubles up to [`RETRY_MAX`], with jitter.
pub const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest pause between tries that repeat.
pub const RETRY_MAX: Duration = Duration::from_secs(5);

/// A fetch of one resource through `api-server-rest`.
pub const KEY_FETCH: Duration = Duration::from_secs(75);
/// A KBS stream that gets no first byte from its attestation peer within this long is closed, in the first attempts.
pub const KBS_FIRST_BYTE_MIN: Duration = Duration::from_secs(5);
/// The same after attempts that ended so: each gives the next one twice as long, up to this.
pub const KBS_FIRST_BYTE: Duration = Duration::from_secs(20);
/// A KBS stream on which nothing moves for this long after its first byte is closed, so that a question that got lost is asked
/// again; after attempts in which that was so the next one has twice as long, up to [`KEY_FETCH`].
pub const KBS_PAUSE_MIN: Duration = Duration::from_secs(10);
/// `keys` messages are repeated at least this often while keys are awaited.
pub const KEYS_REPORT: Duration = Duration::from_secs(15);
/// Attestation peers get this long to take `upgrade` and leave.
pub const UPGRADE_DRAIN: Duration = Duration::from_secs(1);
/// Without an authenticated worker node for this long, a fresh agent lets attestation peers in again.
pub const FIRST_LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a try to set up the pod network waits for the VM's own: DHCP may be late.
pub const POD_NETWORK_WAIT: Duration = Duration::from_secs(180);
/// The pod network is undone within this long after SIGTERM, or by the next start.
pub const POD_NETWORK_UNDO: Duration = Duration::from_secs(5);
/// Streams get this long to finish after SIGTERM.
pub const SHUTDOWN_DRAIN: Duration = Duration::from_secs(3);
/// While the agent waits for its daemon config, systemd is asked for this much more time, twice as often.
pub const START_EXTENSION: Duration = Duration::from_secs(60);
/// The largest key resource, in bytes.
pub const KEY_MAX: usize = 64 * 1024;
