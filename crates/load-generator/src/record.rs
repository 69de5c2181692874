//! What is kept of one request.

use serde::Serialize;

/// Why a request failed. A timeout is not among them: see [`Outcome::TimedOut`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No connection: name not resolved, refused, unreachable.
    Connect,
    /// An HTTP status other than 2xx.
    Status,
    /// The connection broke, before or inside the answer.
    Reset,
    /// Not HTTP, not SSE, or not JSON of the API.
    Garbage,
    /// The stream ended without `[DONE]` or a finish reason.
    Unfinished,
    /// A complete answer without one token.
    Empty,
    /// The stream said `{"error": ...}`.
    Error,
    /// Not sent: the generator's own limit on open requests was reached.
    Overload,
}

/// One failure with what a person needs to understand it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

impl Failure {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Failure {
        Failure {
            kind,
            message: message.into(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    TimedOut,
    Failed(Failure),
}

/// Where the number of output tokens comes from.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenSource {
    Usage,
    Ids,
    #[default]
    Chunks,
}

/// One request's life. Times are nanoseconds on the run's clock.
#[derive(Debug, Clone)]
pub struct Record {
    /// What it was sent as, where the plan gives ids.
    pub id: Option<String>,
    pub prompt: u32,
    /// Of the conversation that the prompt began, from 0.
    pub turn: u32,
    /// When the wait counts from: the scheduled send (open loop) or the first byte sent (closed).
    pub origin_ns: u64,
    /// First byte of the request written; absent when none was.
    pub sent_ns: Option<u64>,
    /// A server's end of a kept connection came instead of an answer, and it was sent again.
    pub resent: bool,
    pub first_token_ns: Option<u64>,
    pub last_token_ns: Option<u64>,
    pub end_ns: u64,
    pub tokens: u32,
    pub token_source: TokenSource,
    pub prompt_tokens: Option<u32>,
    /// Chunks with at least one token.
    pub chunks: u32,
    /// Longest wait between two such chunks.
    pub max_gap_ns: u64,
    pub status: Option<u16>,
    pub outcome: Outcome,
    /// Every gap in microseconds, where the plan asks for them.
    pub gaps_us: Vec<u32>,
}

impl Record {
    /// Time to first token: origin to first token received.
    pub fn ttft_ns(&self) -> Option<u64> {
        self.first_token_ns
            .map(|first| first.saturating_sub(self.origin_ns))
    }

    /// Time between tokens: (last - first) / (n - 1); absent below two tokens or two chunks.
    pub fn tbt_ns(&self) -> Option<f64> {
        let (first, last) = (self.first_token_ns?, self.last_token_ns?);
        (self.tokens >= 2 && self.chunks >= 2)
            .then(|| last.saturating_sub(first) as f64 / f64::from(self.tokens - 1))
    }

    pub fn e2e_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.origin_ns)
    }
}
