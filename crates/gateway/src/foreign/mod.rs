//! Models that servers elsewhere compute: vLLM, TGI, SGLang, llama.cpp, any that speaks OpenAI's API over HTTP.
//!
//! ```text
//! asked      what of a request the gateway reads, and the bytes that it changes
//! relay      choice of the upstream, retries before the first byte, the answer's head
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
mod framing;
mod head;
mod link;
mod relay;
mod stream;
mod top_level;
mod upstream;

#[cfg(any(test, feature = "fuzzing"))]
pub use asked::Asked;
#[cfg(any(test, feature = "fuzzing"))]
pub use events::{Answers, Events};
pub use exchange::{Exchange, Failure};
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
    turns: Mutex<Turns>,
}

struct Turns {
    /// Of smooth weighted round robin: how much each upstream's turn is due.
    due: Vec<i64>,
    saved_retries: f64,
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
        let turns = Turns {
            due: vec![0; upstreams.len()],
            saved_retries: MAX_SAVED_RETRIES,
        };
        let is_drained = |upstream: &UpstreamConfig| config.drained.contains(&upstream.url);
        Ok(ForeignModel {
            served,
            drained: config.upstreams.iter().map(is_drained).collect(),
            upstreams,
            turns: Mutex::new(turns),
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

    /// Whose turn it is among those that are well and not in `avoid`: by weight, fallbacks only if there is no other.
    fn pick(&self, avoid: &[usize]) -> Option<usize> {
        let among = |fallback: bool| {
            self.usable()
                .filter(|(index, upstream)| {
                    upstream.config.fallback == fallback && !avoid.contains(index)
                })
                .map(|(index, upstream)| (index, i64::from(upstream.config.weight)))
                .collect::<Vec<_>>()
        };
        let mut candidates = among(false);
        if candidates.is_empty() {
            candidates = among(true);
        }
        if let [(only, _)] = candidates[..] {
            return Some(only);
        }
        next_turn(&mut self.turns.lock().due, &candidates)
    }

    fn request_came(&self) {
        let mut turns = self.turns.lock();
        turns.saved_retries = (turns.saved_retries + RETRIES_PER_REQUEST).min(MAX_SAVED_RETRIES);
    }

    fn may_retry(&self) -> bool {
        let mut turns = self.turns.lock();
        let may = turns.saved_retries >= 1.0;
        if may {
            turns.saved_retries -= 1.0;
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

/// Smooth weighted round robin: everybody's turn comes nearer by its weight, and whose is nearest pays for all.
fn next_turn(due: &mut [i64], weights: &[(usize, i64)]) -> Option<usize> {
    for (index, weight) in weights {
        due[*index] += weight;
    }
    let (next, _) = weights
        .iter()
        .max_by_key(|(index, _)| (due[*index], std::cmp::Reverse(*index)))?;
    due[*next] -= weights.iter().map(|(_, weight)| weight).sum::<i64>();
    Some(*next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_shared_by_weight() {
        let mut due = vec![0; 3];
        let weights = [(0, 5), (2, 1)];
        let turns: Vec<usize> = (0..12)
            .filter_map(|_| next_turn(&mut due, &weights))
            .collect();
        assert_eq!(turns, [0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(next_turn(&mut due, &[]), None);
    }
}
