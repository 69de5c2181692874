use std::time::Duration;

/// Limits and waits of one replica's pool. Every queue and wait of the client has its bound here.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    /// Sessions kept open, each on a connection of its own.
    pub sessions: usize,
    /// For the socket, the Describe and the Welcome, each.
    pub connect_timeout: Duration,
    /// First wait between attempts to connect; doubles up to `backoff_max`, each time with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// The same for a Unix socket: asking there costs microseconds, and whoever started the engine waits for it.
    pub backoff_max_here: Duration,
    /// An engine whose loop last came round longer ago than this is [`super::ReplicaState::Hung`].
    pub hung_after: Duration,
    /// A session on which no frame at all came for this long is lost, without reattaching.
    pub peer_silence: Duration,
    /// How long a broken session may try to reattach before its requests end.
    pub reattach_within: Duration,
    /// HTTP/2 pings; they find a dead host between frames.
    pub keepalive_interval: Duration,
    /// Requests in flight per session; beyond it `submit` answers `Full`.
    pub max_in_flight: usize,
    /// Prompt ids per message: bounds how long a Cancel waits behind a prompt.
    pub chunk_ids: usize,
    /// A frame larger than this breaks the session.
    pub max_frame_bytes: usize,
    /// Acknowledge at the latest after this many frames, or this long.
    pub ack_frames: u64,
    pub ack_interval: Duration,
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self {
            sessions: 2,
            connect_timeout: Duration::from_secs(1),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            backoff_max_here: Duration::from_millis(100),
            hung_after: Duration::from_secs(5),
            peer_silence: Duration::from_secs(2),
            reattach_within: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(1),
            max_in_flight: 16_384,
            chunk_ids: 8_192,
            max_frame_bytes: 256 << 20,
            ack_frames: 32,
            ack_interval: Duration::from_millis(100),
        }
    }
}
