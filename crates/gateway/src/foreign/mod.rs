//! Models that servers elsewhere compute: vLLM, TGI, SGLang, llama.cpp, any that speaks OpenAI's API over HTTP.
//!
//! ```text
//! asked      what of a request the gateway reads, and the bytes that it changes
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
use scalellm_routing::RetryBudget;
use serde_json::{Value, json};

use crate::config::{FaultConfig, ModelConfig, UpstreamConfig};
use crate::error::{ApiError, GatewayError};
use crate::faults::HEDGE_BURST;
use crate::served::Served;

mod asked;
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

#[cfg(any(test, feature = "fuzzing"))]
pub use asked::Asked;
#[cfg(any(test, feature = "fuzzing"))]
pub use events::{Answers, Events};
pub use exchange::{Exchange, Failure};
use pick::{Candidate, Picker, Reason};
pub use relay::{Endpoint, relayed};
pub use upstream::Upstream;

/// Retries that may be saved up, and what each request adds: so retries never double an overload.
const MAX_SAVED_RETRIES: f64 = 10.0;
const RETRIES_PER_REQUEST: f64 = 0.2;

/// A model and the upstreams that compute it.
pub struct ForeignModel {
    pub served: Arc<Served>,
    pub upstreams: Vec<Arc<Upstream>>,
    /// Of them, those that get no new requests.
    drained: Vec<bool>,
    pub picker: Arc<Picker>,
    saved_retries: Mutex<f64>,
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
        let is_drained = |upstream: &UpstreamConfig| config.drained.contains(&upstream.url);
        Ok(ForeignModel {
            served,
            drained: config.upstreams.iter().map(is_drained).collect(),
            upstreams,
            picker: before
                .map(|model| Arc::clone(&model.picker))
                .unwrap_or_default(),
            saved_retries: Mutex::new(MAX_SAVED_RETRIES),
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

    /// One of those that are well and not `tried`, and why it; those that have just refused a request come after the
    /// others, fallbacks after both, and last those that fail their requests: a breaker chooses between upstreams and
    /// does not close the shop.
    fn pick(&self, tried: &[usize], session: Option<u64>) -> Option<(usize, Reason)> {
        let tier = |upstream: &Upstream| {
            let health = &upstream.health;
            (
                !health.allows(),
                upstream.config.fallback,
                health.is_refusing(),
            )
        };
        let untried = self.usable().filter(|(index, _)| !tried.contains(index));
        let tiers: Vec<_> = untried
            .map(|(index, upstream)| (tier(upstream), index, upstream))
            .collect();
        let first = tiers.iter().map(|(tier, ..)| *tier).min()?;
        let among: Vec<_> = tiers
            .into_iter()
            .filter(|(tier, ..)| *tier == first)
            .map(|(_, index, upstream)| Candidate {
                index,
                id: upstream.id,
                weight: upstream.config.weight,
                in_flight: upstream.counts.in_flight.load(Relaxed),
            })
            .collect();
        let (index, reason) = self.picker.pick(&among, session)?;
        let (_, fallback, _) = first;
        let reason = match (tried.is_empty(), fallback) {
            (false, _) => Reason::Retry,
            (true, true) => Reason::Fallback,
            (true, false) => reason,
        };
        Some((index, reason))
    }

    fn request_came(&self) {
        let mut saved = self.saved_retries.lock();
        *saved = (*saved + RETRIES_PER_REQUEST).min(MAX_SAVED_RETRIES);
        if self.hedge_after.is_some() {
            self.hedges.lock().request();
        }
    }

    fn may_hedge(&self) -> bool {
        let now_ms = self.began.elapsed().as_secs_f64() * 1e3;
        self.hedges.lock().take(now_ms)
    }

    fn may_retry(&self) -> bool {
        let mut saved = self.saved_retries.lock();
        let may = *saved >= 1.0;
        if may {
            *saved -= 1.0;
        }
        may
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
