//! One model's router: what was measured and heard of its replicas, and a policy on top.

use crate::candidate::{Candidate, Request};
use crate::hash::BlockHash;
use crate::policy::{Choice, Policy, Reason};
use crate::predict::{Costs, Prediction, Predictor};
use crate::prefix_index::PrefixIndex;
use crate::{least_load, prefix, session, shape};

/// A sent prompt's blocks are expected for this long after its predicted first token.
const EXPECT_MS: f64 = 2_000.0;

/// State of the routing of one model.
#[derive(Debug)]
pub struct Router {
    policy: Policy,
    predictor: Predictor,
    index: PrefixIndex,
    rotation: usize,
}

/// Everything a policy looks at: the candidates, each with its cached tokens and its prediction.
pub(crate) struct View<'a> {
    pub(crate) candidates: &'a [Candidate],
    pub(crate) request: &'a Request<'a>,
    /// Tokens of the prompt.
    pub(crate) cached: Vec<usize>,
    pub(crate) predictions: Vec<Prediction>,
    pub(crate) costs: Costs,
    /// Where to begin looking, so that equal candidates take turns.
    start: usize,
}

impl View<'_> {
    /// Of the candidates that `fits` allows, the place of the one with the least `value`; equal ones take turns.
    pub(crate) fn least(
        &self,
        fits: impl Fn(usize) -> bool,
        value: impl Fn(usize) -> f64,
    ) -> Option<usize> {
        let count = self.candidates.len();
        let mut best: Option<(usize, f64)> = None;
        for at in (0..count).map(|offset| (self.start + offset) % count) {
            if !fits(at) {
                continue;
            }
            let found = value(at);
            if best.is_none_or(|(_, least)| found < least) {
                best = Some((at, found));
            }
        }
        best.map(|(at, _)| at)
    }

    pub(crate) fn soonest_done(&self, fits: impl Fn(usize) -> bool) -> Option<usize> {
        self.least(fits, |at| self.predictions[at].total_ms)
    }
}

impl Router {
    #[must_use]
    pub fn new(policy: Policy) -> Router {
        Router {
            policy,
            predictor: Predictor::default(),
            index: PrefixIndex::default(),
            rotation: 0,
        }
    }

    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// Chooses for a request that will be sent there now: its blocks are expected at the chosen replica from here on.
    /// `None` without a candidate.
    pub fn pick(
        &mut self,
        candidates: &[Candidate],
        request: &Request<'_>,
        now_ms: f64,
    ) -> Option<Choice> {
        if candidates.is_empty() {
            return None;
        }
        self.predictor.look(candidates, now_ms);
        let view = self.view(candidates, request, now_ms);
        let (at, reason) = match self.policy {
            _ if candidates.len() == 1 => (0, Reason::Only),
            Policy::LeastLoad => least_load::choose(&view)?,
            Policy::Prefix => prefix::choose(&view)?,
            Policy::Shape => shape::choose(&view)?,
            Policy::Session => session::choose(&view)?,
        };
        self.rotation = at + 1;
        let index = candidates[at].index;
        let predicted_ms = view.predictions[at].first_token_ms;
        if request.block_size > 0 && request.block_size == candidates[at].block_size {
            let until_ms = now_ms + predicted_ms + EXPECT_MS;
            self.index.expect(index, request.hashes, now_ms, until_ms);
        }
        Some(Choice {
            index,
            policy: self.policy,
            reason,
            predicted_ms,
            cached_tokens: view.cached[at],
        })
    }

    /// The least predicted time until a prompt's first token, uncached; `None` without a candidate or while no prompt
    /// was measured.
    #[must_use]
    pub fn predict_first_token_ms(
        &self,
        candidates: &[Candidate],
        prompt_tokens: usize,
        now_ms: f64,
    ) -> Option<f64> {
        if !self.predictor.knows(candidates) {
            return None;
        }
        let request = Request {
            prompt_tokens,
            ..Request::default()
        };
        let view = self.view(candidates, &request, now_ms);
        view.predictions
            .iter()
            .map(|p| p.first_token_ms)
            .min_by(f64::total_cmp)
    }

    /// A prompt's uncached `tokens` took a replica this long from first being scheduled to its first token.
    pub fn observe_prefill(&mut self, index: usize, tokens: usize, took_ms: f64, now_ms: f64) {
        self.predictor
            .observe_prefill(index, tokens, took_ms, now_ms);
    }

    /// A request ended with so many tokens.
    pub fn observe_output(&mut self, tokens: usize, now_ms: f64) {
        self.predictor.observe_output(tokens, now_ms);
    }

    /// A replica's prefix cache has these blocks now.
    pub fn store(&mut self, index: usize, hashes: impl IntoIterator<Item = BlockHash>) {
        self.index.store(index, hashes);
    }

    /// A replica's prefix cache has these blocks no more.
    pub fn remove(&mut self, index: usize, hashes: impl IntoIterator<Item = BlockHash>) {
        self.index.remove(index, hashes);
    }

    /// A replica's prefix cache is unknown: it restarted, or events were lost.
    pub fn clear(&mut self, index: usize) {
        self.index.clear(index);
    }

    /// Another replica will have this index.
    pub fn forget(&mut self, index: usize) {
        self.index.clear(index);
        self.predictor.forget(index);
    }

    /// Blocks that are known to be cached somewhere.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.index.len()
    }

    fn view<'a>(
        &self,
        candidates: &'a [Candidate],
        request: &'a Request<'a>,
        now_ms: f64,
    ) -> View<'a> {
        let costs = self.predictor.costs(candidates, request.max_tokens, now_ms);
        let cached = self.cached(candidates, request, now_ms);
        let predictions = candidates
            .iter()
            .zip(&cached)
            .enumerate()
            .map(|(at, (candidate, cached))| {
                costs.predict(candidate, at, request.prompt_tokens, *cached)
            })
            .collect();
        View {
            candidates,
            request,
            cached,
            predictions,
            costs,
            start: self.rotation % candidates.len().max(1),
        }
    }

    /// Tokens of the prompt that each candidate has; all but one at most, since one has to be computed.
    fn cached(&self, candidates: &[Candidate], request: &Request<'_>, now_ms: f64) -> Vec<usize> {
        if !self.policy.needs_prefixes() || request.hashes.is_empty() || request.block_size == 0 {
            return vec![0; candidates.len()];
        }
        let indices: Vec<usize> = candidates.iter().map(|candidate| candidate.index).collect();
        let most = request.prompt_tokens.saturating_sub(1);
        self.index
            .leading(request.hashes, &indices, now_ms)
            .into_iter()
            .zip(candidates)
            .map(
                |(blocks, candidate)| match candidate.block_size == request.block_size {
                    true => (blocks * request.block_size as usize).min(most),
                    false => 0,
                },
            )
            .collect()
    }
}
