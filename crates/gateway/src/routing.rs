//! Where a model's requests go: what its router is told, and what is told of its choices.
//!
//! ```text
//!   Replica (engine-link) --load--> Candidate --+
//!           --KV events--> Mirror --> Router ---+--> Choice --> Placement, x-scalellm-route, counters
//! ```

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use axum::http::HeaderMap;
use parking_lot::Mutex;
use scalellm_engine_link::{BlockHash, KvSink, Replica, proto};
use scalellm_routing::{
    Candidate, Choice, Policy, Reason, Request, Router, StepCost, block_hashes, stable_hash,
};

/// In a request it asks for the route, in the response it tells it.
pub const ROUTE_HEADER: &str = "x-scalellm-route";
/// How servers elsewhere are chosen, where a policy's name is told.
pub const UPSTREAMS: &str = "upstreams";
const SESSION_HEADER: &str = "x-session-id";
/// Of a mirrored cache, what is taken in before others get the router.
const BLOCKS_AT_ONCE: usize = 1024;

/// What a client says of how its request is to be routed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteWish {
    /// Requests of one session like one replica.
    pub session: Option<u64>,
    /// The response shall say where the request went, and why.
    pub explain: bool,
    /// Nobody waits for it.
    pub batch: bool,
}

impl RouteWish {
    /// The session is `x-session-id`, or else what the body calls one.
    #[must_use]
    pub fn of_headers(headers: &HeaderMap) -> RouteWish {
        RouteWish {
            session: headers
                .get(SESSION_HEADER)
                .filter(|name| !name.is_empty())
                .map(|name| stable_hash(name.as_bytes())),
            explain: headers.contains_key(ROUTE_HEADER),
            batch: false,
        }
    }
}

/// Where a request went, as the response's header and the access log say it.
#[derive(Debug, Clone)]
pub struct RouteNote {
    replica: String,
    policy: &'static str,
    reason: &'static str,
    /// Milliseconds until the first token, and tokens that are cached.
    predicted: Option<(f64, usize)>,
}

impl RouteNote {
    #[must_use]
    pub fn new(replica: &Replica, choice: Choice) -> RouteNote {
        RouteNote {
            replica: crate::fleet::replica_name(replica),
            policy: choice.policy.name(),
            reason: choice.reason.name(),
            predicted: Some((choice.predicted_ms, choice.cached_tokens)),
        }
    }

    /// Of a server elsewhere, of which nothing is predicted.
    #[must_use]
    pub fn upstream(name: &str, reason: &'static str) -> RouteNote {
        RouteNote {
            replica: name.to_owned(),
            policy: UPSTREAMS,
            reason,
            predicted: None,
        }
    }
}

impl fmt::Display for RouteNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteNote {
            replica,
            policy,
            reason,
            predicted,
        } = self;
        write!(f, "replica={replica}; policy={policy}; reason={reason}")?;
        if let Some((ms, cached_tokens)) = predicted {
            write!(f, "; predicted_ms={ms:.1}; cached_tokens={cached_tokens}")?;
        }
        Ok(())
    }
}

/// The routing of one model.
pub struct Routing {
    router: Arc<Mutex<Router>>,
    policy: Policy,
    /// Of each replica, made of its address: the same in every gateway.
    ids: Vec<u64>,
    /// Of each replica, prompt tokens that were sent, not expected in its cache, and not answered.
    sent_tokens: Vec<Arc<AtomicUsize>>,
    counts: [AtomicU64; Reason::ALL.len()],
}

impl Routing {
    #[must_use]
    pub fn new(policy: Policy, addresses: &[Arc<str>]) -> Routing {
        let id = |address: &Arc<str>| stable_hash(address.as_bytes());
        Routing {
            router: Arc::new(Mutex::new(Router::new(policy))),
            policy,
            ids: addresses.iter().map(id).collect(),
            sent_tokens: addresses.iter().map(|_| Arc::default()).collect(),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// What is to be told of a replica's prefix cache; `None` if nobody asks.
    #[must_use]
    pub fn mirror(&self, replica: usize) -> Option<Arc<dyn KvSink>> {
        let asked = self.policy.needs_prefixes() && self.sent_tokens.len() > 1;
        asked.then(|| {
            let router = Arc::clone(&self.router);
            Arc::new(Mirror { router, replica }) as Arc<dyn KvSink>
        })
    }

    /// Chooses a replica for a prompt that is sent now. `None` without a candidate.
    #[must_use]
    pub fn place(
        &self,
        candidates: &[Candidate],
        submit: &proto::Submit,
        wish: RouteWish,
        now_ms: f64,
    ) -> Option<Placement> {
        let block_size = candidates.first()?.block_size;
        // Hashed before the lock is taken: a long prompt has thousands of blocks.
        let hashes = if self.policy.needs_prefixes() && candidates.len() > 1 {
            block_hashes(&submit.prompt_ids, block_size as usize, &submit.cache_salt)
        } else {
            Vec::new()
        };
        let request = Request {
            prompt_tokens: submit.prompt_ids.len(),
            max_tokens: Some(submit.max_tokens),
            hashes: &hashes,
            block_size,
            session: wish.session,
            batch: wish.batch,
        };
        let choice = self.router.lock().pick(candidates, &request, now_ms)?;
        self.counts[choice.reason as usize].fetch_add(1, Relaxed);
        let tokens = request.prompt_tokens - choice.cached_tokens;
        let sent = self.sent_tokens.get(choice.index).map(Arc::clone);
        let sent = sent.unwrap_or_default();
        sent.fetch_add(tokens, Relaxed);
        Some(Placement {
            choice,
            tokens,
            sent,
        })
    }

    /// The least predicted time until the first token of a prompt; `None` while nothing was measured.
    #[must_use]
    pub fn predict_first_token_ms(
        &self,
        candidates: &[Candidate],
        prompt_tokens: usize,
        now_ms: f64,
    ) -> Option<f64> {
        let router = self.router.lock();
        router.predict_first_token_ms(candidates, prompt_tokens, now_ms)
    }

    /// Takes in how long a prompt's uncached tokens took a replica.
    pub fn observe_prefill(&self, replica: usize, tokens: usize, took_us: u64, now_ms: f64) {
        let took_ms = took_us as f64 / 1e3;
        let mut router = self.router.lock();
        router.observe_prefill(replica, tokens, took_ms, now_ms);
    }

    /// Takes in how long a request's output was.
    pub fn observe_output(&self, tokens: usize, now_ms: f64) {
        self.router.lock().observe_output(tokens, now_ms);
    }

    /// What the router shall know of a replica.
    #[must_use]
    pub fn candidate(&self, index: usize, replica: &Replica) -> Candidate {
        let load = replica.load();
        let info = replica.info();
        let info = info.as_deref();
        let cost = load.step_cost.unwrap_or_default();
        let block_size = info.map_or(0, |info| info.block_size);
        Candidate {
            index,
            id: self.ids.get(index).copied().unwrap_or_default(),
            running: load.running,
            waiting: load.waiting,
            backlog_tokens: load.backlog_tokens,
            context_tokens: u64::from(load.kv_blocks_used) * u64::from(block_size),
            step_ms: load.step_ms,
            steps: load.steps,
            max_num_seqs: info.map_or(0, |info| info.max_num_seqs),
            tensor_parallel_size: info.map_or(0, |info| info.tensor_parallel_size),
            block_size,
            cost: StepCost {
                fixed_ms: cost.fixed_ms.into(),
                token_ms: cost.token_ms.into(),
                attended_ms: cost.attended_ms.into(),
                request_ms: cost.request_ms.into(),
            },
            own_requests: replica.in_flight(),
            own_tokens: self
                .sent_tokens
                .get(index)
                .map_or(0, |sent| sent.load(Relaxed)),
        }
    }

    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Choices so far, by reason.
    pub fn counts(&self) -> impl Iterator<Item = (Reason, u64)> {
        let counts = Reason::ALL.into_iter().zip(&self.counts);
        counts.map(|(reason, count)| (reason, count.load(Relaxed)))
    }

    /// Blocks that at least one replica is known to have cached.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.router.lock().cached_blocks()
    }
}

/// A prompt on its way: until it is dropped, its tokens count as work of the replica.
#[derive(Debug)]
pub struct Placement {
    pub choice: Choice,
    tokens: usize,
    sent: Arc<AtomicUsize>,
}

impl Drop for Placement {
    fn drop(&mut self) {
        self.sent.fetch_sub(self.tokens, Relaxed);
    }
}

/// Keeps the router's index in step with one replica's prefix cache.
struct Mirror {
    router: Arc<Mutex<Router>>,
    replica: usize,
}

impl KvSink for Mirror {
    fn change(&self, stored: Vec<BlockHash>, removed: Vec<BlockHash>) {
        for hashes in removed.chunks(BLOCKS_AT_ONCE) {
            let mut router = self.router.lock();
            router.remove(self.replica, hashes.iter().copied());
        }
        for hashes in stored.chunks(BLOCKS_AT_ONCE) {
            let mut router = self.router.lock();
            router.store(self.replica, hashes.iter().copied());
        }
    }

    fn clear(&self) {
        self.router.lock().clear(self.replica);
    }
}
