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
//! upstream   one server: health, idle connections, counts
//! link       one connection
//! top_level  the fields of a JSON object, without what is within them
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::config::{ModelConfig, UpstreamConfig};
use crate::error::{ApiError, GatewayError};
use crate::served::Served;

mod asked;
mod events;
mod exchange;
mod failed;
mod framing;
mod head;
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
}

impl ForeignModel {
    /// # Errors
    /// As [`Upstream::start`].
    pub fn start(
        served: Arc<Served>,
        config: &ModelConfig,
        index: usize,
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
                Upstream::start(upstream, &config.name, &path, running)
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
                    "drained": drained,
                    "in_flight_requests": upstream.counts.in_flight.load(Relaxed),
                    "weight": upstream.config.weight,
                    "fallback": upstream.config.fallback,
                })
            })
    }

    /// One of those that are well and not `tried`, and why it; those that have just refused a request come after the
    /// others, fallbacks last.
    fn pick(&self, tried: &[usize], session: Option<u64>) -> Option<(usize, Reason)> {
        let among = |fallback: bool, refusing: bool| {
            self.usable()
                .filter(|(index, upstream)| {
                    upstream.config.fallback == fallback
                        && upstream.is_refusing() == refusing
                        && !tried.contains(index)
                })
                .map(|(index, upstream)| Candidate {
                    index,
                    id: upstream.id,
                    weight: upstream.config.weight,
                    in_flight: upstream.counts.in_flight.load(Relaxed),
                })
                .collect::<Vec<_>>()
        };
        let tiers = [(false, false), (false, true), (true, false), (true, true)];
        let (index, mut reason) = tiers.into_iter().find_map(|(fallback, refusing)| {
            let (index, reason) = self.picker.pick(&among(fallback, refusing), session)?;
            Some((index, if fallback { Reason::Fallback } else { reason }))
        })?;
        if !tried.is_empty() {
            reason = Reason::Retry;
        }
        Some((index, reason))
    }

    fn request_came(&self) {
        let mut saved = self.saved_retries.lock();
        *saved = (*saved + RETRIES_PER_REQUEST).min(MAX_SAVED_RETRIES);
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
