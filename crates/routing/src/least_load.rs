//! Least load: the replica that is predicted to answer first.
//!
//! The prediction for a prompt of `p` tokens is
//!
//! ```text
//!   (queued + p) / speed                    the prompts before it, and its own
//! + step * (1 + requests / max_num_seqs)    what the running requests make each step cost
//! + step * over * STEPS_PER_SLOT            waiting for a slot when the batch is full
//! ```
//!
//! `queued` is the larger of the engine's own backlog (it counts other gateways' work, but is a step old)
//! and the prompt tokens this gateway has sent and not seen answered (exact, but its own alone). `speed` is
//! measured from prompts that finished, and drawn towards the fleet's median as the measurement ages, so
//! that a replica that was slow once is tried again.

use crate::estimate::Estimate;

/// Prompt tokens per millisecond taken for a fleet on which nothing was measured.
const UNKNOWN_SPEED: f64 = 1.0;
/// Steps after which a full batch is expected to free one slot.
const STEPS_PER_SLOT: f64 = 16.0;

/// What is known of one replica that could take the request.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Candidate {
    /// Names the replica; below the `replicas` of [`LeastLoad::new`].
    pub index: usize,
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens that the engine has accepted and not computed.
    pub backlog_tokens: u64,
    /// Of the last step; 0 if there was none.
    pub step_ms: f32,
    /// Requests that the engine runs at once; 0 if unknown.
    pub max_num_seqs: u32,
    /// Of this gateway: requests without an end, and prompt tokens without an answer.
    pub own_requests: usize,
    pub own_tokens: usize,
}

/// The chosen replica and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick {
    pub index: usize,
    pub predicted_ms: f64,
}

/// State of the policy for one model's replicas.
#[derive(Debug)]
pub struct LeastLoad {
    speeds: Vec<Estimate>,
    rotation: usize,
}

impl LeastLoad {
    #[must_use]
    pub fn new(replicas: usize) -> LeastLoad {
        LeastLoad {
            speeds: vec![Estimate::default(); replicas],
            rotation: 0,
        }
    }

    /// A prompt's uncached `tokens` took replica `index` this long from first being scheduled to its first token.
    pub fn observe_prefill(&mut self, index: usize, tokens: usize, took_ms: f64, now_ms: f64) {
        if let Some(speed) = self.speeds.get_mut(index)
            && tokens > 0
        {
            speed.observe(tokens as f64 / took_ms, now_ms);
        }
    }

    /// The candidate with the least predicted time; equal ones take turns. `None` if there is none.
    pub fn pick(
        &mut self,
        candidates: &[Candidate],
        prompt_tokens: usize,
        now_ms: f64,
    ) -> Option<Pick> {
        if candidates.is_empty() {
            return None;
        }
        let typical = self.typical_speed();
        let start = self.rotation % candidates.len();
        let (later, sooner) = candidates.split_at(start);
        let mut best: Option<Pick> = None;
        for candidate in sooner.iter().chain(later) {
            let speed = self
                .speeds
                .get(candidate.index)
                .map_or(typical, |s| s.aged(typical, now_ms));
            let predicted_ms = predict_ms(candidate, prompt_tokens, speed);
            if best.is_none_or(|b| predicted_ms < b.predicted_ms) {
                best = Some(Pick {
                    index: candidate.index,
                    predicted_ms,
                });
            }
        }
        let at = best.and_then(|b| candidates.iter().position(|c| c.index == b.index));
        self.rotation = at.map_or(0, |at| at + 1);
        best
    }

    /// The least predicted time until a prompt's first token, uncached; `None` without a candidate or while no prompt
    /// was measured.
    #[must_use]
    pub fn predict_ms(
        &self,
        candidates: &[Candidate],
        prompt_tokens: usize,
        now_ms: f64,
    ) -> Option<f64> {
        self.speeds.iter().find_map(Estimate::mean)?;
        let typical = self.typical_speed();
        candidates
            .iter()
            .map(|candidate| {
                let speed = self
                    .speeds
                    .get(candidate.index)
                    .map_or(typical, |speed| speed.aged(typical, now_ms));
                predict_ms(candidate, prompt_tokens, speed)
            })
            .min_by(f64::total_cmp)
    }

    /// Median of the measured speeds, tokens per millisecond.
    fn typical_speed(&self) -> f64 {
        let mut known: Vec<f64> = self.speeds.iter().filter_map(Estimate::mean).collect();
        known.sort_by(f64::total_cmp);
        known.get(known.len() / 2).copied().unwrap_or(UNKNOWN_SPEED)
    }
}

fn predict_ms(candidate: &Candidate, prompt_tokens: usize, speed: f64) -> f64 {
    let queued = candidate.backlog_tokens.max(candidate.own_tokens as u64);
    let requests = (u64::from(candidate.running) + u64::from(candidate.waiting))
        .max(candidate.own_requests as u64);
    let slots = if candidate.max_num_seqs == 0 {
        256.0
    } else {
        f64::from(candidate.max_num_seqs)
    };
    let over = (requests as f64 + 1.0 - slots).max(0.0);
    // An idle engine's last step tells of a batch that is gone: it does not count then.
    let step_ms = if candidate.step_ms.is_finite() {
        f64::from(candidate.step_ms.max(0.0))
    } else {
        0.0
    };
    let busy_step_ms = if requests == 0 { 0.0 } else { step_ms };
    (queued as f64 + prompt_tokens as f64) / speed.max(1e-6)
        + busy_step_ms * (1.0 + requests as f64 / slots)
        + step_ms.max(1.0) * over * STEPS_PER_SLOT
        // Even before any step was timed, fewer requests are better.
        + requests as f64 * 1e-3
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn idle(index: usize) -> Candidate {
        Candidate {
            index,
            max_num_seqs: 64,
            step_ms: 20.0,
            ..Candidate::default()
        }
    }

    #[test]
    fn no_candidate_no_pick() {
        assert_eq!(LeastLoad::new(2).pick(&[], 10, 0.0), None);
    }

    #[test]
    fn predicts_nothing_before_a_prompt_was_measured() {
        let mut policy = LeastLoad::new(2);
        let fleet = [idle(0), idle(1)];
        assert_eq!(policy.predict_ms(&fleet, 100, 0.0), None);
        policy.observe_prefill(0, 100, 50.0, 0.0);
        assert_eq!(policy.predict_ms(&[], 100, 0.0), None);
        let predicted_ms = policy.predict_ms(&fleet, 1000, 0.0).unwrap();
        assert!((499.0..501.0).contains(&predicted_ms), "{predicted_ms}");
    }

    #[test]
    fn equal_replicas_take_turns() {
        let mut policy = LeastLoad::new(3);
        let fleet = [idle(0), idle(1), idle(2)];
        let picks: Vec<usize> = (0..6)
            .map(|_| policy.pick(&fleet, 10, 0.0).unwrap().index)
            .collect();
        assert_eq!(picks, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn backlog_weighs_by_measured_speed_and_not_by_count() {
        let mut policy = LeastLoad::new(2);
        policy.observe_prefill(0, 1000, 100.0, 0.0);
        policy.observe_prefill(1, 1000, 1000.0, 0.0);
        let fleet = [
            Candidate {
                backlog_tokens: 2000,
                running: 2,
                ..idle(0)
            },
            idle(1),
        ];
        assert_eq!(policy.pick(&fleet, 1000, 0.0).unwrap().index, 0);
        let fleet = [
            Candidate {
                backlog_tokens: 20_000,
                running: 2,
                ..idle(0)
            },
            idle(1),
        ];
        assert_eq!(policy.pick(&fleet, 1000, 0.0).unwrap().index, 1);
    }

    #[test]
    fn own_tokens_count_before_the_engine_reports_them() {
        let mut policy = LeastLoad::new(2);
        let fleet = [
            Candidate {
                own_tokens: 500,
                own_requests: 1,
                ..idle(0)
            },
            idle(1),
        ];
        for _ in 0..4 {
            assert_eq!(policy.pick(&fleet, 10, 0.0).unwrap().index, 1);
        }
    }

    #[test]
    fn a_full_batch_is_avoided() {
        let mut policy = LeastLoad::new(2);
        let full = Candidate {
            running: 64,
            waiting: 8,
            ..idle(0)
        };
        let busy = Candidate {
            running: 60,
            step_ms: 40.0,
            ..idle(1)
        };
        assert_eq!(policy.pick(&[full, busy], 10, 0.0).unwrap().index, 1);
    }

    #[test]
    fn a_once_slow_replica_is_tried_again() {
        let mut policy = LeastLoad::new(3);
        policy.observe_prefill(0, 100, 10_000.0, 0.0);
        policy.observe_prefill(1, 100, 10.0, 0.0);
        policy.observe_prefill(2, 100, 10.0, 0.0);
        let fleet = [
            idle(0),
            Candidate {
                backlog_tokens: 200,
                ..idle(1)
            },
            Candidate {
                backlog_tokens: 200,
                ..idle(2)
            },
        ];
        assert_ne!(policy.pick(&fleet, 100, 0.0).unwrap().index, 0);
        assert_eq!(policy.pick(&fleet, 100, 900_000.0).unwrap().index, 0);
    }

    /// Requests come one a millisecond; each replica works its tokens off at its own speed.
    #[test]
    fn shares_follow_speed() {
        let speeds = [3.0, 3.0, 1.0];
        let mut policy = LeastLoad::new(3);
        let mut backlog = [0.0_f64; 3];
        let mut counts = [0_u32; 3];
        for (index, speed) in speeds.iter().enumerate() {
            policy.observe_prefill(index, 300, 300.0 / speed, 0.0);
        }
        for now_ms in 0..20_000 {
            for (index, left) in backlog.iter_mut().enumerate() {
                *left = (*left - speeds[index]).max(0.0);
                policy.observe_prefill(index, 300, 300.0 / speeds[index], f64::from(now_ms));
            }
            let fleet: Vec<Candidate> = (0..3)
                .map(|index| Candidate {
                    backlog_tokens: backlog[index] as u64,
                    running: u32::from(backlog[index] > 0.0),
                    step_ms: 1.0,
                    ..idle(index)
                })
                .collect();
            // 6.5 tokens a millisecond for a fleet that does 7.
            if now_ms % 10 == 0 {
                let pick = policy.pick(&fleet, 65, f64::from(now_ms)).unwrap();
                backlog[pick.index] += 65.0;
                counts[pick.index] += 1;
            }
        }
        let slow_share = f64::from(counts[2]) / f64::from(counts.iter().sum::<u32>());
        assert!(
            (0.05..0.2).contains(&slow_share),
            "the slow replica got {slow_share} of the requests"
        );
        assert!(
            backlog.iter().all(|left| *left < 500.0),
            "work piled up: {backlog:?}"
        );
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (
            0..300_u32,
            0..300_u32,
            0..100_000_u64,
            0.0..2000.0_f32,
            0..300_u32,
            0..300_usize,
            0..50_000_usize,
        );
        proptest::collection::vec(one, 1..8).prop_map(|all| {
            all.into_iter()
                .enumerate()
                .map(
                    |(
                        index,
                        (
                            running,
                            waiting,
                            backlog_tokens,
                            step_ms,
                            max_num_seqs,
                            own_requests,
                            own_tokens,
                        ),
                    )| {
                        Candidate {
                            index,
                            running,
                            waiting,
                            backlog_tokens,
                            step_ms,
                            max_num_seqs,
                            own_requests,
                            own_tokens,
                        }
                    },
                )
                .collect()
        })
    }

    proptest! {
        #[test]
        fn the_pick_is_a_candidate_with_a_finite_prediction(fleet in candidates(), prompt in 0..100_000_usize) {
            let pick = LeastLoad::new(fleet.len()).pick(&fleet, prompt, 0.0).unwrap();
            prop_assert!(pick.index < fleet.len());
            prop_assert!(pick.predicted_ms.is_finite() && pick.predicted_ms >= 0.0);
        }

        #[test]
        fn more_load_never_attracts(fleet in candidates(), prompt in 0..10_000_usize, more in 1..10_000_u64) {
            let pick = LeastLoad::new(fleet.len()).pick(&fleet, prompt, 0.0).unwrap();
            for other in (0..fleet.len()).filter(|i| *i != pick.index) {
                let mut heavier = fleet.clone();
                heavier[other].backlog_tokens += more;
                heavier[other].running += 1;
                let again = LeastLoad::new(fleet.len()).pick(&heavier, prompt, 0.0).unwrap();
                prop_assert_ne!(again.index, other);
            }
        }

        #[test]
        fn odd_numbers_from_an_engine_do_no_harm(step_ms in prop::num::f32::ANY, took in prop::num::f64::ANY) {
            let mut policy = LeastLoad::new(2);
            policy.observe_prefill(0, 10, took, 0.0);
            let pick = policy.pick(&[Candidate { step_ms, running: 3, ..idle(0) }, idle(1)], 10, 1.0).unwrap();
            prop_assert!(pick.predicted_ms.is_finite());
        }
    }
}
