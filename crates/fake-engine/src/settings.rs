//! What a fake engine does, as JSON. Everything has a default: an engine that answers at once.

use std::time::Duration;

use scalellm_engine_link::{EngineInfo, proto};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    pub model: String,
    /// Folder with tokenizer files that Describe names.
    pub model_path: String,
    pub tokenizer_digest: String,
    pub weights_digest: String,
    pub numerics_digest: String,
    /// Names this start of the engine; by default the time.
    pub epoch: Option<u64>,
    pub vocab_size: u32,
    pub max_model_len: u32,
    pub max_num_seqs: u32,
    pub max_waiting: usize,
    pub block_size: u32,
    pub num_blocks: u32,
    pub eos_token_ids: Vec<u32>,
    /// From the arrival of a request (if a place is free) to its first output.
    pub ttft_ms: f64,
    /// From one output of a request to its next.
    pub tbt_ms: f64,
    /// Prompts are computed one after the other, each token that is not cached taking so long.
    pub prefill_ms_per_token: f64,
    /// Added to `tbt_ms` for every running request.
    pub tbt_ms_per_request: f64,
    /// Remembers the beginnings of what it computed, `num_blocks` of them, and tells of it in KV events.
    pub prefix_cache: bool,
    /// Ids in one output.
    pub tokens_per_step: u32,
    /// Ends every request after this many ids, whatever it asked for.
    pub max_tokens: Option<u32>,
    /// Ends with an end-of-sequence id after this many ids, unless the request ignores it.
    pub eos_after: Option<u32>,
    /// Prompt ids that are said to come from the prefix cache, at most all but one; with `prefix_cache` what does.
    pub cached_tokens: u32,
    pub output: Output,
    pub load: LoadNumbers,
    pub faults: Faults,
}

/// Which ids come out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Output {
    /// The prompt's ids, over and over.
    Echo,
    /// These ids, over and over.
    Fixed { ids: Vec<u32> },
    /// The index of each id, from `from`, within the vocabulary.
    CountUp { from: u32 },
    /// A function of (seed, choice, index), so that a replay goes on exactly.
    Noise,
}

/// Replaces numbers of the load that would otherwise be the real ones.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadNumbers {
    pub running: Option<u32>,
    pub waiting: Option<u32>,
    pub backlog_tokens: Option<u64>,
    pub kv_blocks_used: Option<u32>,
    pub step_ms: Option<f32>,
    /// Choices of each expert in every step, by one sparse layer; none: a model without experts.
    pub expert_choices: Vec<u64>,
    /// Ranks that divide these experts.
    pub expert_ranks: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// The loop stops coming round after this many steps with outputs.
    pub hang_after_steps: Option<u64>,
    /// How long it hangs; for ever without.
    pub hang_ms: Option<u64>,
    /// Breaks every connection and stops listening after this many outputs, as if killed.
    pub die_after_outputs: Option<u64>,
    /// Ends every request with ERROR after this many ids.
    pub error_after: Option<u32>,
    /// So many requests end like that, and then all is well; without it all do.
    pub error_requests: Option<u64>,
    /// Ends every request with CANCELLED after this many ids, as an engine does that must stop now.
    pub cancel_after: Option<u32>,
    /// Dies, as by `die_after_outputs`, of the first output of a prompt with this id.
    pub poison_id: Option<u32>,
    /// Refuses every Submit while the load looks well.
    pub refuse: Option<Refuse>,
    pub garbage: Option<Garbage>,
    /// Waits before each Welcome.
    pub welcome_delay_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refuse {
    Draining,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Garbage {
    /// Ids beyond the vocabulary.
    Ids,
    /// More ids than `max_tokens`.
    TooManyIds,
    /// Bytes that are no protocol at all, to whoever connects.
    Bytes,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: "fake".to_owned(),
            model_path: String::new(),
            tokenizer_digest: String::new(),
            weights_digest: "fake".to_owned(),
            numerics_digest: "fake".to_owned(),
            epoch: None,
            vocab_size: 32_000,
            max_model_len: 131_072,
            max_num_seqs: 1_024,
            max_waiting: 16_384,
            block_size: 16,
            num_blocks: 65_536,
            eos_token_ids: vec![0],
            ttft_ms: 0.0,
            tbt_ms: 0.0,
            prefill_ms_per_token: 0.0,
            tbt_ms_per_request: 0.0,
            prefix_cache: false,
            tokens_per_step: 1,
            max_tokens: None,
            eos_after: None,
            cached_tokens: 0,
            output: Output::CountUp { from: 1 },
            load: LoadNumbers::default(),
            faults: Faults::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSettings(pub String);

impl std::fmt::Display for BadSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadSettings {}

impl LoadNumbers {
    /// What `steps` steps have made of the experts' use.
    pub(crate) fn expert_use(&self, steps: u64) -> Option<proto::ExpertUse> {
        let ranks = self.expert_ranks.max(1);
        let experts = self.expert_choices.len();
        let each = if ranks > 1 {
            experts / ranks as usize
        } else {
            1
        };
        let parts = self.expert_choices.chunks(each.max(1));
        let busiest = parts.map(|part| part.iter().sum::<u64>()).max()?;
        let read = self.expert_choices.iter().filter(|&&count| count > 0);
        Some(proto::ExpertUse {
            layers: steps,
            read: steps * read.count() as u64,
            busiest: steps * busiest,
            choices: self
                .expert_choices
                .iter()
                .map(|&count| steps * count)
                .collect(),
            ranks,
        })
    }
}

impl Settings {
    /// Reads JSON; a wrong or unknown field is an error that names it.
    pub fn from_json(json: &str) -> Result<Self, BadSettings> {
        let settings: Self =
            serde_json::from_str(json).map_err(|error| BadSettings(error.to_string()))?;
        settings.check()?;
        Ok(settings)
    }

    pub fn check(&self) -> Result<(), BadSettings> {
        for (field, ms) in [
            ("ttft_ms", self.ttft_ms),
            ("tbt_ms", self.tbt_ms),
            ("prefill_ms_per_token", self.prefill_ms_per_token),
            ("tbt_ms_per_request", self.tbt_ms_per_request),
        ] {
            if !(0.0..=86_400_000.0).contains(&ms) {
                return Err(BadSettings(format!(
                    "{field} is {ms}; allowed is 0 to 86400000"
                )));
            }
        }
        let at_least_one = [
            ("vocab_size", self.vocab_size),
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.max_num_seqs),
            ("block_size", self.block_size),
            ("tokens_per_step", self.tokens_per_step),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(BadSettings(format!("{field} is 0; allowed is 1 or more")));
            }
        }
        if matches!(&self.output, Output::Fixed { ids } if ids.is_empty()) {
            return Err(BadSettings(
                "output.ids is empty; allowed is 1 or more ids".to_owned(),
            ));
        }
        Ok(())
    }

    pub(crate) fn info(&self, epoch: u64) -> EngineInfo {
        proto::DescribeResponse {
            model: self.model.clone(),
            model_path: self.model_path.clone(),
            tokenizer_digest: self.tokenizer_digest.clone(),
            weights_digest: self.weights_digest.clone(),
            numerics_digest: self.numerics_digest.clone(),
            epoch,
            vocab_size: self.vocab_size,
            max_model_len: self.max_model_len,
            max_num_seqs: self.max_num_seqs,
            block_size: self.block_size,
            num_blocks: self.num_blocks,
            tensor_parallel_size: 1,
            dtype: "none".to_owned(),
            quantization: "none".to_owned(),
            kv_cache_dtype: "none".to_owned(),
            device: "fake".to_owned(),
            eos_token_ids: self.eos_token_ids.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    pub(crate) fn ttft(&self) -> Duration {
        Duration::from_secs_f64(self.ttft_ms / 1e3)
    }

    pub(crate) fn tbt(&self, running: usize) -> Duration {
        Duration::from_secs_f64((self.tbt_ms + self.tbt_ms_per_request * running as f64) / 1e3)
    }

    pub(crate) fn prefill(&self, tokens: u32) -> Duration {
        Duration::from_secs_f64(self.prefill_ms_per_token * f64::from(tokens) / 1e3)
    }

    /// As an engine that measures itself would say it; none for one whose prompts cost nothing.
    pub(crate) fn step_cost(&self) -> Option<proto::StepCost> {
        (self.prefill_ms_per_token > 0.0).then(|| proto::StepCost {
            fixed_ms: self.tbt_ms as f32,
            token_ms: self.prefill_ms_per_token as f32,
            attended_ms: 0.0,
            request_ms: (self.tbt_ms_per_request - self.prefill_ms_per_token).max(0.0) as f32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_overrides_defaults_and_wrong_fields_are_named() {
        let settings =
            Settings::from_json(r#"{"ttft_ms": 5, "output": {"kind": "fixed", "ids": [7]}}"#)
                .expect("good");
        assert_eq!(settings.output, Output::Fixed { ids: vec![7] });
        assert_eq!(settings.vocab_size, Settings::default().vocab_size);
        for (json, field) in [
            (r#"{"ttft": 5}"#, "ttft"),
            (r#"{"tbt_ms": -1}"#, "tbt_ms"),
            (r#"{"vocab_size": 0}"#, "vocab_size"),
            (r#"{"output": {"kind": "fixed", "ids": []}}"#, "output.ids"),
            (r#"{"faults": {"refuse": "never"}}"#, "never"),
        ] {
            let error = Settings::from_json(json).expect_err(json).to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn settings_survive_a_round_trip() {
        let settings = Settings::default();
        let json = serde_json::to_string(&settings).expect("json");
        assert_eq!(Settings::from_json(&json), Ok(settings));
    }
}
