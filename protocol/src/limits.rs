//! Every timeout and every limit of the protocol, in one place.

use core::time::Duration;

/// Default TCP port of the agent.
pub const SSH_PORT: u16 = 2222;
/// Version of the control protocol in `hello`.
pub const PROTOCOL_VERSION: u32 = 2;
/// First version of it with sessions.
pub const SESSIONS_VERSION: u32 = 2;
/// Time for which an agent keeps a session that has no connection.
pub const SESSION_LINGER: Duration = Duration::from_secs(60);
/// Time for which a new stream waits for its lane before it uses the main one.
pub const LANE_WAIT: Duration = Duration::from_secs(1);
/// Name of the SSH subsystem that carries the control messages.
pub const CONTROL_SUBSYSTEM: &str = "secure-comms";

/// Name of the SSH subsystem that answers with the agent's status.
pub const STATUS_SUBSYSTEM: &str = "secure-comms-status";

/// Longest control line, in bytes, without its newline.
pub const CONTROL_LINE_MAX: usize = 64 * 1024;
/// Largest message on a stream, in bytes: russh's `maximum_packet_size`, so that it never splits one.
pub const MESSAGE_MAX: usize = 32 * 1024;
/// Cost of the shortest message, in bytes of credit, so that credit limits a flood of small messages too.
pub const MESSAGE_COST_MIN: u32 = 512;
/// SSH window of a channel, in bytes. Credits are the real limit. The window must be more than twice any stream's
/// credit, and more than half of the bytes that may be in flight during a rekey.
pub const SSH_WINDOW: u32 = 64 * 1024 * 1024;
/// Data in either direction after which an end starts a rekey, in bytes.
pub const REKEY_BYTES: usize = 32 * 1024 * 1024 * 1024;
/// Time after which an end starts a rekey.
pub const REKEY_TIME: Duration = Duration::from_secs(24 * 3600);

/// Limits of the memory that a connection may hold for streams whose readers are slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditLimits {
    /// Credit of each new stream, in bytes; the value in `hello`.
    pub initial: u32,
    /// Size to which any stream in use may grow its window, in bytes. Beyond it a window grows only if it limits the
    /// throughput of its stream.
    pub stream_soft_max: u32,
    /// Largest window of a stream, in bytes. Only a stream that uses its window up within about a round trip grows to
    /// it.
    pub stream_max: u32,
    /// Growth of all windows together, beyond their initial credit, in bytes.
    pub growth_pool: u32,
    /// Number of streams that may be open at a time, of both ends together.
    pub streams: usize,
    /// Most of them that one end may open, besides the reserve.
    pub opener_streams: usize,
    /// Of `streams`, those for the tunnel to the kata agent, opened by the adaptor. No others may take them.
    pub reserved: usize,
}

/// A tunnel may open another stream while it has fewer than this many times those that its end may still open.
pub const TUNNEL_SHARE: usize = 2;

impl CreditLimits {
    /// Attestation phase, where the peer is unproven: at most 640 KiB for all streams of a connection.
    pub const ATTESTATION: Self = Self {
        initial: 32 * 1024,
        stream_soft_max: 160 * 1024,
        stream_max: 160 * 1024,
        growth_pool: 128 * 1024,
        streams: 16,
        opener_streams: 16,
        reserved: 0,
    };
    /// Kubernetes phase: at most 64 MiB for all streams of a connection.
    pub const KUBERNETES: Self = Self {
        initial: 32 * 1024,
        stream_soft_max: 512 * 1024,
        stream_max: 16 * 1024 * 1024,
        growth_pool: 32 * 1024 * 1024,
        streams: 1024,
        opener_streams: 768,
        reserved: 64,
    };

    /// Most streams of one tunnel, while no other has any: those beyond the reserve, if it has one.
    pub const fn tunnel_streams(&self) -> usize {
        (self.opener_streams * TUNNEL_SHARE).div_ceil(TUNNEL_SHARE + 1)
    }

    /// Most bytes that may be in flight to us on one connection.
    pub const fn held_max(&self) -> usize {
        self.streams * self.initial as usize + self.growth_pool as usize
    }
}

/// A stream that needs longer than this to use its window up gives back half of its window beyond the soft maximum.
pub const WINDOW_UNUSED: Duration = Duration::from_secs(10);

/// Timeout of looking up a host name, whatever the name servers do.
pub const NAME_LOOKUP: Duration = Duration::from_secs(5);
/// Time for which one kind of address is waited for when the other kind has arrived, or the name is said not to exist.
pub const NAME_GRACE: Duration = Duration::from_millis(500);
/// Longest delay before a question goes to the next name server, too; a failure starts the next one at once.
pub const NAME_SERVER_STAGGER: Duration = Duration::from_millis(500);
/// Addresses of one host name that are tried.
pub const ADDRESSES_MAX: usize = 16;
/// Timeout of a TCP connect.
pub const TCP_CONNECT: Duration = Duration::from_secs(5);
/// Delay before the next address is tried, too (RFC 8305 8); a failure starts the next one at once.
pub const CONNECT_STAGGER: Duration = Duration::from_millis(250);
/// Timeout of the handshake, from the TCP connect to the end of authentication.
pub const AUTHENTICATE: Duration = Duration::from_secs(10);
/// Refused authentication attempts of one connection: six keys, and the method `none`, which clients ask first.
pub const AUTH_TRIES: usize = 7;
/// Connections that have not authenticated yet. At the limit one from the source with the most connections is evicted.
pub const UNAUTHENTICATED_MAX: usize = 16;
/// Of these places, those that are kept for sources from which a worker node has logged in.
pub const UNAUTHENTICATED_KEPT: usize = 4;
/// Connections that wait for one of these places, or have not sent their first line. At the limit one from the source
/// with the most connections is evicted.
pub const WAITING_MAX: usize = 256;
/// Of these, those that are kept for sources from which a worker node has logged in.
pub const WAITING_KEPT: usize = 16;
/// A client that has sent nothing for this long is assumed to wait for our first line.
pub const FIRST_LINE: Duration = Duration::from_secs(2);
/// Interval of evictions among the connections that wait for a place, so that each admitted one has time for a
/// handshake.
pub const ADMISSION_PACE: Duration = Duration::from_millis(5);
/// Peers in the Attestation phase. At the limit one from the source with the longest penalty is evicted, and among equals
/// one from the source with the most connections.
pub const ATTESTATION_PEERS_MAX: usize = 8;
/// Of these seats, those that are kept for sources without a failed attempt.
pub const ATTESTATION_PEERS_KEPT: usize = 2;
/// Sources whose penalties are remembered.
pub const SOURCES_MAX: usize = 512;
/// Penalty of a source for each login to the Attestation phase; time works it off.
pub const LOGIN_PENALTY: Duration = Duration::from_secs(1);
/// Penalty of a source for the first attempt in which its peer was silent, took long or left; each further one costs twice
/// as much.
pub const FAILURE_PENALTY: Duration = Duration::from_secs(15);
/// Longest penalty: a source comes behind the others for this long at most.
pub const PENALTY_MAX: Duration = Duration::from_secs(60);
/// Time in line that a source does not lose by its logins.
pub const PENALTY_CREDIT: Duration = Duration::from_secs(10);
/// Time after which the failed attempts of a source are forgotten, if no further one follows.
pub const FAILURE_MEMORY: Duration = Duration::from_secs(600);
/// Logins to the Kubernetes phase that have not said a `hello` with a pod id, such as a person's `ssh`. At the limit one
/// from the source with the most logins is evicted.
pub const GUESTS_MAX: usize = 8;
/// Time that such a login may last.
pub const GUEST_TIME: Duration = Duration::from_secs(3600);
/// Longest status, in bytes.
pub const STATUS_MAX: usize = 128 * 1024;
/// Inbounds, and outbounds, in a status.
pub const STATUS_TUNNELS_MAX: usize = 64;
/// Statuses that are put together at a time; others wait.
pub const STATUS_REPORTS_MAX: usize = 2;
/// Time for a status, from the request to the last byte.
pub const STATUS_TIME: Duration = Duration::from_secs(15);
/// Time that the server of an outbound has to accept the connection of a status.
pub const PROBE: Duration = Duration::from_secs(1);
/// Lines of the agent's log that are kept for the operator: warnings, errors and chosen events.
pub const LOG_KEPT: usize = 50;
/// Longest text of such a line, in bytes.
pub const LOG_TEXT_MAX: usize = 500;
/// `log` messages that are sent together.
pub const LOG_BATCH: usize = 8;
/// Pause after each batch of `log` messages.
pub const LOG_PAUSE: Duration = Duration::from_secs(1);
/// Interval of liveness probes on an idle connection.
pub const KEEPALIVE: Duration = Duration::from_secs(5);
/// Number of unanswered probes after which a connection is dead.
pub const KEEPALIVE_TRIES: usize = 3;
/// A connection is dead if nothing arrives, or no write proceeds, for this long.
pub const SILENCE: Duration = Duration::from_secs(20);
/// Timeout of the peer's `hello`, from the opening of its control channel.
pub const HELLO: Duration = Duration::from_secs(5);
/// Time that a client of an inbound waits for a peer before it is closed.
pub const INBOUND_WAIT: Duration = Duration::from_secs(30);
/// Longest pause before a client without a place among the streams tries again.
pub const PLACE_RETRY_MAX: Duration = Duration::from_millis(500);
/// A wait that takes longer than this says what it is for.
pub const WAIT_REPORT: Duration = Duration::from_secs(1);
/// Interval at which it says so again, with the time left.
pub const WAIT_REPEAT: Duration = Duration::from_secs(15);
/// Timeout of connecting to the server of an outbound: of looking its name up, and of connecting to its addresses.
pub const OUTBOUND_CONNECT: Duration = Duration::from_secs(10);
/// Time for which the agent retries the kata agent's socket, which may appear after the agent starts.
pub const KATA_AGENT_CONNECT: Duration = Duration::from_secs(150);
/// Longest data of a ttrpc frame, in bytes, without the header.
pub const TTRPC_DATA_MAX: usize = 4 * 1024 * 1024;
/// Requests to the kata agent that one connection may hold back at a time, on all streams of the tunnel together.
pub const HELD_REQUESTS_MAX: usize = 64;
/// Total size of the requests that one connection holds back or assembles, in bytes.
pub const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Threads that look at the mounts of held requests, for all connections together. One may hang in a file system.
pub const MOUNT_THREADS_MAX: usize = 64;
/// Replies of the interceptor that may wait on one stream until its client takes them.
pub const REPLIES_MAX: usize = 4096;
/// Those that may wait on one connection, on all streams of the tunnel together.
pub const CONNECTION_REPLIES_MAX: usize = 4 * REPLIES_MAX;
/// Replies of the interceptor beyond this number on one stream, and beyond [`CONNECTION_REPLIES_WITH_TEXT_MAX`] on one
/// connection, have a code and no text.
pub const REPLIES_WITH_TEXT_MAX: usize = 64;
/// Replies with a text on one connection.
pub const CONNECTION_REPLIES_WITH_TEXT_MAX: usize = 1024;
/// Time that a container waits for its annotated volumes to be mounted.
pub const VOLUME_MOUNT: Duration = Duration::from_secs(180);
/// Time that the end of a sandbox waits for its cloud volumes to be unmounted. Half of the 60 s that a runtime gives it.
pub const VOLUMES_UNMOUNT: Duration = Duration::from_secs(30);
/// Timeout of a channel open.
pub const CHANNEL_OPEN: Duration = Duration::from_secs(160);
/// A stream that the other end has closed is dropped when its local reader takes no bytes for this long.
pub const FLUSH: Duration = Duration::from_secs(30);
/// Clients of one inbound that may wait or be served at a time; others wait in the kernel's queue. Fewer than the
/// streams of one tunnel, even while others have some, so that a client that is accepted is seldom refused.
pub const INBOUND_CLIENTS_MAX: usize = 384;

/// First backoff between retries; it doubles up to [`RETRY_MAX`], with jitter.
pub const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest backoff between retries.
pub const RETRY_MAX: Duration = Duration::from_secs(5);

/// Timeout of fetching one resource through `api-server-rest`.
pub const KEY_FETCH: Duration = Duration::from_secs(75);
/// Timeout of the first byte of a KBS stream from its attestation peer, in the first attempts.
pub const KBS_FIRST_BYTE_MIN: Duration = Duration::from_secs(5);
/// Longest timeout of the first byte of a KBS stream: each failed attempt of a source doubles it for this source, up to
/// this.
pub const KBS_FIRST_BYTE: Duration = Duration::from_secs(20);
/// Timeout of that first byte while a peer of another source waits that has no penalty; twice as long after each failed
/// attempt of the source. So a crowd of silent sources costs little time each.
pub const KBS_FIRST_BYTE_CONTESTED: Duration = Duration::from_secs(2);
/// Idle timeout of a KBS stream after its first byte, so that a lost request is retried. Each attempt that ends with
/// that timeout doubles it, up to [`KEY_FETCH`].
pub const KBS_PAUSE_MIN: Duration = Duration::from_secs(10);
/// Longest pause between attempts through one peer, once it has brought known errors [`SAME_ANSWERS`] times: each attempt is
/// an attestation at the KBS.
pub const KEYS_RETRY_MAX: Duration = Duration::from_secs(60);
/// Known errors of one peer after which its pauses grow beyond [`RETRY_MAX`].
pub const SAME_ANSWERS: u32 = 12;
/// Longest interval of `keys` messages while the agent waits for its keys.
pub const KEYS_REPORT: Duration = Duration::from_secs(15);
/// Time that attestation peers have to close their connections after `upgrade`.
pub const UPGRADE_DRAIN: Duration = Duration::from_secs(1);
/// Time that a peer has to close its connection after it has received the reason; then it is cut.
pub const FAREWELL: Duration = Duration::from_millis(500);
/// Connections that receive the reason of their end at a time. Others are cut at once, so that a flood takes bounded
/// memory.
pub const FAREWELLS_MAX: usize = 16;
/// A fresh agent admits attestation peers again if no worker node has logged in for this long.
pub const FIRST_LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for which an attempt to set up the pod network waits for the VM's own network: DHCP may be late.
pub const POD_NETWORK_WAIT: Duration = Duration::from_secs(180);
/// Timeout of removing the pod network after SIGTERM; the next start removes the rest.
pub const POD_NETWORK_UNDO: Duration = Duration::from_secs(5);
/// Drain timeout of open streams after SIGTERM.
pub const SHUTDOWN_DRAIN: Duration = Duration::from_secs(3);
/// Extension of systemd's start timeout while the agent waits for its daemon config. It is requested twice within each
/// extension.
pub const START_EXTENSION: Duration = Duration::from_secs(60);
/// Largest `secure-comms.toml` of init-data, in bytes.
pub const INIT_DATA_MAX: usize = 64 * 1024;
/// Tunnels that user data may add. The rest is refused.
pub const USER_DATA_TUNNELS_MAX: usize = 64;
/// Largest key resource, in bytes.
pub const KEY_MAX: usize = 64 * 1024;
