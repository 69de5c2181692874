//! One request of a fake engine: which ids it gives and when it ends.

use std::time::Instant;

use scalellm_engine_link::{BlockHash, Submission, proto};

use crate::settings::{Garbage, Output, Settings};

pub(crate) struct Sequence {
    pub(crate) submission: Submission,
    /// When its next output is due.
    pub(crate) due: Instant,
    /// Of the prompt's blocks, where they are remembered.
    pub(crate) hashes: Vec<BlockHash>,
    cached_tokens: u32,
    /// Ids given, those of earlier attempts included.
    given: u32,
    outputs: u32,
    times: proto::StageTimes,
}

impl Sequence {
    /// `queued_us` and `scheduled_us` are Unix times, the latter when its prompt is begun with.
    pub(crate) fn new(
        submission: Submission,
        due: Instant,
        queued_us: u64,
        scheduled_us: u64,
        hashes: Vec<BlockHash>,
        cached_tokens: u32,
    ) -> Self {
        let given = u32::try_from(submission.submit.resume_ids.len()).unwrap_or(u32::MAX);
        let times = proto::StageTimes {
            queued_us,
            first_scheduled_us: scheduled_us,
            ..proto::StageTimes::default()
        };
        Self {
            submission,
            due,
            hashes,
            cached_tokens,
            given,
            outputs: 0,
            times,
        }
    }

    /// Tokens in the KV cache.
    pub(crate) fn num_tokens(&self) -> u32 {
        self.submission
            .submit
            .prompt_tokens
            .saturating_add(self.given)
    }

    /// Prompt tokens that are to be computed.
    pub(crate) fn uncached_tokens(&self) -> u32 {
        self.submission
            .submit
            .prompt_tokens
            .saturating_sub(self.cached_tokens)
    }

    /// Prompt and output, as far as it was given.
    pub(crate) fn all_ids(&self, settings: &Settings) -> Vec<u32> {
        let submit = &self.submission.submit;
        let output = (0..self.given).map(|at| next_id(submit, settings, at));
        submit.prompt_ids.iter().copied().chain(output).collect()
    }

    pub(crate) fn is_first(&self) -> bool {
        self.outputs == 0
    }

    /// The next output; its finish reason says whether it is the last.
    pub(crate) fn step(&mut self, settings: &Settings, now_us: u64) -> proto::Output {
        let mut output = proto::Output::default();
        if self
            .submission
            .deadline_us
            .is_some_and(|deadline| now_us >= deadline)
        {
            output.finish_reason = proto::FinishReason::Deadline as i32;
        } else {
            self.give_ids(settings, &mut output);
        }
        let submit = &self.submission.submit;
        let submit_logprobs = submit
            .sampling
            .as_ref()
            .and_then(|sampling| sampling.logprobs);
        if let Some(count) = submit_logprobs {
            output.logprobs = output
                .token_ids
                .iter()
                .map(|&id| logprobs(id, count, settings.vocab_size))
                .collect();
        }
        self.outputs += 1;
        self.times.steps += 1;
        if self.outputs == 1 {
            self.times.first_token_us = now_us;
            self.times.prefill = computing(self.times.first_scheduled_us, now_us);
            output.cached_tokens = self.cached_tokens;
            output.times = Some(self.times.clone());
            // Those of a resumed request went out with its first attempt.
            if let Some(count) = submit
                .prompt_logprobs
                .filter(|_| submit.resume_ids.is_empty())
            {
                output.prompt_logprobs =
                    prompt_logprobs(&submit.prompt_ids, count, settings.vocab_size);
            }
        }
        if output.finish_reason != proto::FinishReason::Unspecified as i32 {
            self.times.finished_us = now_us;
            self.times.decode = computing(self.times.first_token_us, now_us);
            output.times = Some(self.times.clone());
        }
        output
    }

    fn give_ids(&mut self, settings: &Settings, output: &mut proto::Output) {
        let submit = &self.submission.submit;
        let limit = submit
            .max_tokens
            .min(settings.max_tokens.unwrap_or(u32::MAX));
        for _ in 0..settings.tokens_per_step {
            let at = self.given;
            self.given += 1;
            let eos =
                settings.eos_after.is_some_and(|after| self.given > after) && !submit.ignore_eos;
            let id = match settings.eos_token_ids.first() {
                Some(&eos_id) if eos => eos_id,
                _ => next_id(submit, settings, at),
            };
            output.token_ids.push(id);
            let may_stop = self.given >= submit.min_tokens;
            if eos && may_stop {
                output.finish_reason = proto::FinishReason::Eos as i32;
            } else if may_stop && submit.stop_token_ids.contains(&id) {
                output.finish_reason = proto::FinishReason::StopToken as i32;
                output.stop_token_id = id;
            } else if settings
                .faults
                .error_after
                .is_some_and(|after| self.given >= after)
            {
                output.finish_reason = proto::FinishReason::Error as i32;
                output.error = "the fake engine was told to fail".to_owned();
            } else if settings
                .faults
                .cancel_after
                .is_some_and(|after| self.given >= after)
            {
                output.finish_reason = proto::FinishReason::Cancelled as i32;
            } else if self.given >= limit {
                output.finish_reason = proto::FinishReason::Length as i32;
            } else {
                continue;
            }
            break;
        }
        match settings.faults.garbage {
            Some(Garbage::Ids) => output.token_ids.iter_mut().for_each(|id| *id = u32::MAX),
            Some(Garbage::TooManyIds) => output.token_ids.resize(submit.max_tokens as usize + 1, 1),
            Some(Garbage::Bytes) | None => {}
        }
    }
}

/// All that a fake engine does in a time, as an engine would say it.
pub(crate) fn computing(from_us: u64, to_us: u64) -> Vec<proto::PhaseTime> {
    vec![proto::PhaseTime {
        name: "forward".to_owned(),
        us: to_us.saturating_sub(from_us),
    }]
}

fn next_id(submit: &proto::Submit, settings: &Settings, at: u32) -> u32 {
    match &settings.output {
        Output::Echo => submit.prompt_ids[at as usize % submit.prompt_ids.len()],
        Output::Fixed { ids } => ids[at as usize % ids.len()],
        Output::CountUp { from } => from.wrapping_add(at) % settings.vocab_size,
        Output::Noise => {
            let seed = submit.sampling.as_ref().map_or(0, |sampling| sampling.seed);
            let mixed = mix(mix(seed) ^ (u64::from(submit.choice) << 32 | u64::from(at)));
            u32::try_from(mixed % u64::from(settings.vocab_size)).unwrap_or(0)
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The id itself as the most likely, then its neighbours, each a nat less likely.
fn logprobs(id: u32, count: u32, vocab_size: u32) -> proto::TokenLogprobs {
    let tops = 0..count.min(vocab_size);
    proto::TokenLogprobs {
        token_id: id,
        logprob: -0.5,
        rank: 1,
        top_ids: tops
            .clone()
            .map(|k| id.wrapping_add(k) % vocab_size)
            .collect(),
        top_logprobs: tops.map(|k| -0.5 - k as f32).collect(),
    }
}

fn prompt_logprobs(prompt_ids: &[u32], count: u32, vocab_size: u32) -> Vec<proto::TokenLogprobs> {
    let rest = prompt_ids
        .iter()
        .skip(1)
        .map(|&id| logprobs(id, count, vocab_size));
    std::iter::once(proto::TokenLogprobs::default())
        .chain(rest)
        .collect()
}
