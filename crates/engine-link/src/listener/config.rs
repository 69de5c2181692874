use std::time::Duration;

use crate::proto::RefusalCode;

/// Limits and waits of an engine's listener. Every queue and wait of the listener has its bound here.
#[derive(Debug, Clone)]
pub struct ListenerConfig {
    /// Requests accepted beyond the engine's `max_num_seqs`; further ones are refused as `FULL`.
    pub max_waiting: usize,
    /// Sessions at once, detached ones included.
    pub max_sessions: usize,
    /// Frames that a session has not acknowledged; beyond it the session is dropped with its requests.
    pub max_retained_bytes: usize,
    /// How long a session without a stream is kept for reattaching.
    pub reattach_within: Duration,
    /// A frame comes at least this often, to carry the load and the age of the loop's last step.
    pub load_interval: Duration,
    /// A loop that last came round longer ago than this hangs: the health service's `loop` says so.
    pub hung_after: Duration,
    /// From opening a stream to its Hello.
    pub hello_timeout: Duration,
    /// HTTP/2 pings; they find gateways on dead hosts.
    pub keepalive_interval: Duration,
    /// One message of a gateway.
    pub max_message_bytes: usize,
    /// How long a Calibrate may take.
    pub calibrate_timeout: Duration,
    /// How long `close` goes on sending what was emitted.
    pub flush_timeout: Duration,
    /// Steps whose times are kept for profiles.
    pub kept_steps: usize,
    /// Waits this long before each Welcome: a fault for tests of gateways.
    pub welcome_delay: Duration,
    /// Refuses every Submit with this code: a fault for tests of gateways.
    pub refuse: Option<RefusalCode>,
}

impl Default for ListenerConfig {
    fn default() -> Self {
        Self {
            max_waiting: 4_096,
            max_sessions: 256,
            max_retained_bytes: 64 << 20,
            reattach_within: Duration::from_secs(2),
            load_interval: Duration::from_millis(200),
            hung_after: Duration::from_secs(30),
            hello_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(5),
            max_message_bytes: 16 << 20,
            calibrate_timeout: Duration::from_secs(120),
            flush_timeout: Duration::from_secs(1),
            kept_steps: 4_096,
            welcome_delay: Duration::ZERO,
            refuse: None,
        }
    }
}
