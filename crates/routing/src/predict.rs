//! How long a replica is predicted to take for a request.
//!
//! ```text
//!   first token   = queued * token_ms            the prompts before it
//!                 + prefill(uncached, cached)    its own
//!                 + decode(requests)             the step that is running, and the streams beside it
//!                 + over * STEPS_PER_SLOT steps  waiting for a slot when the batch is full
//!   whole answer  = first token + output * decode(requests + 1)
//! ```
//!
//! `queued` is the larger of the engine's own backlog (it counts other gateways' work, but is a step old) and
//! what this gateway has sent and not seen answered (exact, but its own alone). What a step costs, engines
//! measure themselves; of one that does not say, prompts that finished tell its speed. Either is drawn
//! towards the fleet's median as it ages, so that a replica that was slow once is tried again.
//!
//! Engines fit a step's cost to their last few dozen steps, and fits of equal replicas differ by a tenth or
//! two: taken at their word, one of them would get most of a burst. So replicas of one shape count as equal
//! until one is predicted to be `LIKE` times as slow as the one in the middle, and as what it says from
//! `UNLIKE` times on.

use std::collections::BTreeMap;

use crate::candidate::{Candidate, StepCost};
use crate::estimate::{Estimate, trust};

/// Prompt tokens per millisecond taken for a fleet on which nothing was measured.
const UNKNOWN_SPEED: f64 = 1.0;
/// Steps after which a full batch is expected to free one slot.
const STEPS_PER_SLOT: f64 = 16.0;
/// Output of a request while none has been seen to end.
const USUAL_OUTPUT_TOKENS: f64 = 128.0;
/// How much slower or faster a replica's steps are predicted to be before it counts as another kind, a little
/// and wholly.
const LIKE: f64 = 1.25;
const UNLIKE: f64 = 1.5;
/// Of a prompt, in a step by which replicas are compared.
const PART_TOKENS: f64 = 32.0;
/// A measurement that nothing can be drawn towards, as it is of another shape, holds for so long.
const OLD_MS: f64 = 300_000.0;
/// Slots of an engine that does not tell.
const UNKNOWN_SLOTS: f64 = 256.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Prediction {
    pub(crate) first_token_ms: f64,
    pub(crate) total_ms: f64,
}

/// What was measured of the replicas, by their index.
#[derive(Debug, Default)]
pub(crate) struct Predictor {
    replicas: Vec<Measured>,
    output_tokens: Estimate,
}

#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    speed: Estimate,
    /// How many steps the engine had run when they last changed, and when that was.
    steps: u64,
    steps_at_ms: f64,
}

/// What a fleet's steps cost, replica by replica, at one time.
#[derive(Debug)]
pub(crate) struct Costs {
    costs: Vec<StepCost>,
    /// What each one's own measurement says; `None` if there is none, or it is old.
    own: Vec<Option<StepCost>>,
    /// Whether engines have told what a step costs: without it, what an output costs is unknown.
    told: bool,
    pub(crate) output_tokens: f64,
}

impl Predictor {
    pub(crate) fn observe_prefill(
        &mut self,
        index: usize,
        tokens: usize,
        took_ms: f64,
        now_ms: f64,
    ) {
        if tokens > 0 {
            self.measured(index)
                .speed
                .observe(tokens as f64 / took_ms, now_ms);
        }
    }

    pub(crate) fn observe_output(&mut self, tokens: usize, now_ms: f64) {
        self.output_tokens.observe(tokens as f64, now_ms);
    }

    pub(crate) fn forget(&mut self, index: usize) {
        if let Some(measured) = self.replicas.get_mut(index) {
            *measured = Measured::default();
        }
    }

    /// Whether anything at all was measured of how long prompts take.
    pub(crate) fn knows(&self, candidates: &[Candidate]) -> bool {
        candidates
            .iter()
            .any(|candidate| candidate.cost.is_measured())
            || self
                .replicas
                .iter()
                .any(|measured| measured.speed.mean().is_some())
    }

    /// Notes which engines have run steps since the last look.
    pub(crate) fn look(&mut self, candidates: &[Candidate], now_ms: f64) {
        for candidate in candidates {
            let measured = self.measured(candidate.index);
            if measured.steps != candidate.steps {
                measured.steps = candidate.steps;
                measured.steps_at_ms = now_ms;
            }
        }
    }

    /// What each candidate's steps cost, in their order.
    pub(crate) fn costs(
        &self,
        candidates: &[Candidate],
        max_tokens: Option<u32>,
        now_ms: f64,
    ) -> Costs {
        let usual = self.output_tokens.mean().unwrap_or(USUAL_OUTPUT_TOKENS);
        let output_tokens = max_tokens.map_or(usual, |most| usual.min(f64::from(most)));
        let told: Vec<&StepCost> = candidates
            .iter()
            .map(|candidate| &candidate.cost)
            .filter(|cost| cost.is_measured())
            .collect();
        let Some(typical) = median(&told) else {
            let typical = self.typical_speed();
            let costs = candidates
                .iter()
                .map(|candidate| self.guess(candidate, typical, now_ms))
                .collect();
            return Costs {
                costs,
                own: vec![None; candidates.len()],
                told: false,
                output_tokens,
            };
        };
        let middles = middles(candidates);
        let (costs, own) = candidates
            .iter()
            .map(|candidate| {
                let middle = middles.get(&candidate.tensor_parallel_size);
                let (true, Some(middle)) = (candidate.cost.is_measured(), middle) else {
                    return (typical, None);
                };
                let age_ms = self
                    .replicas
                    .get(candidate.index)
                    .map_or(0.0, |measured| now_ms - measured.steps_at_ms);
                let own = middle.between(&candidate.cost, unlike(candidate, middle));
                let aged = typical.between(&own, trust(age_ms));
                (aged, (age_ms < OLD_MS).then_some(own))
            })
            .unzip();
        Costs {
            costs,
            own,
            told: true,
            output_tokens,
        }
    }

    /// From the speed of prompts and the last step alone.
    fn guess(&self, candidate: &Candidate, typical_speed: f64, now_ms: f64) -> StepCost {
        let speed = self
            .replicas
            .get(candidate.index)
            .map_or(typical_speed, |measured| {
                measured.speed.aged(typical_speed, now_ms)
            });
        // An idle engine's last step tells of a batch that is gone: it does not count then.
        let step_ms = if candidate.step_ms.is_finite() && candidate.requests() > 0.0 {
            f64::from(candidate.step_ms.max(0.0))
        } else {
            0.0
        };
        let token_ms = 1.0 / speed.max(1e-6);
        StepCost {
            fixed_ms: step_ms,
            token_ms,
            attended_ms: 0.0,
            request_ms: step_ms / slots(candidate),
        }
    }

    /// Median of the measured speeds, tokens per millisecond.
    fn typical_speed(&self) -> f64 {
        let mut known: Vec<f64> = self
            .replicas
            .iter()
            .filter_map(|m| m.speed.mean())
            .collect();
        known.sort_by(f64::total_cmp);
        known.get(known.len() / 2).copied().unwrap_or(UNKNOWN_SPEED)
    }

    fn measured(&mut self, index: usize) -> &mut Measured {
        if self.replicas.len() <= index {
            self.replicas.resize(index + 1, Measured::default());
        }
        &mut self.replicas[index]
    }
}

impl Costs {
    /// For `candidates[at]`, with `cached` of the prompt's tokens in its cache.
    pub(crate) fn predict(
        &self,
        candidate: &Candidate,
        at: usize,
        prompt_tokens: usize,
        cached: usize,
    ) -> Prediction {
        let cost = &self.costs[at];
        let queued = candidate.backlog_tokens.max(candidate.own_tokens as u64) as f64;
        let requests = candidate.requests();
        let context = candidate.context_tokens as f64;
        let over = (requests + 1.0 - slots(candidate)).max(0.0);
        let running_ms = if requests == 0.0 {
            0.0
        } else {
            cost.decode_ms(requests, context)
        };
        let next_ms = cost.decode_ms(requests + 1.0, context + prompt_tokens as f64);
        let uncached = prompt_tokens.saturating_sub(cached) as f64;
        let first_token_ms = queued * cost.token_ms
            + cost.prefill_ms(uncached, cached as f64)
            + running_ms
            + next_ms.max(1.0) * over * STEPS_PER_SLOT
            // Even before any step was timed, fewer requests are better.
            + requests * 1e-3;
        let decode_ms = if self.told {
            self.output_tokens * next_ms
        } else {
            0.0
        };
        Prediction {
            first_token_ms,
            total_ms: first_token_ms + decode_ms,
        }
    }

    pub(crate) fn of(&self, at: usize) -> &StepCost {
        &self.costs[at]
    }

    /// Its own measurement, if that is not old.
    pub(crate) fn own(&self, at: usize) -> Option<&StepCost> {
        self.own[at].as_ref()
    }
}

pub(crate) fn slots(candidate: &Candidate) -> f64 {
    match candidate.max_num_seqs {
        0 => UNKNOWN_SLOTS,
        slots => f64::from(slots),
    }
}

/// The cost in the middle of what replicas of each shape tell.
fn middles(candidates: &[Candidate]) -> BTreeMap<u32, StepCost> {
    let mut told: BTreeMap<u32, Vec<&StepCost>> = BTreeMap::new();
    for candidate in candidates.iter().filter(|one| one.cost.is_measured()) {
        let shape = candidate.tensor_parallel_size;
        told.entry(shape).or_default().push(&candidate.cost);
    }
    told.iter()
        .filter_map(|(shape, told)| Some((*shape, median(told)?)))
        .collect()
}

/// Whether a candidate is of another kind than the replica in the middle, from 0 to 1: by the step that it would run
/// next, and a part of a prompt.
fn unlike(candidate: &Candidate, middle: &StepCost) -> f64 {
    let context = candidate.context_tokens as f64;
    let next_ms = |cost: &StepCost| {
        cost.prefill_ms(PART_TOKENS, 0.0) + cost.decode_ms(candidate.requests() + 1.0, context)
    };
    let ratio = (next_ms(&candidate.cost) / next_ms(middle)).ln().abs();
    ((ratio - LIKE.ln()) / (UNLIKE.ln() - LIKE.ln())).clamp(0.0, 1.0)
}

/// The cost that is in the middle by what a prompt's token takes.
fn median(told: &[&StepCost]) -> Option<StepCost> {
    let mut told = told.to_vec();
    told.sort_by(|a, b| a.token_ms.total_cmp(&b.token_ms));
    told.get(told.len() / 2).map(|cost| **cost)
}
