//! What a policy decides on: the replicas that could take a request, and the request.

use crate::hash::BlockHash;

/// How long an engine's step takes, as the engine fits it to its own steps, in milliseconds:
///
/// ```text
///   fixed + token * tokens + attended * (sum over tokens of the positions each attends to) + request * requests
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepCost {
    pub fixed_ms: f64,
    pub token_ms: f64,
    pub attended_ms: f64,
    pub request_ms: f64,
}

impl StepCost {
    /// Whether an engine can have measured this.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        let all = [
            self.fixed_ms,
            self.token_ms,
            self.attended_ms,
            self.request_ms,
        ];
        all.iter().all(|ms| ms.is_finite() && *ms >= 0.0) && self.token_ms > 0.0
    }

    /// Of a prompt's `tokens` after `cached` ones, alone in its steps.
    #[must_use]
    pub fn prefill_ms(&self, tokens: f64, cached: f64) -> f64 {
        let attended = tokens * (cached + tokens / 2.0);
        self.fixed_ms + self.token_ms * tokens + self.attended_ms * attended + self.request_ms
    }

    /// Of a step in which `requests` get a token each, their contexts being `context_tokens` together.
    #[must_use]
    pub fn decode_ms(&self, requests: f64, context_tokens: f64) -> f64 {
        self.fixed_ms
            + (self.token_ms + self.request_ms) * requests
            + self.attended_ms * context_tokens
    }

    pub(crate) fn between(&self, other: &StepCost, share: f64) -> StepCost {
        let mix = |a: f64, b: f64| a + share * (b - a);
        StepCost {
            fixed_ms: mix(self.fixed_ms, other.fixed_ms),
            token_ms: mix(self.token_ms, other.token_ms),
            attended_ms: mix(self.attended_ms, other.attended_ms),
            request_ms: mix(self.request_ms, other.request_ms),
        }
    }
}

/// What is known of one replica that could take the request.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Candidate {
    /// Names the replica towards the router for as long as it is served; small, because state is kept by it.
    pub index: usize,
    /// The same in every gateway, for sessions: [`crate::stable_hash`] of its address, say.
    pub id: u64,
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens that the engine has accepted and neither computed nor found in its cache.
    pub backlog_tokens: u64,
    /// Context of the running requests, together.
    pub context_tokens: u64,
    /// Of the last step; 0 if there was none.
    pub step_ms: f32,
    /// Steps that the engine has run: tells a fresh cost from an old one.
    pub steps: u64,
    /// Requests that the engine runs at once; 0 if unknown.
    pub max_num_seqs: u32,
    /// 0 if unknown.
    pub tensor_parallel_size: u32,
    /// Tokens of a KV block; 0 if its cache is not followed.
    pub block_size: u32,
    /// The engine's own measurement; all zero if it has none.
    pub cost: StepCost,
    /// Of this gateway: requests without an end, and prompt tokens without an answer that were not expected in the
    /// replica's cache.
    pub own_requests: usize,
    pub own_tokens: usize,
}

impl Candidate {
    /// Requests that it has, by its own word or this gateway's.
    #[must_use]
    pub fn requests(&self) -> f64 {
        (u64::from(self.running) + u64::from(self.waiting)).max(self.own_requests as u64) as f64
    }
}

/// What is known of the request.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Request<'a> {
    pub prompt_tokens: usize,
    /// The most it may generate, if it says so.
    pub max_tokens: Option<u32>,
    /// [`crate::block_hashes`] of the prompt's full blocks, of `block_size` tokens; empty where no policy asks for
    /// them.
    pub hashes: &'a [BlockHash],
    pub block_size: u32,
    /// [`crate::stable_hash`] of what the client calls its session.
    pub session: Option<u64>,
    /// Nobody waits for it: kept away from the replicas that are quick for few.
    pub batch: bool,
}
