//! What one model's replicas have failed, and what may be tried again because of it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use scalellm_engine_link::Replica;
use scalellm_routing::{Candidate, RetryBudget};

use crate::breaker::SharedBreaker;
use crate::config::FaultConfig;
use crate::metrics::Metrics;
use crate::refused_prompts::RefusedPrompts;

/// Refused requests that may go to a second replica at once; in the long run it is `retry_share` of all.
const RETRY_BURST: usize = 64;
/// Requests that may be asked for at a second replica at once, where that is on.
pub const HEDGE_BURST: usize = 8;

pub struct Faults {
    pub config: FaultConfig,
    breakers: Vec<SharedBreaker>,
    /// For what a replica refused: an overload, which more requests make worse.
    retries: Mutex<RetryBudget>,
    /// For what a dead replica left: as many at once as run, so that one death loses nothing.
    replays: Mutex<RetryBudget>,
    /// For what is only late.
    hedges: Mutex<RetryBudget>,
    pub refused_prompts: RefusedPrompts,
    metrics: Arc<Metrics>,
}

impl Faults {
    #[must_use]
    pub fn new(
        config: &FaultConfig,
        max_in_flight: usize,
        replicas: usize,
        metrics: &Arc<Metrics>,
    ) -> Faults {
        let breaker = || SharedBreaker::new(config.breaker());
        let share = config.retry_share;
        Faults {
            config: config.clone(),
            breakers: (0..replicas).map(|_| breaker()).collect(),
            retries: Mutex::new(RetryBudget::new(RETRY_BURST, share)),
            replays: Mutex::new(RetryBudget::new(max_in_flight.max(RETRY_BURST), share)),
            hedges: Mutex::new(RetryBudget::new(HEDGE_BURST, config.hedge_share)),
            refused_prompts: RefusedPrompts::new(Duration::from_secs_f64(config.poison_refused_s)),
            metrics: Arc::clone(metrics),
        }
    }

    /// The candidates whose breakers let a request pass; all of them if none does: a breaker chooses between replicas
    /// and does not close the shop.
    #[must_use]
    pub fn allowed(
        &self,
        replicas: &[Arc<Replica>],
        candidates: Vec<Candidate>,
        now_ms: f64,
    ) -> Vec<Candidate> {
        if self.breakers.iter().all(SharedBreaker::never_opened) {
            return candidates;
        }
        let allows = |candidate: &Candidate| {
            let breaker = self.breakers.get(candidate.index);
            let replica = replicas.get(candidate.index);
            breaker
                .zip(replica)
                .is_none_or(|(breaker, replica)| breaker.allows(replica.load().epoch, now_ms))
        };
        let allowed: Vec<Candidate> = candidates.iter().filter(|c| allows(c)).copied().collect();
        if allowed.is_empty() {
            candidates
        } else {
            allowed
        }
    }

    #[must_use]
    pub fn is_closed(&self, replica: usize) -> bool {
        self.breakers
            .get(replica)
            .is_none_or(SharedBreaker::is_closed)
    }

    /// A choice was sent to a replica.
    pub fn sent(&self, replica: usize) {
        if let Some(breaker) = self.breakers.get(replica) {
            breaker.sent();
        }
    }

    /// A replica, in its start `epoch`, has begun to answer a choice.
    pub fn succeeded(&self, replica: usize, epoch: u64, now_ms: f64) {
        if let Some(breaker) = self.breakers.get(replica) {
            breaker.succeeded(epoch, now_ms);
        }
    }

    /// A replica failed a choice, by no fault of the client's.
    pub fn failed(&self, replica: usize, epoch: u64, now_ms: f64) {
        let Some(breaker) = self.breakers.get(replica) else {
            return;
        };
        if breaker.failed(epoch, now_ms) {
            self.metrics.faults.breaker_opened();
            tracing::warn!(
                replica,
                "the replica fails its requests: it gets none for a while"
            );
        }
    }

    /// A choice that was never tried before.
    pub fn request(&self) {
        self.retries.lock().request();
        self.replays.lock().request();
        if self.config.hedge_after().is_some() {
            self.hedges.lock().request();
        }
    }

    #[must_use]
    pub fn may_retry(&self, now_ms: f64) -> bool {
        self.retries.lock().take(now_ms)
    }

    #[must_use]
    pub fn may_replay(&self, now_ms: f64) -> bool {
        self.replays.lock().take(now_ms)
    }

    #[must_use]
    pub fn may_hedge(&self, now_ms: f64) -> bool {
        self.hedges.lock().take(now_ms)
    }
}
