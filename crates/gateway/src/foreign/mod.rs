//! Models that servers elsewhere compute: vLLM, TGI, SGLang, llama.cpp, any that speaks OpenAI's API over HTTP.
//!
//! ```text
//! asked      what of a request the gateway reads, and the bytes that it changes
//! way        whether upstreams are to answer, or replicas of our own
//! beside     these as one more choice beside the upstreams
//! pick       which upstream
//! relay      retries before the first byte, the answer's head
//! failed     what the client is told when there is none
//! stream     the events on their way to the client
//! events     whole events in the bytes as they come; usage taken out, the model's name put back
//! exchange   one request and its answer
//! upstream   one server: idle connections, counts
//! health     whether it can be reached, and does what it is asked
//! link       one connection
//! top_level  the fields of a JSON object, without what is within them
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scalellm_routing::{Policy, Prefixes, RetryBudget};
use serde_json::{Value, json};

use crate::config::{FaultConfig, ModelConfig, UpstreamConfig};
use crate::error::{ApiError, GatewayError};
use crate::faults::HEDGE_BURST;
use crate::served::Served;

mod asked;
mod beside;
mod events;
mod exchange;
mod failed;
mod framing;
mod head;
mod health;
mod link;
mod pick;
mod relay;
mod stream;
mod top_level;
mod upstream;
mod way;

pub use asked::Asked;
use beside::Replicas;
#[cfg(any(test, feature = "fuzzing"))]
pub use events::{Answers, Events};
pub use exchange::{Exchange, Failure, InFlight};
use pick::{Picker, Reason};
pub use relay::Endpoint;
pub use upstream::Upstream;
pub use way::{Way, way};

/// Requests that may be sent again at once; in the long run it is `retry_share` of all.
const RETRY_BURST: usize = 10;

/// Whether an upstream fails its requests, is a fallback, has just refused one.
type Tier = (bool, bool, bool);

/// A model and the upstreams that compute it.
pub struct ForeignModel {
    pub served: Arc<Served>,
    pub upstreams: Vec<Arc<Upstream>>,
    /// Of them, those that get no new requests.
    drained: Vec<bool>,
    pub picker: Arc<Picker>,
    /// Whether it matters which upstream was sent what.
    by_prefix: bool,
    replicas: Arc<Replicas>,
    /// Where they share its requests.
    replicas_weight: Option<u32>,
    retries: Mutex<RetryBudget>,
    hedge_after: Option<Duration>,
    hedges: Mutex<RetryBudget>,
    began: Instant,
}

impl ForeignModel {
    /// # Errors
    /// As [`Upstream::start`].
    pub fn start(
        served: Arc<Served>,
        config: &ModelConfig,
        index: usize,
        faults: &FaultConfig,
        before: Option<&ForeignModel>,
    ) -> Result<ForeignModel, GatewayError> {
        let upstreams: Vec<_> = config
            .upstreams
            .iter()
            .enumerate()
            .map(|(number, upstream)| {
                let path = format!("models[{index}].upstreams[{number}]");
                let running = before
                    .map(|model| model.upstreams.as_slice())
                    .unwrap_or_default();
                Upstream::start(upstream, &config.name, &path, faults.breaker(), running)
            })
            .collect::<Result<_, _>>()?;
        let choices = config.upstreams.len() + usize::from(config.replicas_weight.is_some());
        let is_drained = |upstream: &UpstreamConfig| config.drained.contains(&upstream.url);
        Ok(ForeignModel {
            served,
            drained: config.upstreams.iter().map(is_drained).collect(),
            upstreams,
            picker: before
                .map(|model| Arc::clone(&model.picker))
                .unwrap_or_default(),
            by_prefix: config.policy(index)? == Policy::Prefix && choices > 1,
            replicas: before
                .map(|model| Arc::clone(&model.replicas))
                .unwrap_or_default(),
            replicas_weight: config.replicas_weight,
            retries: Mutex::new(RetryBudget::new(RETRY_BURST, faults.retry_share)),
            hedge_after: faults.hedge_after(),
            hedges: Mutex::new(RetryBudget::new(HEDGE_BURST, faults.hedge_share)),
            began: Instant::now(),
        })
    }

    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.usable().next().is_some()
    }

    fn usable(&self) -> impl Iterator<Item = (usize, &Arc<Upstream>)> {
        let all = self.upstreams.iter().enumerate();
        all.filter(|(index, upstream)| !self.drained[*index] && upstream.is_usable())
    }

    /// What an operator is told of each.
    pub fn listed(&self) -> impl Iterator<Item = Value> {
        self.upstreams
            .iter()
            .zip(&self.drained)
            .map(|(upstream, drained)| {
                json!({
                    "name": upstream.told_as,
                    "url": &*upstream.name,
                    "state": upstream.state(),
                    "breaker_open": !upstream.health.is_closed(),
                    "drained": drained,
                    "in_flight_requests": upstream.counts.in_flight.load(Relaxed),
                    "weight": upstream.config.weight,
                    "fallback": upstream.config.fallback,
                })
            })
    }

    /// Those that are not `tried`, each with what sets it behind others: that it fails its requests, is a fallback, or has
    /// just refused one.
    fn tiers(&self, tried: &[usize]) -> Vec<(Tier, usize, &Arc<Upstream>)> {
        let untried = self.usable().filter(|(index, _)| !tried.contains(index));
        untried
            .map(|(index, upstream)| {
                let health = &upstream.health;
                let behind = (
                    !health.allows(),
                    upstream.config.fallback,
                    health.is_refusing(),
                );
                (behind, index, upstream)
            })
            .collect()
    }

    /// Whether nothing sets one back that is not `tried`.
    fn is_one_beside(&self, tried: &[usize]) -> bool {
        let tiers = self.tiers(tried);
        tiers.iter().any(|(tier, ..)| *tier == Tier::default())
    }

    /// One of those that are well and not `tried`, and why it; those that have just refused a request come after the
    /// others, fallbacks after both, and last those that fail their requests: a breaker chooses between upstreams and
    /// does not close the shop.
    fn pick(
        &self,
        tried: &[usize],
        session: Option<u64>,
        prompt: &Prefixes,
    ) -> Option<(usize, Reason)> {
        let tiers = self.tiers(tried);
        let first = tiers.iter().map(|(tier, ..)| *tier).min()?;
        let among: Vec<_> = tiers
            .into_iter()
            .filter(|(tier, ..)| *tier == first)
            .map(|(_, index, upstream)| upstream.candidate(index, prompt))
            .collect();
        let (index, reason) = self.picker.pick(&among, session, !prompt.is_empty())?;
        let (_, fallback, _) = first;
        let reason = match (tried.is_empty(), fallback) {
            (false, _) => Reason::Retry,
            (true, true) => Reason::Fallback,
            (true, false) => reason,
        };
        Some((index, reason))
    }

    /// Of a prompt, by what upstreams are found that were sent its beginning.
    fn prefixes(&self, asked: &Asked, body: &[u8]) -> Prefixes {
        match self.by_prefix {
            true => asked.prompt.prefixes(body),
            false => Prefixes::default(),
        }
    }

    fn request_came(&self) {
        self.retries.lock().request();
        if self.hedge_after.is_some() {
            self.hedges.lock().request();
        }
    }

    fn may_retry(&self) -> bool {
        self.retries.lock().take(self.now_ms())
    }

    fn may_hedge(&self) -> bool {
        self.hedges.lock().take(self.now_ms())
    }

    fn now_ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e3
    }

    #[must_use]
    pub fn no_upstream(&self) -> Box<ApiError> {
        let states: Vec<String> = self
            .upstreams
            .iter()
            .zip(&self.drained)
            .map(|(upstream, drained)| {
                let state = if *drained {
                    "drained"
                } else {
                    upstream.state()
                };
                format!("{} is {state}", upstream.told_as)
            })
            .collect();
        let message = format!(
            "no upstream of {:?} can take a request now: {}",
            self.served.name,
            states.join(", ")
        );
        ApiError::busy("no_replica", message, 1)
    }
}
